"""What the frozen networks make of a batch: the posterior of the edited picture, the condition, the text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn.functional import avg_pool2d
from torch.utils.data import DataLoader, Dataset

from ..errors import DatasetError, first_line
from ..files import disk_errors, read_json, whole_file, write_json
from ..hooks import Hooks
from ..networks.conditioning import TextEmbedding, embed_text, encode_text
from ..networks.digest import digest_of_network
from ..networks.model import Model
from .augment import bucket_shapes, crop_mask, crop_pair, draw_crop, nearest_shape, size_ids
from .batches import Batch, Sample, Share, drawn_instruction, outlive_signals
from .config import TrainConfig
from .order import Place
from .randomness import stream
from .run_folder import first_difference
from .sources import Rows, open_pair, size_of

__all__ = [
    "CacheReader",
    "Encoded",
    "Encoder",
    "build_cache",
    "cache_key",
]

ROWS_PER_SHARD, PAIRS_AT_ONCE = 500, 16
KEY_FILE, BROKEN, TEXT_OF, INSTRUCTIONS, DIGEST = "cache.json", "broken", "text_of", "instructions", "digest"
LATENTS = ("mean", "std", "condition")
PAIR = 2  # pictures, without a mask
SETTINGS = ("columns", "resolution", "resize", "flip", "buckets", "precision", "seed")


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A micro-batch of n examples as latents and encoded texts, float32."""

    mean: Tensor
    """Of the edited picture's posterior, (n, 4, h, w), unscaled."""
    std: Tensor
    condition: Tensor
    """c_I, (n, 4, h, w): the mode, unscaled but for CosXL-Edit; with the mask's after it (n, 8, h, w)."""
    text: TextEmbedding
    size_ids: Tensor
    """(n, 6); only SDXL's network reads it."""
    mask: Tensor | None = None
    """The share of each place that was edited, (n, 1, h, w); None where nothing asks for it."""
    null_text: TextEmbedding | None = None
    """Of the empty text, where the text encoders are trained and it moves."""


