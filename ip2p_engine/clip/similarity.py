"""The four CLIP numbers by which the paper filters its pairs (section 3.1.2), as its code computes them."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from threading import Lock
from typing import Any

import open_clip
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, interpolate, normalize

from ..devices import usable_device
from ..errors import CheckpointError, ImageError, first_line
from ..files import read_json, short_text
from ..images import Picture, open_image, unit_pixels
from ..tokenizer import tokenize
from .filter import FilterConfig, PairScores

__all__ = [
    "DEFAULT_CLIP",
    "ClipSimilarity",
    "clip_input",
    "own_thresholds",
    "pair_scores",
    "rounded",
]

DEFAULT_CLIP = "ViT-L-14/openai"
EMBEDDED_CLIP = Path(__file__).parent.parent / "scenes" / "embedded" / "clip"
REMEMBERED_CAPTIONS = 4096
IMAGES_AT_ONCE = 64
DECIMALS = 6
TENSORS_A_LAYER = 8  # at least, of a transformer


def clip_input(pixels: Tensor, size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """What CLIP sees of pictures (B, 3, H, W) in [0, 1]: squeezed to size x size, and mean and deviation taken off.

    Bicubic without antialiasing, cropping or clamping, as in the paper's code. Raises ImageError for values outside
    [0, 1]: its evaluation fed CLIP [-1, 1], which gives other numbers.
    """
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ImageError(f"pictures have shape {tuple(pixels.shape)}; give (B, 3, H, W)")
    low, high = (float(value) for value in torch.aminmax(pixels))
    if not (low >= 0 and high <= 1):
        raise ImageError(f"pictures have values from {low:.3g} to {high:.3g}; give [0, 1]")
    resized = interpolate(pixels.float(), (size, size), mode="bicubic", align_corners=False)
    offset, scale = (torch.tensor(values, device=pixels.device).view(1, 3, 1, 1) for values in (mean, std))
    return (resized - offset) / scale


def pair_scores(source: Tensor, edited: Tensor, caption: Tensor, edited_caption: Tensor) -> list[PairScores]:
    """The four cosines of unit features (B, d) each; direction is cos(I_1 - I_0, T_1 - T_0) (paper, section 3.1.2)."""
    columns = {
        "sim_0": cosine_similarity(source, caption),
        "sim_1": cosine_similarity(edited, edited_caption),
        "sim_direction": cosine_similarity(edited - source, edited_caption - caption),
        "sim_image": cosine_similarity(source, edited),
    }
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [PairScores(**dict(zip(columns, row, strict=True))) for row in rows]


def rounded(scores: PairScores) -> PairScores:
    """To six decimals, as data sets keep them, so that a threshold decides the same now and later."""
    return PairScores(**{name: round(value, DECIMALS) for name, value in asdict(scores).items()})


class ClipSimilarity:
    """A CLIP that scores pairs; it encodes a caption once and pictures in batches."""

    def __init__(
        self,
        network: nn.Module,
        *,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        tokens: Callable[[Sequence[str]], Tensor] | None = None,
    ) -> None:
        """``network`` is open_clip's; ``tokens`` cuts texts, by default CLIP's 77 tokens, padded with 0."""
        self._network: Any = network.eval().requires_grad_(False)
        self._size, self._mean, self._std = size, mean, std
        self._tokens = tokens or (lambda texts: tokenize(texts, pad=0))
        self._captions: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = Lock()

    @classmethod
    def load(cls, source: str | Path = DEFAULT_CLIP, *, device: str | torch.device | None = None) -> ClipSimilarity:
        """Load "embedded", a folder in its layout, or an open_clip model by architecture/weights.

        A folder holds config.json (open_clip's, with preprocess_cfg and perhaps quick_gelu) and model.safetensors.
        The device defaults to a GPU if there is one; on CUDA its products are of half precision, elsewhere all is
        float32. Raises CheckpointError.
        """
        folder = EMBEDDED_CLIP if source == "embedded" else Path(source)
        scorer = _from_folder(folder) if source == "embedded" or folder.is_dir() else _from_open_clip(str(source))
        scorer._network.to(usable_device(device))
        return scorer

    @property
    def network(self) -> nn.Module:
        """open_clip's."""
        return self._network

    @property
    def size(self) -> int:
        """Side of the square that it sees, in pixels."""
        return self._size

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self._network.parameters()).device

    @torch.inference_mode()
    def image_features(self, images: Sequence[Picture] | Tensor) -> Tensor:
        """Unit features (B, d) of pictures of any sizes, or of a tensor (B, 3, H, W) in [0, 1], on the CPU.

        Files are opened; an Image has to be RGB.
        """
        if isinstance(images, Tensor):
            return torch.cat([self._encode(pixels) for pixels in images.split(IMAGES_AT_ONCE)])
        pictures = [image if isinstance(image, Image.Image) else open_image(image) for image in images]
        features = torch.cat([self._encode(pixels) for pixels in _by_size(pictures, self.device)])
        return features[torch.tensor(_size_order(pictures)).argsort()]

    @torch.inference_mode()
    def text_features(self, captions: Sequence[str]) -> Tensor:
        """Unit features (B, d) of captions, on the CPU; more than 77 tokens are cut off."""
        with self._lock:
            known = {caption: self._captions[caption] for caption in captions if caption in self._captions}
        missing = [caption for caption in dict.fromkeys(captions) if caption not in known]
        if missing:
            with self._arithmetic():
                encoded = self._network.encode_text(self._tokens(missing).to(self.device)).float()
            known.update(zip(missing, normalize(encoded, dim=-1).cpu(), strict=True))
        self._remember(known)
        return torch.stack([known[caption] for caption in captions])

    def score(
        self,
        source_images: Sequence[Picture] | Tensor,
        edited_images: Sequence[Picture] | Tensor,
        captions: Sequence[str],
        edited_captions: Sequence[str],
    ) -> list[PairScores]:
        """The scores of pairs, one for each; raises ImageError for pictures that CLIP cannot take."""
        return pair_scores(
            self.image_features(source_images),
            self.image_features(edited_images),
            self.text_features(captions),
            self.text_features(edited_captions),
        )

    def _encode(self, pixels: Tensor) -> Tensor:
        inputs = clip_input(pixels.to(self.device), self._size, self._mean, self._std)
        with self._arithmetic():
            encoded = self._network.encode_image(inputs).float()
        return normalize(encoded, dim=-1).cpu()

    def _arithmetic(self) -> torch.autocast:
        """Of this thread alone, unlike torch's switches for TF32."""
        return torch.autocast(self.device.type, torch.float16, enabled=self.device.type == "cuda")

    def _remember(self, features: dict[str, Tensor]) -> None:
        """Keep the captions that were used last."""
        with self._lock:
            for caption, feature in features.items():
                self._captions[caption] = feature
                self._captions.move_to_end(caption)
            while len(self._captions) > REMEMBERED_CAPTIONS:
                self._captions.popitem(last=False)


