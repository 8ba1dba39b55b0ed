"""Pictures at the engine's edges: every mode, every threshold, the paper's resize table, alignment, files, strips."""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from ip2p_engine import images
from ip2p_engine.errors import ConfigError, ImageError
from ip2p_engine.images import (
    check_output,
    fit,
    give_back,
    open_image,
    paper_size,
    plan_size,
    read_settings,
    save_image,
    to_images,
    to_tensor,
    unit_pixels,
    upright_size,
)
from ip2p_engine.strips import strip

REFERENCE = Path(__file__).parent.parent / "data" / "reference"
RESIZE_TABLE = json.loads((REFERENCE / "misc.json").read_text())["resize"]
COFFEE_AT_192 = (
    "dd62890b158f92176be06f009499d82b85281d62951fd4a53bf53c5c3d3a47c5"  # sha256 of the original's `coffee_u8`
)
RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def grey(mode: str, *values: int) -> Image.Image:
    """A 16-bit or 32-bit picture in bands of 16 pixels."""
    kinds = {"I": "<i4", "I;16": "<u2", "I;16B": ">u2"}
    row = np.repeat(np.array(values, dtype=kinds[mode]), 16)
    return Image.frombytes(mode, (len(row), 16), np.tile(row, (16, 1)).tobytes())


def one_sentence(error: pytest.ExceptionInfo[Exception]) -> str:
    message = str(error.value)
    assert message and "\n" not in message and not message.endswith(".")
    return message


# Pixels and modes.


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("RGB", (10, 20, 30), (10, 20, 30)),
        ("L", 77, (77, 77, 77)),
        ("1", 1, WHITE),
        ("1", 0, BLACK),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 0), WHITE),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),
        ("RGBa", (0, 0, 0, 51), (204, 204, 204)),
        ("LA", (0, 51), (204, 204, 204)),
        ("La", (0, 51), (204, 204, 204)),
        ("PA", (0, 0), WHITE),
        ("CMYK", (0, 0, 0, 0), WHITE),
        ("CMYK", (0, 0, 0, 255), BLACK),
        ("CMYK", (255, 0, 0, 0), (0, 255, 255)),
        ("YCbCr", (255, 128, 128), WHITE),
        ("HSV", (0, 255, 255), RED),
    ],
)
def test_every_mode_becomes_rgb(mode, value, expected):
    opened = open_image(Image.new(mode, (12, 9), value))
    assert (opened.mode, opened.size, opened.getpixel((5, 5))) == ("RGB", (12, 9), expected)


@pytest.mark.parametrize("mode", ["I", "I;16", "I;16B"])
def test_sixteen_bits_are_scaled_not_clipped(mode):
    opened = open_image(grey(mode, 0, 257, 25700, 65535))
    assert [opened.getpixel((x, 3)) for x in (8, 24, 40, 56)] == [(v, v, v) for v in (0, 1, 100, 255)]


@pytest.mark.parametrize(("value", "expected"), [(128, 0), (129, 1), (65406, 254), (65407, 255)])
def test_sixteen_bits_round_to_the_nearest(value, expected):
    assert open_image(grey("I;16", value)).getpixel((0, 0)) == (expected,) * 3


def test_sixteen_bit_png_file(tmp_path):
    grey("I;16", 0, 25700, 65535).save(tmp_path / "deep.png")
    assert [open_image(tmp_path / "deep.png").getpixel((x, 0))[0] for x in (0, 16, 32)] == [0, 100, 255]


@pytest.mark.parametrize("values", [(-1, 5), (0, 65536)])
def test_integers_outside_sixteen_bits_are_refused(values):
    with pytest.raises(ImageError, match=f"from {values[0]} to {values[1]}") as error:
        open_image(grey("I", *values))
    one_sentence(error)


def test_floating_point_is_refused():
    with pytest.raises(ImageError, match="floating-point") as error:
        open_image(Image.new("F", (16, 16), 0.5))
    one_sentence(error)


def test_palette_with_and_without_transparency():
    picture = Image.new("P", (16, 16), 1)
    picture.putpalette([*RED, *BLUE])
    assert open_image(encoded(picture, "PNG")).getpixel((0, 0)) == BLUE
    assert open_image(encoded(picture, "PNG", transparency=1)).getpixel((0, 0)) == WHITE
    assert open_image(encoded(picture, "PNG", transparency=0)).getpixel((0, 0)) == BLUE
    assert open_image(encoded(picture, "GIF", transparency=1)).getpixel((0, 0)) == WHITE


