"""The nodes, one list."""

from __future__ import annotations

from ._api import ComfyExtension, io
from .conditioning import EncodeImage, RestoreSize
from .loading import LoadCheckpoint
from .sampling import Guider, LabelledGrid, Sample, SweepGuidance
from .scenes import RenderScene

__all__ = ["InstructPix2PixExtension"]


class InstructPix2PixExtension(ComfyExtension):
    """InstructPix2Pix for ComfyUI."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            LoadCheckpoint,
            RenderScene,
            EncodeImage,
            RestoreSize,
            Guider,
            Sample,
            SweepGuidance,
            LabelledGrid,
        ]