def own_thresholds(source: str | Path) -> dict[str, Any]:
    """The filter's settings that a CLIP's folder recommends under ``thresholds`` in its config.json; mostly none."""
    path = (EMBEDDED_CLIP if source == "embedded" else Path(source)) / "config.json"
    if not path.is_file():
        return {}
    found = read_json(path, CheckpointError)
    said = found.get("thresholds", {}) if isinstance(found, dict) else {}
    known = {field.name for field in fields(FilterConfig)}
    if not isinstance(said, dict) or not said.keys() <= known:
        raise CheckpointError(f"{path} has thresholds that are none; give numbers under {', '.join(sorted(known))}")
    return said


def _size_order(images: Sequence[Image.Image]) -> list[int]:
    return sorted(range(len(images)), key=lambda n: images[n].size)


def _by_size(images: Sequence[Image.Image], device: torch.device) -> list[Tensor]:
    """Batches of one size each, in the order of ``_size_order``."""
    groups: dict[tuple[int, int], list[Image.Image]] = {}
    for n in _size_order(images):
        groups.setdefault(images[n].size, []).append(images[n])
    chunks = [group[k : k + IMAGES_AT_ONCE] for group in groups.values() for k in range(0, len(group), IMAGES_AT_ONCE)]
    return [unit_pixels(chunk, device) for chunk in chunks]


