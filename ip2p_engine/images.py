"""Pictures at the engine's edges: opening, sizes, tensors, saving. A size is (width, height) in pixels."""

from __future__ import annotations

import io
import json
import math
import os
import re
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from PIL import Image, ImageChops, ImageCms, ImageOps, PngImagePlugin

from .errors import ConfigError, ImageError
from .files import whole_file, write_new
from .jpeg import MOST_SCANS, count_scans

if TYPE_CHECKING:  # pictures are opened, listed and saved without it
    import torch
    from torch import Tensor

__all__ = [
    "PNG_LEVEL",
    "MAX_SIDE",
    "MIN_SIDE",
    "Picture",
    "check_output",
    "encoded",
    "fit",
    "frame_of",
    "give_back",
    "images_of",
    "is_picture_name",
    "mask_levels",
    "open_image",
    "open_mask",
    "paper_size",
    "pixel_count",
    "pixels_digest",
    "plan_size",
    "read_exif",
    "read_settings",
    "save_image",
    "to_images",
    "to_levels",
    "to_tensor",
    "unit_pixels",
    "upright_size",
]

Picture = str | os.PathLike | bytes | Image.Image
"""A path, the bytes of a file, or a Pillow image."""
Size = tuple[int, int]
BAND = 512  # rows
MAX_PIXELS, MAX_ASPECT, MIN_SIDE, MAX_SIDE = 100_000_000, 32, 8, 4096
# A closed list, because Pillow's other readers are for exotic files, and one of them (EPS) starts a program.
READABLE = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "JPEG2000", "HEIF")
WRITABLE = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    "PNG": {},
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"quality": 95},
}
PNG_LEVEL = 1  # four times as fast as Pillow's 6, and a tenth larger
# Names that mean pictures although Pillow may not know them: nobody wants a folder of such a name.
PICTURE_SUFFIXES = (".avif", ".bmp", ".heic", ".heics", ".heif", ".hif", ".jxl", ".psd", ".svg", ".tif", ".tiff")
HEIC_MARKS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")
SETTINGS_KEY, IMAGE_DESCRIPTION = "ip2p", 0x010E
JPEG_SETTINGS = 65533  # bytes of EXIF
ORIENTATION, SIDEWAYS = 0x0112, (5, 6, 7, 8)
WINDOWS = os.name == "nt"
DEVICES = {"CON", "PRN", "AUX", "NUL", *(f"{port}{n}" for port in ("COM", "LPT") for n in range(1, 10))}
SUBFILE, REDUCED = 254, 1  # a TIFF's page that is a smaller copy


def open_image(source: str | os.PathLike[str] | bytes | Image.Image, *, name: str = "the given data") -> Image.Image:
    """A new picture that is upright and 8-bit RGB, whatever came; the caller's picture is never changed.

    EXIF orientation is applied, transparency laid on white, 16-bit grey (0 .. 65535, also in mode I) scaled, CMYK
    converted by its own profile where it has one. An RGB profile stays in ``info["icc_profile"]``.
    Raises ImageError for what cannot be read, is animated, or lies outside 8 px a side, 32 : 1 and 100 megapixels;
    ``name`` is what it calls bytes.
    """
    with warnings.catch_warnings():
        # Pillow warns of large pictures, which have their own limit here, and of broken metadata, which is harmless.
        warnings.simplefilter("ignore")
        with _recognised(source, name) as (picture, called):
            return _normalise(picture, called, own=not isinstance(source, Image.Image))


def open_mask(source: Picture, size: Size) -> Image.Image:
    """A mask as a grey picture of ``size``, white (255) where something may change.

    Of a picture with transparency it is what is clear, as ComfyUI reads one. Raises ImageError for one that is black
    everywhere.
    """
    grey, name = mask_levels(source)
    if not grey.getextrema()[1]:
        raise ImageError(f"{name} is black everywhere, so nothing may change; paint white where something may")
    return grey if grey.size == size else grey.resize(size)