@pytest.mark.parametrize(("mode", "key"), [("RGB", (1, 2, 3)), ("L", 7)])
def test_transparent_colour_of_a_png(mode, key):
    picture = Image.new(mode, (16, 16), key)
    assert open_image(encoded(picture, "PNG", transparency=key)).getpixel((0, 0)) == WHITE


def test_adobe_cmyk_jpeg_is_not_inverted():
    for ink, expected in [((0, 0, 0, 0), WHITE), ((0, 255, 255, 0), RED), ((0, 0, 0, 255), BLACK)]:
        pixel = open_image(encoded(Image.new("CMYK", (16, 16), ink), "JPEG")).getpixel((8, 8))
        assert np.abs(np.subtract(pixel, expected)).max() <= 3


def test_profiles():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert open_image(encoded(noise(16, 16), "PNG", icc_profile=srgb)).info == {"icc_profile": srgb}
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    assert open_image(encoded(noise(16, 16), "PNG", icc_profile=lab)).info == {}
    broken = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", icc_profile=b"junk")
    assert np.abs(np.subtract(open_image(broken).getpixel((8, 8)), RED)).max() <= 3


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF"])
def test_lossless_files_are_read_exactly(kind):
    picture = noise(20, 12).quantize(64).convert("RGB")
    assert open_image(encoded(picture, kind, **({"lossless": True} if kind == "WEBP" else {}))).tobytes() == (
        picture.tobytes()
    )


@pytest.mark.parametrize("kind", ["PPM", "JPEG2000"])
def test_a_format_that_this_pillow_lacks_hides_no_other(kind, monkeypatch):
    """AVIF came with Pillow 11.3."""
    data = encoded(noise(20, 12), kind)
    monkeypatch.delitem(Image.OPEN, "AVIF", raising=False)
    images._readable.cache_clear()
    assert open_image(data).size == (20, 12)
    monkeypatch.undo()
    images._readable.cache_clear()


# Orientation: where the upright picture's top-left, top-right and bottom-left corners are stored (EXIF 2.3, 4.6.4).
CORNERS = {
    1: "TL TR BL",
    2: "TR TL BR",
    3: "BR BL TR",
    4: "BL BR TL",
    5: "TL BL TR",
    6: "BL TL BR",
    7: "BR TR BL",
    8: "TR BR TL",
}


def stored_with(orientation: int, kind: str) -> bytes:
    width, height = (48, 32) if orientation < 5 else (32, 48)
    picture = Image.new("RGB", (width, height), "black")
    for corner, colour in zip(CORNERS[orientation].split(), (RED, GREEN, BLUE), strict=True):
        x, y = ("L", "R").index(corner[1]) * (width - 16), ("T", "B").index(corner[0]) * (height - 16)
        picture.paste(colour, (x, y, x + 16, y + 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(picture, kind, exif=exif)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(orientation, kind):
    opened = open_image(stored_with(orientation, kind))
    assert opened.size == upright_size(stored_with(orientation, kind)) == (48, 32)
    assert not opened.getexif()
    for place, colour in [((8, 8), RED), ((40, 8), GREEN), ((8, 24), BLUE), ((40, 24), BLACK)]:
        assert np.abs(np.subtract(opened.getpixel(place), colour)).max() < 40


def test_orientation_of_sixteen_bits():
    exif = Image.Exif()
    exif[0x0112] = 6
    opened = open_image(encoded(grey("I;16", 0, 65535), "PNG", exif=exif))
    assert (opened.size, opened.getpixel((8, 2)), opened.getpixel((8, 30))) == ((16, 32), BLACK, WHITE)


def test_broken_exif_leaves_the_picture_as_stored():
    picture = noise(16, 8)
    stored = encoded(picture, "PNG", exif=b"Exif\0\0garbage")
    assert open_image(stored).tobytes() == picture.tobytes()
    assert upright_size(stored) == (16, 8)


def test_a_size_is_read_from_the_header_alone():
    assert upright_size(encoded(noise(160, 80), "PNG")[:100]) == (160, 80)
    for data in (b"", b"no picture"):
        with pytest.raises(ImageError):
            upright_size(data)


# What the caller gave stays as it was.


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "I;16"])
def test_the_callers_picture_is_not_touched(mode):
    picture = Image.new(mode, (16, 8))
    picture.info["note"] = "mine"
    picture.getexif()[0x0112] = 6
    before = (picture.mode, picture.size, picture.tobytes(), dict(picture.info), dict(picture.getexif()))
    opened = open_image(picture)
    opened.paste("white", (0, 0, *opened.size))
    opened.info["other"] = 1
    assert (picture.mode, picture.size, picture.tobytes(), dict(picture.info), dict(picture.getexif())) == before
    assert opened.size == (8, 16)