class Encoder:
    """Encodes batches of pictures and texts; passes on what a cache has encoded."""

    def __init__(self, model: Model, trained_texts: Sequence[Any] = ()) -> None:
        """``trained_texts``: the text encoders as Accelerate wraps them, where they are trained."""
        self._model, self.trained_texts = model, trained_texts
        self.null_text = self.text([""])

    def __call__(self, batch: Batch) -> Encoded:
        tensors = batch.tensors
        if "pixels" in tensors:
            tensors = {**tensors, **self.latents(tensors["pixels"], tensors.get("mask"))}
        null = None
        if self.trained_texts:
            text, null = self.trained_text(batch.instructions)
        elif "pixels" in tensors:
            text = self.text(batch.instructions)
        else:
            pooled = tensors.get("pooled")
            text = TextEmbedding(tokens=tensors["tokens"].float(), pooled=None if pooled is None else pooled.float())
        mean, std, condition = (tensors[name].float() for name in ("mean", "std", "condition"))
        mask = tensors["mask"].float() if "mask" in tensors else None
        latents: dict[str, Any] = {"mean": mean, "std": std, "condition": condition, "mask": mask}
        return Encoded(**latents, text=text, size_ids=tensors["size_ids"], null_text=null)

    @torch.no_grad()
    def latents(self, pixels: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Of uint8 pixels (n, 2, 3, H, W), before and after, and masks (n, 1, H, W), in one pass of the autoencoder."""
        autoencoder, spec = self._model.autoencoder, self._model.spec
        if spec.takes_mask and mask is not None:
            pixels = torch.cat([pixels, mask[:, None].expand(-1, 1, 3, -1, -1)], dim=1)
        count = pixels.shape[1]
        values = (2 * pixels.to(autoencoder.device).float() / 255 - 1).flatten(0, 1)
        posterior = autoencoder.encode(values.to(autoencoder.dtype)).latent_dist
        mode = posterior.mode().float().unflatten(0, (-1, count))
        std = posterior.std.float().unflatten(0, (-1, count))
        scale = spec.latent_scale if spec.scaled_condition else 1.0
        found = {
            "mean": mode[:, 1],
            "std": std[:, 1],
            "condition": scale * (mode[:, 0] if count == PAIR else torch.cat([mode[:, 0], mode[:, 2]], dim=1)),
        }
        return found if mask is None else {**found, "mask": avg_pool2d(mask.to(mode.device).float() / 255, 8)}

    def text(self, texts: Sequence[str]) -> TextEmbedding:
        """Each different text is encoded once; float32."""
        distinct = list(dict.fromkeys(texts))
        with torch.inference_mode():
            embedded = encode_text(self._model, distinct).rows([distinct.index(text) for text in texts])
        # Out of inference mode a clone is an ordinary tensor, which a backward pass may keep.
        pooled = None if embedded.pooled is None else embedded.pooled.clone().float()
        return TextEmbedding(tokens=embedded.tokens.clone().float(), pooled=pooled)

    def trained_text(self, texts: Sequence[str]) -> tuple[TextEmbedding, TextEmbedding]:
        """(the texts, the empty text) in one pass, with gradients where they are on; float32."""
        distinct = list(dict.fromkeys([*texts, ""]))
        found = embed_text(self._model, distinct, self.trained_texts)
        pooled = None if found.pooled is None else found.pooled.float()
        found = TextEmbedding(tokens=found.tokens.float(), pooled=pooled)
        return found.rows([distinct.index(text) for text in texts]), found.rows([distinct.index("")])


def cache_key(source: Rows, model: Model, config: TrainConfig, *, masks: bool = False) -> dict[str, Any]:
    """What the cached tensors depend on, as JSON takes it."""
    settings = {name: value for name, value in asdict(config).items() if name in SETTINGS}
    frozen = (model.autoencoder, *(() if config.train_text_encoder else model.text_encoders))
    networks = {f"network {n}": digest_of_network(network) for n, network in enumerate(frozen)}
    key = {"data": source.identity, "rows": len(source), "variants": config.variants, **settings, **networks}
    key |= {"masks": model.spec.in_channels} if masks else {}  # caches without are as those of 0.1
    return json.loads(json.dumps(key))


def build_cache(
    source: Rows,
    encoder: Encoder,
    key: Mapping[str, Any],
    config: TrainConfig,
    share: Share,
    folder: Path,
    on_cache: Callable[[int, int], None],
    hooks: Hooks,
) -> None:
    """Encode what is not there yet; processes take shards in turn. ``on_cache`` hears (rows, all rows) at each shard.

    Raises DatasetError if the folder holds other tensors, and Interrupted between shards.
    """
    _agree(folder, key)
    starts = range(0, len(source), ROWS_PER_SHARD)
    for number in range(share.rank, len(starts), share.world):
        path = _shard_path(folder, number)
        on_cache(starts[number], len(source))
        if path.exists():
            continue
        hooks.check_stop(f"stopped after {number} of {len(starts)} cached shards; the same call goes on")
        rows = range(starts[number], min(starts[number] + ROWS_PER_SHARD, len(source)))
        _write_shard(path, _Crops(source, config, masks=bool(key.get("masks"))), rows, encoder, config)
    on_cache(len(source), len(source))


class CacheReader:
    """Reads cached examples; which variant follows from the example's place."""

    def __init__(self, folder: Path, key: Mapping[str, Any], config: TrainConfig) -> None:
        self._folder, self._rows, self._config = folder, key["rows"], config
        self._names = (*LATENTS, "size_ids", *(("mask",) if key.get("masks") else ()))
        self._open: dict[int, _Shard] = {}

    def read(self, candidate: Any, place: Place) -> Sample:
        row = candidate % self._rows
        shard = self._shard(row // ROWS_PER_SHARD)
        if str(row) in shard.broken:
            raise DatasetError(shard.broken[str(row)])
        generator = stream(self._config.seed, "variant", place.step, place.position)
        variant = int(torch.randint(self._config.variants, (), generator=generator))
        tensors = {name: shard.file.get_slice(f"{row}.{name}")[variant] for name in self._names}
        text = shard.text_of[str(row)]
        if shard.instructions:
            return Sample(instruction=shard.instructions[text], tensors=tensors)
        names = [name for name in ("tokens", "pooled") if f"{name}.{text}" in shard.names]
        texts = {name: shard.file.get_tensor(f"{name}.{text}") for name in names}
        return Sample(instruction="", tensors={**tensors, **texts})

    def latent_shape(self, place: Place) -> tuple[int, int, int]:
        return (4, place.size[1] // 8, place.size[0] // 8)

    def broken(self) -> set[int]:
        """The rows that could not be encoded."""
        shards = (_Shard.open(path) for path in sorted(self._folder.glob("shard-*.safetensors")))
        return {int(row) for shard in shards for row in shard.broken}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": {}}

    def _shard(self, number: int) -> _Shard:
        if number not in self._open:
            self._open[number] = _Shard.open(_shard_path(self._folder, number))
        return self._open[number]


@dataclass(frozen=True, kw_only=True)
class _Shard:
    file: Any
    names: set[str]
    broken: dict[str, str]
    text_of: dict[str, int]
    instructions: list[str]
    """Where the text encoders are trained, in place of what they made."""

    @classmethod
    def open(cls, path: Path) -> _Shard:
        """Raises DatasetError for a file that is not as it was written; those of 0.1 carry no digest."""
        try:
            file = safe_open(path, framework="pt")
            about, names = file.metadata(), set(file.keys())
            broken, text_of = json.loads(about[BROKEN]), json.loads(about[TEXT_OF])
            instructions = json.loads(about.get(INSTRUCTIONS, "[]"))
            if about.get(DIGEST) not in (None, _digest({name: file.get_tensor(name) for name in names})):
                raise ValueError("its numbers have changed")
        except Exception as error:  # nearly every class, by where the damage is
            raise DatasetError(f"{path} is damaged ({first_line(error)}); delete it, it is made again") from error
        return cls(file=file, names=names, broken=broken, text_of=text_of, instructions=instructions)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    content = blake2b(digest_size=16)
    for name in sorted(tensors):
        content.update(name.encode() + tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    return content.hexdigest()


class _Crops(Dataset):
    """Every variant of a row: (row, instruction, crops, size ids, masks or None), or (row, what is wrong)."""

    def __init__(self, source: Rows, config: TrainConfig, *, masks: bool) -> None:
        self._source, self._config, self._masks = source, config, masks
        self._shapes = bucket_shapes(config.resolution) if config.buckets else [(config.resolution,) * 2]

    def __getitem__(self, row: int) -> tuple[Any, ...]:
        try:
            example = self._source[row]
            pair = open_pair(example, drawn_instruction(example, self._config.seed, row), masks=self._masks)
            size = self._shapes[nearest_shape(size_of(example), self._shapes)]
        except DatasetError as error:
            return row, str(error)
        draws = (stream(self._config.seed, "cached crop", row, n) for n in range(self._config.variants))
        crops = [draw_crop(pair.original.size, size, self._config, generator) for generator in draws]
        pixels = [crop_pair((pair.original, pair.edited), crop) for crop in crops]
        masks = torch.stack([crop_mask(pair.mask, crop) for crop in crops]) if self._masks else None
        return row, pair.instruction, torch.stack(pixels), torch.stack([size_ids(crop) for crop in crops]), masks


def _write_shard(path: Path, crops: _Crops, rows: range, encoder: Encoder, config: TrainConfig) -> None:
    tensors: dict[str, Tensor] = {}
    broken: dict[str, str] = {}
    texts: dict[str, int] = {}
    text_of: dict[str, int] = {}
    kept = torch.float32 if config.precision == "float32" else torch.float16
    generator = torch.Generator()  # or the loader would draw from the global one
    workers: dict[str, Any] = {"num_workers": config.workers, "worker_init_fn": outlive_signals}
    loader = DataLoader(crops, batch_size=None, sampler=rows, generator=generator, **workers)
    for group in _grouped(loader, broken):
        pictures, masks = ([item[place] for item in group] for place in (2, 4))
        latents = encoder.latents(torch.cat(pictures), None if masks[0] is None else torch.cat(masks))
        for n, (row, instruction, pixels, ids, _) in enumerate(group):
            own = slice(n * len(pixels), (n + 1) * len(pixels))
            tensors |= {f"{row}.{name}": value[own].to(kept).cpu() for name, value in latents.items()}
            tensors[f"{row}.size_ids"] = ids
            text_of[str(row)] = texts.setdefault(instruction, len(texts))
    for text, number in texts.items() if not config.train_text_encoder else ():
        embedded = encoder.text([text])
        tensors[f"tokens.{number}"] = embedded.tokens[0].to(kept).cpu()
        if embedded.pooled is not None:
            tensors[f"pooled.{number}"] = embedded.pooled[0].to(kept).cpu()
    about = {BROKEN: json.dumps(broken), TEXT_OF: json.dumps(text_of), DIGEST: _digest(tensors)}
    about |= {INSTRUCTIONS: json.dumps(list(texts))} if config.train_text_encoder else {}
    with disk_errors(path, "written", DatasetError), whole_file(path) as file:
        file.write(save({name: value.contiguous() for name, value in tensors.items()}, about))


def _grouped(loader: DataLoader, broken: dict[str, str]) -> Iterator[list[tuple[Any, ...]]]:
    """Good rows in runs of one shape; broken ones go into the dict."""

    def good() -> Iterator[tuple[Any, ...]]:
        for row, *rest in loader:
            if len(rest) == 1:
                broken[str(row)] = rest[0]
            else:
                yield (row, *rest)

    for _, run in groupby(good(), key=lambda item: item[2].shape):
        while group := list(islice(run, PAIRS_AT_ONCE)):
            yield group


def _agree(folder: Path, key: Mapping[str, Any]) -> None:
    path = folder / KEY_FILE
    if not path.exists():
        with disk_errors(folder, "written", DatasetError):
            folder.mkdir(parents=True, exist_ok=True)
            write_json(path, key)
    theirs = read_json(path, DatasetError)
    if not isinstance(theirs, dict):
        raise DatasetError(f"{path} is no cache's; delete the folder")
    changed = [name for name in sorted(key) if theirs.get(name) != key[name]]
    if changed:
        name = changed[0]
        old, new = first_difference(str(theirs.get(name)), str(key[name]))
        raise DatasetError(f"{folder} holds latents with {name} {old!r}, and now it is {new!r}; delete the folder")


def _shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:06d}.safetensors"