def mask_levels(source: Picture) -> tuple[Image.Image, str]:
    """(a mask as of ``open_mask``, but of its own size and maybe black, what to call it). Raises ImageError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with _recognised(source, "the given mask") as (picture, name), _decoding(name):
            _check_shape(picture, name)
            whole = _upright(picture)
            if whole.has_transparency_data and (clear := _in_bands(whole, _clear, "L")).getextrema()[1]:
                return clear, name
            return _in_bands(whole, lambda band: _to_rgb(band, name).convert("L"), "L"), name


def _clear(picture: Image.Image) -> Image.Image:
    return ImageChops.invert(picture.convert("RGBA").getchannel("A"))


def encoded(data: bytes, name: str = "the given data") -> Image.Image:
    """A picture as its file has it, whose pixels have not been read yet.

    Raises ImageError for formats that are not read, and for more than 100 megapixels.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        picture = _format_known(io.BytesIO(data), name)
    if picture.width * picture.height > MAX_PIXELS:
        picture.close()
        raise ImageError(f"{name} has more than {MAX_PIXELS // 10**6} megapixels; make it smaller first")
    return picture


def upright_size(source: str | os.PathLike[str] | bytes | Image.Image) -> Size:
    """The size that ``open_image``'s picture has, read from the header; raises ImageError for what has none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with _recognised(source, "the given data") as (picture, name):
            if picture.format == "TIFF":  # whose size some versions of Pillow turn by themselves
                return _normalise(picture, name).size
            return (picture.height, picture.width) if _lies_sideways(picture) else picture.size


def pixel_count(source: Picture) -> int:
    """As the header says; 0 for what cannot be opened."""
    with warnings.catch_warnings(), suppress(ImageError):
        warnings.simplefilter("ignore")
        with _recognised(source, "the given data") as (picture, _):
            return picture.width * picture.height
    return 0


def _lies_sideways(picture: Image.Image) -> bool:
    try:
        # A PNG's own method would decode it, to look for EXIF behind the pixels.
        return Image.Image.getexif(picture).get(ORIENTATION) in SIDEWAYS
    except Exception:  # as in _upright
        return False


@contextmanager
def _recognised(source: Any, name: str) -> Iterator[tuple[Image.Image, str]]:
    """A picture whose pixels have not been read, and what to call it; bytes are called ``name``."""
    if isinstance(source, Image.Image):
        yield source, str(getattr(source, "filename", "")) or "the given picture"
    elif isinstance(source, bytes):
        yield _format_known(io.BytesIO(source), name), name
    elif isinstance(source, str | os.PathLike):
        with _opened(source) as stream:
            yield _format_known(stream, str(source)), str(source)
    else:
        raise ImageError(f"a picture came as {type(source).__name__}; give a path, bytes or a Pillow image")


@contextmanager
def _opened(source: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    path = Path(source)
    with _os_errors(path, "read"):
        if path.is_dir():
            raise ImageError(f"{path} is a folder; give the path of one picture")
        if path.exists() and not path.is_file():
            raise ImageError(f"{path} is a device or a pipe; give the path of a picture file")
        stream = path.open("rb")
    with stream:
        yield stream


@contextmanager
def _os_errors(path: Path, verb: str) -> Iterator[None]:
    """The operating system's errors as one sentence; a path with a NUL byte is a ValueError to Python."""
    try:
        yield
    except FileNotFoundError as error:
        raise ImageError(f"{path} does not exist; check the path") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"{str(path)!r} cannot be {verb} ({reason}); check the path and its permissions") from error