@pytest.mark.parametrize("wrap", [str, Path, lambda path: Path(path).read_bytes(), Image.open])
def test_every_kind_of_source_opens_alike(tmp_path, wrap):
    picture = noise(20, 10)
    picture.save(tmp_path / "a.png")
    assert open_image(wrap(tmp_path / "a.png")).tobytes() == picture.tobytes()


# Refusals.


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ((1, 1), "at least 8"),
        ((7, 8), "at least 8"),
        ((8, 7), "at least 8"),
        ((8, 8), None),
        ((20000, 3), "at least 8"),
        ((8 * 32, 8), None),
        ((8 * 32 + 1, 8), "longer than 32"),
        ((8, 8 * 32 + 1), "longer than 32"),
        ((10001, 10000), "megapixels"),
    ],
)
def test_size_limits(size, reason, tmp_path):
    path = tmp_path / "picture.png"
    Image.new("1", size).save(path)
    if reason is None:
        assert open_image(path).size == size
        return
    with pytest.raises(ImageError, match=reason) as error:
        open_image(path)
    assert str(path) in one_sentence(error) and f"{size[0]} x {size[1]}" in str(error.value)


def test_exactly_the_largest_picture_is_accepted(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 400)
    assert open_image(Image.new("L", (20, 20))).size == (20, 20)
    with pytest.raises(ImageError, match="megapixels"):
        open_image(Image.new("L", (21, 20)))


def test_decompression_bomb_is_one_sentence(tmp_path):
    path = tmp_path / "bomb.bmp"
    header = bytearray(encoded(Image.new("1", (16, 16)), "BMP"))
    header[18:26] = (60000).to_bytes(4, "little") * 2
    path.write_bytes(header)
    with pytest.raises(ImageError, match="megapixels") as error:
        open_image(path)
    assert str(path) in one_sentence(error)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animations_are_refused_and_their_stills_are_not(kind):
    frames = [noise(16, 16, seed) for seed in range(3)]
    assert open_image(encoded(frames[0], kind)).size == (16, 16)
    moving = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    for source in (moving, Image.open(io.BytesIO(moving))):
        with pytest.raises(ImageError, match="3 frames") as error:
            open_image(source)
        one_sentence(error)


def test_a_phone_photograph_with_a_preview_is_a_still_picture():
    mpo = encoded(Image.new("RGB", (32, 16), RED), "MPO", save_all=True, append_images=[Image.new("RGB", (16, 8))])
    assert Image.open(io.BytesIO(mpo)).n_frames == 2
    assert np.abs(np.subtract(open_image(mpo).getpixel((8, 8)), RED)).max() <= 3


