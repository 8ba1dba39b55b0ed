"""The nodes, one list."""

from __future__ import annotations

from ._api import ComfyExtension, io
from ._models import offer_embedded_control
from .captions import Captions
from .compare import BeforeAfter, LabelledGrid, SweepGuidance
from .conditioning import EncodeImage, RestoreSize
from .dataset import LoadDataset, SaveDataset
from .evaluation import Evaluate
from .filtering import ClipFilter
from .loading import LoadCheckpoint
from .pairs import GeneratePairs, PairImages
from .sampling import AdjustScales, Guider, Sample
from .scenes import ExamplePhoto, RenderScene
from .training import Train

__all__ = ["InstructPix2PixExtension"]


class InstructPix2PixExtension(ComfyExtension):
    """InstructPix2Pix for ComfyUI."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        offer_embedded_control()
        return [
            LoadCheckpoint,
            RenderScene,
            ExamplePhoto,
            EncodeImage,
            RestoreSize,
            Guider,
            AdjustScales,
            Sample,
            BeforeAfter,
            SweepGuidance,
            LabelledGrid,
            Captions,
            GeneratePairs,
            PairImages,
            ClipFilter,
            SaveDataset,
            LoadDataset,
            Train,
            Evaluate,
        ]