def _from_folder(folder: Path) -> ClipSimilarity:
    try:
        config = json.loads(short_text(folder / "config.json", CheckpointError))
        mean, std = (_three_numbers(config["preprocess_cfg"][name]) for name in ("mean", "std"))
        state = {name: value.float() for name, value in load_file(folder / "model.safetensors").items()}
        shape = {name: config[name] for name in ("embed_dim", "vision_cfg", "text_cfg")}
        _check_shape(shape, state)
        network = open_clip.CLIP(**shape, quick_gelu=bool(config.get("quick_gelu")))
        network.load_state_dict(state)
        return ClipSimilarity(network, size=config["vision_cfg"]["image_size"], mean=mean, std=std)
    except Exception as error:  # nearly every class, by what is wrong with the folder
        raise CheckpointError(
            f"{folder} is no CLIP that can be loaded ({type(error).__name__}: {first_line(error)}); "
            f"give a folder with config.json and model.safetensors, or an open_clip name such as {DEFAULT_CLIP}"
        ) from error


def _three_numbers(values: Any) -> list[float]:
    if not isinstance(values, list) or len(values) != 3 or not all(0 <= float(value) < 10 for value in values):
        raise ValueError("its preprocess_cfg has no three numbers")
    return [float(value) for value in values]


def _check_shape(shape: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Raises ValueError unless a network of this shape has just these tensors; nothing large is made to find out."""
    layers = 0
    for part in ("vision_cfg", "text_cfg"):
        if borrowed := [name for name in shape[part] if name.startswith(("hf_", "timm_"))]:
            raise ValueError(f"{borrowed[0]} would fetch another network")
        own = shape[part]["layers"]
        layers += sum(own) if isinstance(own, list) else own
    if not 0 < layers * TENSORS_A_LAYER <= len(state):
        raise ValueError(f"it has {layers:,} layers and {len(state):,} tensors")
    with torch.device("meta"):
        expected = open_clip.CLIP(**shape).state_dict()
    if {name: value.shape for name, value in expected.items()} != {name: value.shape for name, value in state.items()}:
        raise ValueError("its tensors are not those of its configuration")


def _from_open_clip(name: str) -> ClipSimilarity:
    """A published model; open_clip downloads it once."""
    architecture, _, weights = name.partition("/")
    known = open_clip.list_pretrained_tags_by_model(architecture)
    if weights not in known:
        choice = f"choose one of {', '.join(known)}" if known else "open_clip.list_pretrained() lists all"
        raise CheckpointError(
            f"open_clip has no CLIP {name!r}; give architecture/weights like {DEFAULT_CLIP}; {choice}"
        )
    # The weights say which activation they were trained with, the architecture's name does not.
    quick = bool((open_clip.get_pretrained_cfg(architecture, weights) or {}).get("quick_gelu"))
    try:
        network = open_clip.create_model(architecture, pretrained=weights, force_quick_gelu=quick)
        tokens = open_clip.get_tokenizer(architecture)
    except (RuntimeError, OSError) as error:
        reason = first_line(error)
        raise CheckpointError(f"open_clip cannot load {name} ({reason}); check the network, or download it") from error
    seen = open_clip.get_model_preprocess_cfg(network)
    size = seen["size"] if isinstance(seen["size"], int) else seen["size"][0]
    return ClipSimilarity(network, size=size, mean=seen["mean"], std=seen["std"], tokens=tokens)