def bad_files() -> dict[str, bytes]:
    good = {kind: encoded(noise(64, 64), kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")}
    cut = {f"cut.{kind.lower()}": data[: len(data) // 2] for kind, data in good.items()}
    headers = {f"header.{kind.lower()}": data[:20] for kind, data in good.items()}
    return {"empty.png": b"", "text.png": b"hello, I am text\n" * 9, **cut, **headers}


@pytest.mark.parametrize("name", bad_files())
def test_bad_files(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(bad_files()[name])
    with pytest.raises(ImageError) as error:
        open_image(path)
    assert str(path) in one_sentence(error)
    with pytest.raises(ImageError):
        open_image(path.read_bytes())


def test_postscript_is_never_run():
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n"
    assert Image.open(io.BytesIO(program)).format == "EPS"
    with pytest.raises(ImageError, match="known format"):
        open_image(program)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing.png", "does not exist"),
        (".", "is a folder"),
        ("file.png/inside.png", "cannot be read"),
        ("nul\0.png", "cannot be read"),
        ("long" * 200, "cannot be read"),
        (os.devnull, "device or a pipe"),
    ],
)
def test_bad_paths(tmp_path, monkeypatch, name, reason):
    monkeypatch.chdir(tmp_path)
    Path("file.png").write_bytes(b"x")
    with pytest.raises(ImageError, match=reason) as error:
        open_image(name)
    assert name.replace("\0", "\\x00") in one_sentence(error)


def test_unreadable_permissions(tmp_path, monkeypatch):
    path = tmp_path / "secret.png"
    noise(16, 16).save(path)

    def refuse(*_: object) -> None:  # root may read everything, so the system's answer is played
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ImageError, match="Permission denied") as error:
        open_image(path)
    assert str(path) in one_sentence(error)


@pytest.mark.parametrize("source", [None, 3, np.zeros((8, 8, 3), np.uint8), [b"x"]])
def test_other_types_are_refused(source):
    with pytest.raises(ImageError, match=type(source).__name__):
        open_image(source)


# Sizes.


def test_resize_table_is_whole():
    assert len(RESIZE_TABLE) == 104


@pytest.mark.parametrize("row", RESIZE_TABLE, ids=lambda row: f"{row['w']}x{row['h']}@{row['resolution']}")
def test_paper_size_is_the_originals(row):
    expected = tuple(row["out"])
    assert paper_size(row["w"], row["h"], row["resolution"]) == expected
    assert plan_size("paper", row["w"], row["h"], row["resolution"]) == expected


def test_a_side_that_rounding_would_lose_is_64():
    assert paper_size(98, 98, 64) == (64, 64)


@pytest.mark.parametrize("resolution", [63, 4097, 0, -512, 512.0, True, "512", float("nan")])
def test_bad_resolution(resolution):
    with pytest.raises(ConfigError, match="resolution") as error:
        paper_size(640, 480, resolution)
    one_sentence(error)


@pytest.mark.parametrize(("resolution", "expected"), [(64, (64, 64)), (4096, (4096, 4096))])
def test_resolution_limits(resolution, expected):
    assert paper_size(512, 512, resolution) == expected


@pytest.mark.parametrize(
    ("size", "multiple", "expected"),
    [
        ((640, 427), 64, (640, 448)),
        ((640, 415), 64, (640, 384)),
        ((95, 96), 64, (64, 128)),
        ((8, 31), 64, (64, 64)),
        ((100, 108), 8, (104, 112)),
        ((99, 8), 8, (96, 8)),
        ((4096, 4127), 64, (4096, 4096)),
    ],
)
def test_keep_rounds_to_the_nearest_multiple(size, multiple, expected):
    assert plan_size("keep", *size, 512, multiple=multiple) == expected


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("512x384", (512, 384)),
        (" 512 X 384 ", (512, 384)),
        ((512, 384), (512, 384)),
        ("8x4096", (8, 4096)),
        ((8, 8), (8, 8)),
    ],
)
def test_explicit_sizes(size, expected):
    assert plan_size(size, 640, 480, 512) == expected


@pytest.mark.parametrize("size", ["512x380", "0x64", (4, 8), (-8, 8), "4104x8", (8, 4104), (64.0, 64), (True, 8)])
def test_explicit_sizes_out_of_range(size):
    with pytest.raises(ConfigError, match="multiples of 8") as error:
        plan_size(size, 640, 480, 512)
    one_sentence(error)


@pytest.mark.parametrize(
    "size", ["", "large", "512", "512x", "x512", "1x2x3", "-8x8", "8.0x8", None, 512, (8,), (8, 8, 8)]
)
def test_unknown_sizes(size):
    with pytest.raises(ConfigError, match="choose paper, keep, or width x height") as error:
        plan_size(size, 640, 480, 512)
    one_sentence(error)


def test_keep_refuses_what_no_model_can_hold():
    with pytest.raises(ConfigError, match="4160 x 512"):
        plan_size("keep", 4128, 512, 512)


# Fit and give back.


def test_fit_is_the_originals_on_a_photograph():
    from skimage import data

    coffee = Image.fromarray(data.coffee())
    fitted = fit(coffee, paper_size(*coffee.size, 192))
    assert fitted.size == (192, 128)
    assert hashlib.sha256(fitted.tobytes()).hexdigest() == COFFEE_AT_192


def test_fit_crops_the_middle():
    picture = Image.new("RGB", (200, 100), RED)
    picture.paste(GREEN, (46, 0, 154, 100))
    picture.paste(BLUE, (154, 0, 200, 100))
    assert fit(picture, (64, 64)).getcolors() == [(64 * 64, GREEN)]


FRAMES = [(600, 400), (593, 331), (331, 599), (98, 98), (512, 512), (100, 640), (1023, 64), (64, 64)]