def _format_known(stream: BinaryIO, name: str) -> Image.Image:
    if not stream.read(1):
        raise ImageError(f"{name} is empty (0 bytes); give a complete picture file")
    stream.seek(0)
    try:
        return Image.open(stream, formats=_readable())
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} has more than {MAX_PIXELS // 10**6} megapixels; make it smaller first") from error
    except Exception as error:  # decoders raise nearly every class of exception on hostile data
        stream.seek(0)
        if "HEIF" not in _readable() and stream.read(12)[8:] in HEIC_MARKS:
            raise ImageError(
                f"{name} is HEIC, as phones write it; pip install pillow-heif (or 'instruct-pix2pix[heic]')"
            ) from error
        raise ImageError(f"{name} is not a picture in a known format; give one of {', '.join(_readable())}") from error


@lru_cache(maxsize=1)
def _readable() -> tuple[str, ...]:
    """Those of READABLE that this Pillow knows: an unknown name is a KeyError to it; HEIF comes with pillow-heif."""
    Image.init()
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    return tuple(name for name in READABLE if name in Image.OPEN)


def _normalise(picture: Image.Image, name: str, *, own: bool = False) -> Image.Image:
    with _decoding(name):
        _check_shape(picture, name)
        whole = _upright(picture)
        # What was read here has no other owner: its pixels are taken over, where a copy takes as much again.
        taken = own and whole.mode == "RGB" and not whole.has_transparency_data
        plain = whole._new(whole.im) if taken else _to_rgb(whole, name)
    profile = picture.info.get("icc_profile") or b""
    plain.info = {"icc_profile": profile} if profile[16:20] == b"RGB " else {}
    return plain


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    try:
        yield
    except ImageError:
        raise
    except Exception as error:  # as in _format_known
        raise ImageError(f"{name} is damaged or cut short ({error}); give a complete picture file") from error


def _check_shape(picture: Image.Image, name: str) -> None:
    short, long = sorted(picture.size)
    size = f"{name} has {picture.width} x {picture.height} pixels"
    if short < MIN_SIDE:
        raise ImageError(f"{size}; give a picture of at least {MIN_SIDE} pixels a side")
    if short * long > MAX_PIXELS:
        raise ImageError(f"{size}, more than {MAX_PIXELS // 10**6} megapixels; make it smaller first")
    if long > MAX_ASPECT * short:
        raise ImageError(f"{size}, a strip longer than {MAX_ASPECT} : 1; crop it first")
    stream = getattr(picture, "fp", None) if picture.format in ("JPEG", "MPO") else None
    if stream is not None and count_scans(stream) > MOST_SCANS:
        raise ImageError(f"{name} is a JPEG of more than {MOST_SCANS} scans, a pass each; save it once more")
    frames = getattr(picture, "n_frames", 1)
    # The further frames of an MPO and a HEIC, which phones write, are previews of one photograph.
    if frames > 1 and picture.format not in ("MPO", "HEIF") and not (picture.format == "TIFF" and _smaller(picture)):
        raise ImageError(f"{name} holds {frames} frames (an animation or pages); save one of them as a still picture")


def _smaller(picture: Image.Image) -> bool:
    """Whether all further pages of a TIFF are smaller copies of the first: a thumbnail, a pyramid."""
    first, pages = picture.size, []
    for page in range(1, picture.n_frames):  # type: ignore[attr-defined]
        picture.seek(page)
        marked = picture.tag_v2.get(SUBFILE, 0) & REDUCED  # type: ignore[attr-defined]
        pages.append(bool(marked) or (2 * picture.width <= first[0] and 2 * picture.height <= first[1]))
    picture.seek(0)
    return all(pages)


def _upright(picture: Image.Image) -> Image.Image:
    """With the EXIF orientation applied; unreadable EXIF leaves it as stored, as viewers do."""
    picture.load()
    try:
        return ImageOps.exif_transpose(picture) if picture.getexif().get(ORIENTATION, 1) != 1 else picture
    except Exception:  # Pillow raises SyntaxError, struct.error and others on broken EXIF
        return picture


def _in_bands(picture: Image.Image, change: Callable[[Image.Image], Image.Image], mode: str = "RGB") -> Image.Image:
    """Made of some rows at a time: the steps between would take several times the memory of a large picture."""
    made = Image.new(mode, picture.size)
    for number, band in enumerate(_bands(picture)):
        made.paste(change(band), (0, BAND * number))
    return made


def _bands(picture: Image.Image) -> Iterator[Image.Image]:
    """The picture in pieces of ``BAND`` rows, from the top."""
    for top in range(0, picture.height, BAND):
        yield picture.crop((0, top, picture.width, min(top + BAND, picture.height)))


def _to_rgb(picture: Image.Image, name: str) -> Image.Image:
    if picture.mode == "F":
        raise ImageError(f"{name} has floating-point pixels, of unknown range; convert it to 8 or 16 bit first")
    if picture.mode.startswith("I"):
        return _in_bands(picture, lambda band: _eight_bit(band, name).convert("RGB"))
    if picture.mode == "CMYK":
        return _cmyk_to_rgb(picture)
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    return _in_bands(picture, _on_white)


def _on_white(picture: Image.Image) -> Image.Image:
    clear_colour = picture.info.get("transparency")
    if picture.mode == "RGB" and isinstance(clear_colour, tuple) and max(clear_colour) > 255:
        # A PNG of 16 bits a channel, of which Pillow keeps the upper 8.
        picture.info["transparency"] = tuple(value >> 8 for value in clear_colour)
    clear = (picture.convert("LA") if picture.mode == "La" else picture).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB")


def _eight_bit(picture: Image.Image, name: str) -> Image.Image:
    values = np.asarray(picture)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise ImageError(f"{name} holds values from {low} to {high}; give 16-bit grey, 0 to 65535")
    levels = np.round(values / 257).astype(np.uint8)
    clear = picture.info.get("transparency")
    return Image.fromarray(np.where(values == clear, 255, levels) if isinstance(clear, int) else levels)


def _cmyk_to_rgb(picture: Image.Image) -> Image.Image:
    try:
        ink = ImageCms.ImageCmsProfile(io.BytesIO(picture.info["icc_profile"]))
        rgb = ImageCms.profileToProfile(picture, ink, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (KeyError, TypeError, OSError, ImageCms.PyCMSError):  # no profile, or a broken one
        rgb = None
    return rgb or picture.convert("RGB")


def paper_size(width: int, height: int, resolution: int) -> Size:
    """The working size of the paper's code: multiples of 64, the long side near ``resolution``.

    In floating point and in the original's order, since its rounding (98 x 98 at 512 gives 448 x 448) is part of the
    rule; only a side that would vanish becomes 64. Raises ConfigError unless resolution is a whole 64 .. 4096.
    """
    if type(resolution) is not int or not 64 <= resolution <= MAX_SIDE:
        raise ConfigError(f"resolution is {resolution!r}; give a whole number from 64 to {MAX_SIDE}")
    factor = resolution / max(width, height)
    factor = math.ceil(min(width, height) * factor / 64) * 64 / min(width, height)
    return max(64, int((width * factor) // 64) * 64), max(64, int((height * factor) // 64) * 64)


def plan_size(size: str | Size, width: int, height: int, resolution: int, *, multiple: int = 64) -> Size:
    """The size to edit at: "paper" (``paper_size``), "keep" (each side to the nearest multiple), "WxH" or a pair.

    Raises ConfigError for any other value, and for sides that are not multiples of 8 up to 4096.
    """
    if size == "paper":
        return paper_size(width, height, resolution)
    pair: Any = size
    if size == "keep":
        pair = tuple(max(1, (2 * side + multiple) // (2 * multiple)) * multiple for side in (width, height))
    elif isinstance(size, str):
        match = re.fullmatch(r"\s*(\d{1,9})\s*[xX]\s*(\d{1,9})\s*", size, re.ASCII)
        pair = tuple(map(int, match.groups())) if match else ()
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise ConfigError(f"size is {size!r}; choose paper, keep, or width x height such as 512x384")
    if not all(type(side) is int and 0 < side <= MAX_SIDE and side % 8 == 0 for side in pair):
        got = f"size {size!r} asks for {pair[0]} x {pair[1]}"
        raise ConfigError(f"{got}; choose paper, or a width and a height that are multiples of 8 from 8 to {MAX_SIDE}")
    return pair


def fit(image: Image.Image, size: Size) -> Image.Image:
    """The centred crop of the asked aspect, resized to ``size`` by Lanczos, as in the paper's code."""
    return ImageOps.fit(image, size, method=Image.Resampling.LANCZOS)


def give_back(edited: Image.Image, original_size: Size) -> Image.Image:
    """The inverse of ``fit``: the edited picture where its crop lay, in a frame of ``original_size``.

    The margins that ``fit`` cut off are filled by mirroring the edited picture, so that nothing shifts or stretches.
    """
    (pad_x, pad_y), box = frame_of(edited.size, original_size)
    pixels = np.asarray(edited)
    padded = np.pad(pixels, [(pad_y, pad_y), (pad_x, pad_x), (0, 0)][: pixels.ndim], mode="symmetric")
    return Image.fromarray(padded).resize(original_size, Image.Resampling.LANCZOS, box=box)


def frame_of(size: Size, original_size: Size) -> tuple[tuple[int, int], tuple[float, float, float, float]]:
    """((x, y) padding in whole pixels, box): where ``original_size``'s frame lies in a fitted picture so padded."""
    (frame_w, frame_h), (w, h) = original_size, size
    pad_x, left, right = _span(frame_w, min(frame_w, frame_h * w / h), w)
    pad_y, top, bottom = _span(frame_h, min(frame_h, frame_w * h / w), h)
    return (pad_x, pad_y), (left, top, right, bottom)


def _span(frame: int, crop: float, side: int) -> tuple[int, float, float]:
    """One axis: the padding of the edited picture in whole pixels, and where the frame lies in the padded picture."""
    margin = (frame - crop) / 2 * side / crop
    padding = math.ceil(margin)
    return padding, padding - margin, padding + side + margin


def to_tensor(images: Sequence[Image.Image], device: str | torch.device | None = None) -> Tensor:
    """RGB pictures of one size as float32 (B, 3, H, W) in [-1, 1]; raises ImageError for mixed sizes or modes."""
    return 2 * unit_pixels(images, device) - 1


def unit_pixels(images: Sequence[Image.Image], device: str | torch.device | None = None) -> Tensor:
    """The same in [0, 1]; they go to the ``device`` as bytes, and every device makes the same numbers of them."""
    import torch

    kinds = sorted({f"{image.width} x {image.height} {image.mode}" for image in images})
    if len(kinds) != 1 or not kinds[0].endswith(" RGB"):
        raise ImageError(f"a batch holds {', '.join(kinds) or 'no picture'}; give RGB pictures of one size")
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).to(device, non_blocking=True)
    values = pixels.permute(0, 3, 1, 2).contiguous().float()
    # Divided by a tensor: by a number CUDA multiplies with its inverse, and the last bit may be another.
    return values / values.new_full((), 255)


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Pictures from (B, 3, H, W) in [-1, 1], clamped; any float type and device.

    Rounds to the nearest of 0 .. 255, where the original truncates (and so darkens by half a level). Raises
    ImageError for another shape, and for values that are not finite.
    """
    return images_of([to_levels(pixels)])


def to_levels(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """(levels (B, H, W, 3) of 0 .. 255, how many values are not finite) as ``to_images`` rounds, on the pixels' device.

    Raises ImageError for another shape.
    """
    import torch

    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ImageError(f"pixels have the shape {tuple(pixels.shape)}; give (batch, 3, height, width)")
    values = pixels.detach().float()
    levels = ((values.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous(), (~values.isfinite()).sum()


def images_of(parts: Sequence[tuple[Tensor, Tensor]]) -> list[Image.Image]:
    """Pictures of what ``to_levels`` gave, part by part; a device is waited for once.

    Raises ImageError for values that are not finite.
    """
    import torch

    there = [levels.to("cpu", non_blocking=True) for levels, _ in parts]
    lost = int(torch.stack([count for _, count in parts]).sum())  # and by now the copies are there
    if lost:
        got = f"{lost} of {sum(levels.numel() for levels in there)} decoded values are not finite"
        raise ImageError(f"{got}, which a half-precision autoencoder causes by overflow; run it in float32 or bfloat16")
    return [Image.fromarray(picture) for levels in there for picture in levels.numpy()]


def save_image(
    image: Image.Image,
    path: str | os.PathLike[str] | BinaryIO,
    settings: Mapping[str, object] | None = None,
    *,
    new: bool = False,
    png_level: int = PNG_LEVEL,
    exif: bytes | None = None,
) -> Path:
    """Write a PNG, JPEG or WebP whole or not at all, the settings inside as JSON (``read_settings``); returns its path.

    Missing folders are made. ``new``: a name that is taken gets a number, and no two writers share one. ``exif`` is
    ``read_exif``'s, in which the settings of a JPEG or WebP take the description's place. A stream gets a PNG.
    Raises ImageError for another suffix, or where the file cannot be written.
    """
    stream_only = not isinstance(path, str | os.PathLike)
    target = Path("stream.png") if stream_only else Path(path)  # type: ignore[arg-type]
    kind = _kind_of(target)
    options = {**SAVE_OPTIONS[kind], **_settings_options(settings, target, exif)}
    options["icc_profile"] = image.info.get("icc_profile")
    if kind == "PNG":
        options["compress_level"] = png_level
    if stream_only:
        image.save(path, kind, **options)
        return target
    with _os_errors(target, "written"):
        target.parent.mkdir(parents=True, exist_ok=True)
        if new:
            return write_new(target, lambda stream: image.save(stream, kind, **options))
        with whole_file(target) as stream:
            image.save(stream, kind, **options)
    return target


def check_output(path: str | os.PathLike[str], settings: Mapping[str, object] | None = None) -> None:
    """Raise ImageError now if ``save_image`` could not write there later; missing folders are made."""
    path = Path(path)
    if WINDOWS:
        _check_for_windows(path)
    _settings_options(settings, path)
    if os.path.isdir(path):
        raise ImageError(f"{path} is a folder and cannot be written as a picture; give the name of a file")
    probe = path.with_name(f".{uuid.uuid4().hex}{path.suffix}")
    with _os_errors(path, "written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            path.lstat()  # which knows a name that is too long
        probe.touch()
        probe.unlink()


def _check_for_windows(path: Path) -> None:
    """Raises ImageError for names that are devices there, lose their end, or are streams and patterns."""
    for part in path.parts[1 if path.anchor else 0 :]:
        device = part.partition(".")[0].rstrip(" ").upper() in DEVICES
        if device or (part not in (".", "..") and part[-1] in ". ") or set(part) & set('<>:"|?*'):
            raise ImageError(f"Windows cannot write the name {part!r} ({path}); give another")


def is_picture_name(path: str | os.PathLike[str]) -> bool:
    """Whether a name ends like a picture's, also of a format that is not written."""
    suffix = Path(path).suffix.lower()
    return suffix in Image.registered_extensions() or suffix in PICTURE_SUFFIXES


def _kind_of(path: Path) -> str:
    """Pillow's name of the format that a suffix means."""
    kind = WRITABLE.get(path.suffix.lower())
    if kind is None:
        raise ImageError(f"{path} has no suffix that can be written; use one of {', '.join(WRITABLE)}")
    return kind


def _settings_options(
    settings: Mapping[str, object] | None, path: Path, source_exif: bytes | None = None
) -> dict[str, Any]:
    kind = _kind_of(path)
    carried = {"exif": source_exif} if source_exif else {}
    if settings is None:
        return carried
    if kind == "PNG":
        chunks = PngImagePlugin.PngInfo()
        chunks.add_text(SETTINGS_KEY, json.dumps(dict(settings), default=str))
        return {"pnginfo": chunks, **carried}
    exif = Image.Exif()
    if source_exif:
        exif.load(source_exif)
    exif[IMAGE_DESCRIPTION] = json.dumps({SETTINGS_KEY: dict(settings)}, default=str)
    if kind == "JPEG" and (size := len(exif.tobytes())) > JPEG_SETTINGS:
        got = f"{path} cannot be written (its settings take {size} bytes, and a JPEG holds {JPEG_SETTINGS})"
        raise ImageError(f"{got}; shorten the instruction or write a PNG")
    return {"exif": exif}


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings that ``save_image`` wrote; raises ImageError where there are none."""
    with _opened(path) as stream:
        try:
            picture = Image.open(stream, formats=_readable())
            if SETTINGS_KEY in picture.info:
                return dict(json.loads(picture.info[SETTINGS_KEY]))
            return dict(json.loads(picture.getexif()[IMAGE_DESCRIPTION])[SETTINGS_KEY])
        except Exception as error:  # as in _format_known, and descriptions that are not ours
            raise ImageError(f"{path} carries no ip2p settings; give a picture that ip2p wrote") from error


def read_exif(source: str | os.PathLike[str] | bytes) -> bytes | None:
    """A picture's EXIF for its upright pixels (orientation 1, no thumbnail); None where there is none to read."""
    with warnings.catch_warnings(), suppress(Exception):  # as in _upright
        warnings.simplefilter("ignore")
        with _recognised(source, "the given data") as (picture, _):
            exif = picture.getexif()
            if not len(exif):
                return None
            for sub in (0x8769, 0x8825):  # the camera's and the place's, read before the file is closed
                exif.get_ifd(sub)
            exif[ORIENTATION] = 1
            return exif.tobytes()
    return None


def pixels_digest(picture: Image.Image) -> str:
    """SHA-256 of an opened picture's size and RGB values: the same for every file that holds these pixels."""
    content = sha256(f"{picture.width}x{picture.height} ".encode())
    for band in _bands(picture):  # all bytes at once would be copied three times
        content.update(band.tobytes())
    return content.hexdigest()