@pytest.mark.parametrize("target", ["paper", "keep", (64, 64), (128, 64), (64, 256)])
@pytest.mark.parametrize("frame", FRAMES, ids=str)
def test_a_spot_comes_back_to_its_place(frame, target):
    """The centre of a soft spot, in the middle and near the crop's corners, moves by less than a tenth of a pixel."""
    width, height = frame
    size = plan_size(target, width, height, 256)
    scale = max(size[0] / width, size[1] / height)
    crop = np.array(size) / scale
    y, x = np.mgrid[:height, :width] + 0.5
    radius = 1.5 * max(1.0, 1 / scale)
    for direction in [(0, 0), (-1, -1), (1, -1), (-1, 1), (1, 1)]:
        centre = np.array(frame) / 2 + np.array(direction) * (crop / 2 - 4 * radius)
        spot = np.exp(-((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / (2 * radius**2))
        original = Image.fromarray(np.repeat((255 * spot).round().astype(np.uint8)[..., None], 3, 2))
        returned = give_back(fit(original, size), frame)
        assert returned.size == frame
        weight = np.asarray(returned)[..., 0].astype(float)
        weight[np.hypot(x - centre[0], y - centre[1]) > 3.5 * radius] = 0  # the mirrored margins hold its twins
        found = np.array([(weight * x).sum(), (weight * y).sum()]) / weight.sum()
        assert np.abs(found - centre).max() < max(0.1, 0.1 / scale)


def test_same_size_comes_back_bit_for_bit():
    picture = noise(96, 64)
    assert give_back(fit(picture, (96, 64)), (96, 64)).tobytes() == picture.tobytes()


def test_the_middle_comes_back_exactly_and_margins_mirror_it():
    picture = noise(100, 64)
    returned = np.asarray(give_back(fit(picture, (64, 64)), (100, 64)))
    assert np.array_equal(returned[:, 18:82], np.asarray(picture)[:, 18:82])
    assert np.array_equal(returned[:, :18], returned[:, 18:36][:, ::-1])
    assert np.array_equal(returned[:, 82:], returned[:, 64:82][:, ::-1])


def test_margins_wider_than_the_picture_repeat_the_mirror():
    edited = noise(16, 64)
    returned = np.asarray(give_back(edited, (16 * 9, 64)))
    core = np.asarray(edited)
    for tile in range(9):
        expected = core if tile % 2 == 0 else core[:, ::-1]
        assert np.array_equal(returned[:, tile * 16 : tile * 16 + 16], expected)


@pytest.mark.parametrize("frame", [(8, 256), (256, 8), (4000, 130), (9, 9), (77, 1201)])
@pytest.mark.parametrize("size", [(64, 64), (8, 512), (512, 8)])
def test_extreme_frames(frame, size):
    returned = give_back(Image.new("RGB", size, (9, 99, 199)), frame)
    assert (returned.size, returned.getcolors()) == (frame, [(frame[0] * frame[1], (9, 99, 199))])


def test_a_smooth_picture_survives_both_ways():
    y, x = np.mgrid[:331, :593]
    ramp = np.stack([x * 255 / 592, y * 255 / 330, (x + y) * 255 / 922], -1)
    picture = Image.fromarray(ramp.round().astype(np.uint8))
    returned = np.asarray(give_back(fit(picture, paper_size(593, 331, 512)), (593, 331))).astype(int)
    inside = np.abs(returned - np.asarray(picture))[:, 40:-40]
    assert inside[8:-8].max() <= 1


# Tensors.


def levels() -> Image.Image:
    return Image.fromarray(np.arange(768, dtype=np.uint16).astype(np.uint8).reshape(16, 16, 3))


def test_to_tensor_is_the_originals_formula():
    other = noise(16, 16)
    tensor = to_tensor([levels(), other])
    assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == ((2, 3, 16, 16), torch.float32, True)
    for row, picture in zip(tensor, (levels(), other), strict=True):
        values = torch.tensor(np.array(picture)).float()
        assert torch.equal(row, (2 * values / 255 - 1).permute(2, 0, 1))
    assert (float(tensor.min()), float(tensor.max())) == (-1.0, 1.0)


def test_pixels_keep_their_place():
    picture = Image.new("RGB", (16, 8))
    picture.putpixel((5, 2), (255, 0, 128))
    tensor = to_tensor([picture])
    assert tensor.shape == (1, 3, 8, 16)
    assert tensor[0, :, 2, 5].tolist() == pytest.approx([1, -1, 128 / 127.5 - 1], abs=1e-6)
    assert to_images(tensor)[0].tobytes() == picture.tobytes()


@pytest.mark.parametrize(
    "batch",
    [[], [noise(16, 16), noise(16, 8)], [noise(16, 16).convert("L")], [noise(16, 16), noise(16, 16).convert("RGBA")]],
    ids=["empty", "sizes", "grey", "modes"],
)
def test_to_tensor_refuses_mixtures(batch):
    with pytest.raises(ImageError, match="RGB pictures of one size") as error:
        to_tensor(batch)
    one_sentence(error)


def test_every_level_is_the_number_nearest_to_it():
    """To the bit, whatever the device does with divisions: 0.1's formula on the host."""
    values = np.asarray(levels(), dtype=np.float32).transpose(2, 0, 1)[None]
    assert len(np.unique(values)) == 256
    assert (to_tensor([levels()]).numpy() == 2 * values / np.float32(255) - 1).all()
    assert (unit_pixels([levels()]).numpy() == values / np.float32(255)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_all_levels_survive_both_ways(dtype):
    pictures = [levels(), noise(16, 16)]
    back = to_images(to_tensor(pictures).to(dtype).to(memory_format=torch.channels_last).requires_grad_())
    assert [picture.tobytes() for picture in back] == [picture.tobytes() for picture in pictures]


@pytest.mark.parametrize(
    ("value", "expected"),
    [(-3.0, 0), (3.0, 255), (0.49 / 127.5 - 1, 0), (0.51 / 127.5 - 1, 1), (254.49 / 127.5 - 1, 254), (1.0, 255)],
)
def test_to_images_clamps_and_rounds(value, expected):
    (picture,) = to_images(torch.full((1, 3, 8, 8), value))
    assert picture.getcolors() == [(64, (expected,) * 3)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_counted(bad):
    pixels = torch.zeros(2, 3, 8, 8)
    pixels[1, 2, 3, :5] = bad
    with pytest.raises(ImageError, match="5 of 384 .*half-precision autoencoder") as error:
        to_images(pixels)
    one_sentence(error)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 4, 8, 8), (1, 8, 8, 3), (1, 1, 3, 8, 8)])
def test_to_images_refuses_other_shapes(shape):
    with pytest.raises(ImageError, match="batch, 3, height, width"):
        to_images(torch.zeros(shape))


# Files.

SETTINGS = {"instruction": "mach es „schöner“ 雪 🤖", "seed": 7, "text_cfg": 7.5, "sizes": [[1, 2]], "none": None}


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".jpg", ".jpeg", ".webp"])
def test_saved_pictures_carry_their_settings(tmp_path, suffix):
    path = tmp_path / "new" / "folder" / f"out{suffix}"
    picture = Image.new("RGB", (32, 24), (200, 100, 50))
    save_image(picture, path, SETTINGS)
    assert read_settings(path) == read_settings(str(path)) == SETTINGS
    opened = open_image(path)
    assert opened.size == (32, 24)
    assert np.abs(np.subtract(opened.getpixel((9, 9)), (200, 100, 50))).max() <= 3
    assert os.listdir(path.parent) == [path.name]


def test_png_is_exact_and_its_chunk_is_plain_json(tmp_path):
    picture = noise(33, 17)
    save_image(picture, tmp_path / "a.png", SETTINGS)
    with Image.open(tmp_path / "a.png") as stored:
        assert stored.tobytes() == picture.tobytes()
        assert json.loads(stored.text["ip2p"]) == SETTINGS


def test_a_profile_is_written_with_the_picture(tmp_path):
    picture = noise(16, 16)
    picture.info["icc_profile"] = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for name in ("a.png", "a.jpg", "a.webp"):
        save_image(picture, tmp_path / name)
        assert open_image(tmp_path / name).info == picture.info


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_no_settings(tmp_path, name):
    save_image(noise(16, 16), tmp_path / name)
    with pytest.raises(ImageError, match="carries no ip2p settings") as error:
        read_settings(tmp_path / name)
    assert name in one_sentence(error)


@pytest.mark.parametrize("description", ["a day at the sea", '{"other": 1}', "[1]", '{"ip2p": 3}'])
def test_a_foreign_description_is_no_settings(tmp_path, description):
    exif = Image.Exif()
    exif[0x010E] = description
    noise(16, 16).save(tmp_path / "a.jpg", exif=exif)
    with pytest.raises(ImageError, match="carries no ip2p settings"):
        read_settings(tmp_path / "a.jpg")


def test_settings_of_nothing(tmp_path):
    with pytest.raises(ImageError, match="does not exist"):
        read_settings(tmp_path / "missing.png")


@pytest.mark.parametrize("name", ["a.gif", "a", "a.png.bak", ".png"])
def test_unknown_suffix(tmp_path, name):
    with pytest.raises(ImageError, match=r"\.png, \.jpg, \.jpeg, \.webp") as error:
        save_image(noise(16, 16), tmp_path / name)
    one_sentence(error)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("broken", ["save", "fsync", "replace"])
def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, broken):
    path = tmp_path / "a.png"
    save_image(noise(16, 16), path)
    before = path.read_bytes()

    def fail(*arguments: object, **_: object) -> None:
        if broken == "save":
            arguments[1].write(b"half a picture")
        raise OSError(28, "No space left on device")

    owner = {"save": Image.Image, "fsync": os, "replace": Path}[broken]
    monkeypatch.setattr(owner, broken, fail)
    with pytest.raises(ImageError, match="No space left") as error:
        save_image(noise(32, 32), path)
    assert str(path) in one_sentence(error)
    assert os.listdir(tmp_path) == ["a.png"] and path.read_bytes() == before


def test_a_save_replaces_the_old_file(tmp_path):
    for seed in (1, 2):
        save_image(noise(16, 16, seed), tmp_path / "a.png", {"seed": seed})
    assert read_settings(tmp_path / "a.png") == {"seed": 2}
    assert open_image(tmp_path / "a.png").tobytes() == noise(16, 16, 2).tobytes()


def test_an_unusable_folder(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(ImageError, match="cannot be written") as error:
        save_image(noise(16, 16), tmp_path / "file" / "a.png")
    one_sentence(error)


def test_outputs_are_checked_before_the_work(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    for bad in ("a.gif", "a", "file/a.png"):
        with pytest.raises(ImageError) as error:
            check_output(tmp_path / bad)
        assert str(tmp_path / bad) in one_sentence(error)
    check_output(tmp_path / "new" / "a.png")
    assert sorted(os.listdir(tmp_path)) == ["file", "new"] and not os.listdir(tmp_path / "new")


def test_checking_an_output_keeps_the_old_file(tmp_path):
    (tmp_path / "a.png").write_bytes(b"old")
    check_output(tmp_path / "a.png")
    assert os.listdir(tmp_path) == ["a.png"] and (tmp_path / "a.png").read_bytes() == b"old"


def test_a_folder_is_not_overwritten(tmp_path):
    (tmp_path / "a.png").mkdir()
    with pytest.raises(ImageError, match="cannot be written"):
        save_image(noise(16, 16), tmp_path / "a.png")
    assert os.listdir(tmp_path) == ["a.png"]


def test_saved_files_have_ordinary_permissions(tmp_path):
    save_image(noise(16, 16), tmp_path / "a.png")
    (tmp_path / "plain").write_bytes(b"")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a.png", "plain")}
    assert len(modes) == 1


def test_settings_too_long_for_a_jpeg_are_an_error_not_a_loss(tmp_path):
    with pytest.raises(ImageError, match="cannot be written"):
        save_image(noise(16, 16), tmp_path / "a.jpg", {"text": "x" * 70000})
    assert not os.listdir(tmp_path)


# Strips.


def test_a_strip_shows_each_picture_unchanged_in_order():
    pictures = [noise(64, 64, 1), noise(96, 64, 2)]
    sheet = np.asarray(strip(pictures, ["before", "after"], height=64))
    gap = 4
    assert np.array_equal(sheet[gap : gap + 64, gap : gap + 64], np.asarray(pictures[0]))
    assert np.array_equal(sheet[gap : gap + 64, 64 + 2 * gap : 160 + 2 * gap], np.asarray(pictures[1]))
    assert sheet.shape[1] == 160 + 3 * gap


@pytest.mark.parametrize("caption", ["make it snow", "make it snow " * 20, "x" * 200])
def test_captions_stay_in_their_column(caption):
    pictures = [Image.new("RGB", (64, 64), RED)] * 3
    sheet = np.asarray(strip(pictures, ["", caption, ""], height=128)).astype(int)
    below = (sheet[8 + 128 :] < 128).all(-1)
    first, last = 128 + 2 * 8, 2 * 128 + 2 * 8
    assert below[:, first:last].sum() > 50
    assert not below[:, :first].any() and not below[:, last:].any()
    assert not below[-3:].any() and not below[:2].any()


def test_longer_captions_take_more_lines():
    picture = noise(64, 64)
    heights = [strip([picture], [text]).height for text in ("", "one", "word " * 20, "word " * 60)]
    assert heights == sorted(set(heights))


def test_a_strip_scales_to_its_height():
    pictures = [Image.new("RGB", (8, 8), RED), Image.new("RGB", (1024, 512), GREEN), Image.new("L", (16, 256), 0)]
    sheet = strip(pictures, ["a", "b", "c"], height=256)
    gap = 16
    assert sheet.getpixel((gap, gap)) == sheet.getpixel((gap + 255, gap + 255)) == RED
    assert sheet.getpixel((256 + 2 * gap, gap)) == sheet.getpixel((256 + 512 + 2 * gap - 1, gap + 255)) == GREEN
    narrow = 768 + 3 * gap + 96  # the middle of a column of three quarters of the height
    assert sheet.getpixel((narrow, gap + 100)) == BLACK
    assert sheet.getpixel((narrow - 20, gap + 100)) == WHITE


@pytest.mark.parametrize(
    ("side", "method"),
    [(16, Image.Resampling.BICUBIC), (65, Image.Resampling.LANCZOS), (300, Image.Resampling.LANCZOS)],
)
def test_small_pictures_are_enlarged_softly_and_large_ones_shrunk_sharply(side, method):
    picture = noise(side, side)
    shown = strip([picture], ["a"], height=64).crop((4, 4, 68, 68))
    assert shown.tobytes() == picture.resize((64, 64), method).tobytes()


@pytest.mark.parametrize(("count", "captions"), [(0, []), (1, []), (1, ["a", "b"])])
def test_a_strip_needs_a_caption_for_each_picture(count, captions):
    with pytest.raises(ConfigError, match=f"{count} pictures and {len(captions)} captions") as error:
        strip([noise(16, 16)] * count, captions)
    one_sentence(error)


def test_a_tiff_with_a_thumbnail_is_its_first_page(tmp_path):
    photo, thumbnail = noise(64, 48, 1), noise(16, 12, 2)
    photo.save(tmp_path / "a.tif", save_all=True, append_images=[thumbnail])
    assert open_image(tmp_path / "a.tif").tobytes() == photo.tobytes()
    photo.save(tmp_path / "pages.tif", save_all=True, append_images=[thumbnail, noise(64, 48, 3)])
    with pytest.raises(ImageError, match="3 frames"):
        open_image(tmp_path / "pages.tif")


@pytest.mark.parametrize("bits", [8, 16])
def test_a_clear_grey_or_colour_is_white(bits, tmp_path):
    """PNG's tRNS: the value that is clear, in the file's own depth."""
    step = 257 if bits == 16 else 1
    values = np.full((16, 16), 100 * step, dtype=np.uint16 if bits == 16 else np.uint8)
    values[:8] = 0
    Image.fromarray(values).save(tmp_path / "grey.png", transparency=0)
    grey = np.asarray(open_image(tmp_path / "grey.png"))
    assert (grey[:8] == 255).all() and (grey[8:] == 100).all()


def test_heic_is_read_with_its_extra(tmp_path, monkeypatch):
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    photo = Image.new("RGB", (64, 48), (200, 30, 30))
    photo.save(tmp_path / "a.heic", quality=95)
    opened = open_image(tmp_path / "a.heic")
    assert opened.size == (64, 48) and np.abs(np.asarray(opened).astype(int) - (200, 30, 30)).max() <= 6
    monkeypatch.setattr("ip2p_engine.images._readable", lambda: ("PNG", "JPEG"))
    with pytest.raises(ImageError, match="is HEIC, as phones write it; pip install pillow-heif"):
        open_image(tmp_path / "a.heic")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "I;16", "P"])
def test_bands_are_the_picture(mode, monkeypatch):
    """Large pictures are converted some rows at a time."""
    noise = np.random.default_rng(0).integers(0, 256, (50, 40, 4), dtype=np.uint8)
    picture = (
        Image.fromarray(noise[..., :2].copy().view(np.uint16)[..., 0])
        if mode == "I;16"
        else Image.fromarray(noise).convert(mode)
    )
    if mode == "P":
        picture.info["transparency"] = 3
    before = dict(picture.info)
    whole = open_image(picture)
    monkeypatch.setattr(images, "BAND", 7)
    assert np.array_equal(np.asarray(open_image(picture)), np.asarray(whole))
    assert picture.info == before


def test_a_digest_is_of_all_pixels_whatever_their_number_of_rows():
    values = np.random.default_rng(0).integers(0, 256, (2 * images.BAND + 9, 16, 3), dtype=np.uint8)
    picture = Image.fromarray(values)
    expected = hashlib.sha256(f"16x{len(values)} ".encode() + values.tobytes()).hexdigest()
    assert images.pixels_digest(picture) == expected
