"""docs/kinds.md: every kind of picture that goes in and every name that comes out, each of its rows run by the command.

python tests/engine/test_kinds.py writes the page's tables anew.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageDraw

from ip2p_engine import InstructPix2Pix, cli
from ip2p_engine import images as images_module
from ip2p_engine.commands import edit as edit_command

PAGE = Path(__file__).parents[2] / "docs" / "kinds.md"
SIZE = (64, 48)
COLOURS = ((200, 40, 40), (30, 90, 200), (40, 160, 60), (250, 250, 250))  # of the quarters, clear in the last
WHITE = (255, 255, 255)


def quarters(*colours):
    """Four plain quarters, so that a turned or mirrored picture is another one."""
    picture = Image.new("RGB", SIZE)
    draw = ImageDraw.Draw(picture)
    for number, colour in enumerate(colours):
        left, top = number % 2 * 32, number // 2 * 24
        draw.rectangle((left, top, left + 31, top + 23), fill=colour)
    return picture


PICTURE = quarters(*COLOURS)
GREY = PICTURE.convert("L")
CLEAR = PICTURE.convert("RGBA")
CLEAR.putalpha(quarters(*[WHITE] * 3, (0, 0, 0)).convert("L"))


@dataclass(frozen=True)
class Given:
    """A row of the first table: what is given, what becomes of it, and how it is made in a folder."""

    what: str
    does: str
    make: Callable[[Path], str | list[str]]
    becomes: Image.Image | None = None
    """What is read, if it is not PICTURE."""
    off: int = 2
    """By how many levels at most."""
    refused: str = ""
    pictures: int = 1


@dataclass(frozen=True)
class Out:
    """A row of the second table: what --out says, and what is written."""

    what: str
    does: str
    out: str
    wrote: str = ""
    """The file, from the working folder."""
    refused: str = ""
    before: Callable[[], object] = lambda: None
    windows: bool = False


def saved(name: str, picture: Image.Image = PICTURE, **options: object) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        picture.save(folder / name, **options)
        return str(folder / name)

    return make


def data(name: str, content: bytes | Callable[[], bytes]) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content())
        return str(folder / name)

    return make


def bytes_of(kind: str, picture: Image.Image = PICTURE, **options: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def turned(orientation: int, method: Image.Transpose) -> dict[str, object]:
    """How a picture is saved that a viewer turns back: stored by ``method``, with that EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return {"picture": PICTURE.transpose(method), "exif": exif.tobytes(), "quality": 95}


def sixteen() -> Image.Image:
    return Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257)


def clear_grey(folder: Path) -> str:
    sixteen().save(folder / "a.png", transparency=int(np.asarray(sixteen())[40, 60]))
    return str(folder / "a.png")


def tiff_pages(second: Image.Image, **tags: object) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        PICTURE.save(folder / "a.tif", save_all=True, append_images=[second], **tags)
        return str(folder / "a.tif")

    return make


def heic(folder: Path) -> str:
    pytest.importorskip("pillow_heif").register_heif_opener()
    PICTURE.save(folder / "a.heic", quality=95)
    return str(folder / "a.heic")


def p3() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def adobe(folder: Path) -> str:
    PICTURE.convert("CMYK").save(folder / "a.jpg", quality=95)
    return str(folder / "a.jpg")


def two(folder: Path, word: str) -> str:
    for name in ("a.png", "b.png"):
        PICTURE.save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return word


def home(folder: Path) -> str:
    PICTURE.save(folder / "a.png")
    os.environ["HOME"] = str(folder)
    return "~/a.png"


FLIP, TURN = Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose
SOFT = 12
GIVEN = (
    Given("PNG, 8-bit RGB", "read to the bit", saved("a.png"), off=0),
    Given("PNG with transparency", "laid on white", saved("a.png", CLEAR), quarters(*COLOURS[:3], WHITE)),
    Given("PNG of a palette", "RGB", saved("a.png", PICTURE.quantize(4)), off=3),
    Given(
        "PNG of a palette with a clear colour",
        "laid on white",
        saved("a.png", CLEAR.quantize(8)),
        quarters(*COLOURS[:3], WHITE),
        off=3,
    ),
    Given("PNG, 8-bit grey", "RGB", saved("a.png", GREY), GREY, off=0),
    Given("PNG, grey with transparency", "laid on white", saved("a.png", CLEAR.convert("LA")), GREY, off=6),
    Given("PNG, 16-bit grey", "scaled to 8 bits", saved("a.png", sixteen()), GREY, off=0),
    Given("PNG, 16-bit grey with a clear value (tRNS)", "scaled, that value white", clear_grey, GREY, off=6),
    Given(
        "PNG, 1 bit", "black and white", saved("a.png", PICTURE.convert("1", dither=0)), PICTURE.convert("1", dither=0)
    ),
    Given("PNG with a colour profile", "numbers kept, the profile goes along", saved("a.png", icc_profile=p3()), off=0),
    Given("JPEG", "read", saved("a.jpg", quality=95), off=SOFT),
    Given("JPEG, progressive", "read", saved("a.jpg", quality=95, progressive=True), off=SOFT),
    Given("JPEG, grey", "RGB", saved("a.jpg", GREY, quality=95), GREY, off=SOFT),
    Given("JPEG, CMYK", "converted, by its profile if it has one", adobe, off=SOFT),
    Given("JPEG, turned by EXIF (orientation 3)", "upright", saved("a.jpg", **turned(3, TURN.ROTATE_180)), off=SOFT),
    Given("JPEG, turned by EXIF (6)", "upright", saved("a.jpg", **turned(6, TURN.ROTATE_90)), off=SOFT),
    Given("JPEG, mirrored by EXIF (5)", "upright", saved("a.jpg", **turned(5, TURN.TRANSPOSE)), off=SOFT),
    Given("JPEG with broken EXIF", "as it is stored", saved("a.jpg", exif=b"Exif\0\0broken", quality=95), off=SOFT),
    Given(
        "JPEG of a phone with a preview (MPO)",
        "its first picture",
        saved("a.jpg", format="MPO", save_all=True, append_images=[PICTURE.transpose(FLIP)], quality=95),
        off=SOFT,
    ),
    Given(
        "JPEG, cut short", "refused", data("a.jpg", lambda: bytes_of("JPEG")[:-40]), refused="is damaged or cut short"
    ),
    Given("PNG, cut short", "refused", data("a.png", lambda: bytes_of("PNG")[:90]), refused="is damaged or cut short"),
    Given("WebP", "read", saved("a.webp", quality=95), off=SOFT),
    Given(
        "WebP, lossless with transparency",
        "laid on white",
        saved("a.webp", CLEAR, lossless=True),
        quarters(*COLOURS[:3], WHITE),
    ),
    Given(
        "WebP, animated",
        "refused",
        saved("a.webp", save_all=True, append_images=[PICTURE.transpose(FLIP)]),
        refused="holds 2 frames",
    ),
    Given("GIF", "RGB", saved("a.gif", PICTURE.quantize(4)), off=3),
    Given(
        "GIF, animated",
        "refused",
        saved("a.gif", save_all=True, append_images=[PICTURE.transpose(FLIP)]),
        refused="holds 2 frames",
    ),
    Given("BMP", "read to the bit", saved("a.bmp"), off=0),
    Given("TIFF", "read to the bit", saved("a.tif"), off=0),
    Given("TIFF, 16-bit grey, LZW", "scaled to 8 bits", saved("a.tif", sixteen(), compression="tiff_lzw"), GREY, off=0),
    Given("TIFF, CMYK", "converted", saved("a.tif", PICTURE.convert("CMYK")), off=SOFT),
    Given("TIFF with a thumbnail", "its first page", tiff_pages(PICTURE.resize((32, 24))), off=0),
    Given("TIFF of two pages", "refused", tiff_pages(PICTURE.transpose(FLIP)), refused="holds 2 frames"),
    Given("TIFF, floating point", "refused", saved("a.tif", GREY.convert("F")), refused="floating-point pixels"),
    Given("AVIF", "read", saved("a.avif", quality=95), off=SOFT),
    Given("PPM", "read to the bit", saved("a.ppm"), off=0),
    Given("JPEG 2000", "read", saved("a.jp2"), off=SOFT),
    Given("HEIC, as phones write it (extra `heic`)", "read", heic, off=SOFT),
    Given(
        "a JPEG called `.png`",
        "read: the content counts",
        data("a.png", lambda: bytes_of("JPEG", quality=95)),
        off=SOFT,
    ),
    Given("a PNG without a suffix", "read", data("picture", lambda: bytes_of("PNG")), off=0),
    Given("an empty file", "refused", data("a.png", b""), refused="is empty"),
    Given("a text called `.png`", "refused", data("a.png", b"no picture"), refused="not a picture in a known format"),
    Given("SVG, PSD, EPS, PDF", "refused", data("a.svg", b"<svg/>"), refused="not a picture in a known format"),
    Given("7 pixels a side", "refused", saved("a.png", PICTURE.resize((7, 64))), refused="at least 8 pixels a side"),
    Given(
        "a strip longer than 32 : 1", "refused", saved("a.png", PICTURE.resize((8, 265))), refused="longer than 32 : 1"
    ),
    Given("a name with `:` and `=`", "that file", saved("a:0.5=b.png"), off=0),
    Given("a name with `[1]` or `*`, that exists", "that file, no pattern", saved("a[1].png"), off=0),
    Given("a name with spaces, accents, Chinese", "that file", saved("Zoë à 雪.png"), off=0),
    Given("`~/a.png`", "from your home", home, off=0),
    Given("a folder", "its pictures by name", lambda folder: two(folder, str(folder)), off=0, pictures=2),
    Given("a pattern", "the files that fit", lambda folder: two(folder, f"{folder}/*.png"), off=0, pictures=2),
    Given(
        "a pattern in quotes, as Windows' shell leaves them",
        "the same",
        lambda folder: two(folder, f"'{folder}/*.png'"),
        off=0,
        pictures=2,
    ),
    Given("a pattern that fits nothing", "refused", lambda folder: f"{folder}/*.jpg", refused="fits no file"),
    Given("a file that is not there", "refused", lambda folder: f"{folder}/a.png", refused="does not exist"),
    Given("`file://` and other addresses", "a copy", lambda folder: Path(saved("a.png")(folder)).as_uri(), off=0),
)

LONG = "x" * 300
OUT = (
    Out(
        "a folder",
        "`NAME_edited_seed0.png` in it",
        "results",
        "results/a_edited_seed0.png",
        before=lambda: Path("results").mkdir(),
    ),
    Out("a folder that is not there", "made", "new/results", "new/results/a_edited_seed0.png"),
    Out("nothing", "here", "", "a_edited_seed0.png"),
    Out(
        "a folder where the name is taken",
        "a number is added",
        "",
        "a_edited_seed0_2.png",
        before=lambda: Path("a_edited_seed0.png").touch(),
    ),
    Out("`x.png`", "PNG", "x.png", "x.png"),
    Out("`X.PNG`", "PNG", "X.PNG", "X.PNG"),
    Out("`x.jpg`, `x.jpeg`", "JPEG, quality 95", "x.jpg", "x.jpg"),
    Out("`x.webp`", "WebP, quality 95", "x.webp", "x.webp"),
    Out(
        "`x.png`, which is there",
        "replaced, whole or not at all",
        "x.png",
        "x.png",
        before=lambda: Path("x.png").write_text("old"),
    ),
    Out("`new/x.png`", "the folder is made", "new/x.png", "new/x.png"),
    Out("`x.y.z.png`, spaces, accents, Chinese", "that file", "x.y Zoë 雪.png", "x.y Zoë 雪.png"),
    Out("`x`", "a folder", "x", "x/a_edited_seed0.png"),
    Out("`-`", "PNG on standard output", "-"),
    Out("`x.heic`", "refused before the work", "x.heic", refused="no suffix that can be written"),
    Out("`x.tiff`, `x.gif`, `x.svg`, `x.psd`", "refused", "x.tiff", refused="no suffix that can be written"),
    Out("the picture itself", "refused", "a.png", refused="is the picture to edit"),
    Out(
        "a folder called `x.png`",
        "results in it",
        "x.png",
        "x.png/a_edited_seed0.png",
        before=lambda: Path("x.png").mkdir(),
    ),
    Out("a path through a file", "refused", "a.png/x.png", refused="cannot be written"),
    Out("a name of 300 letters", "refused before the work", f"{LONG}.png", refused="cannot be written"),
    Out(
        "`s3://...`, `https://...`",
        "refused: copy it there afterwards",
        "s3://bucket/x.png",
        refused="lies in shared storage",
    ),
    Out(
        "`NUL.png`, `CON`, `aux.jpg` on Windows",
        "refused: they are devices",
        "NUL.png",
        refused="Windows cannot write",
        windows=True,
    ),
    Out(
        "`x.`, `x ` on Windows", "refused: it drops the end", "results. ", refused="Windows cannot write", windows=True
    ),
    Out(
        "`a:b.png`, `a?.png` on Windows",
        "refused: a stream, a pattern",
        "a:b.png",
        refused="Windows cannot write",
        windows=True,
    ),
)


@pytest.fixture(scope="module")
def untrained(tiny_pair_model):
    return InstructPix2Pix(tiny_pair_model(in_channels=8))


@pytest.fixture
def run(untrained, tmp_path, monkeypatch, capfdbinary):
    """The command on words, in a folder of its own: (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(edit_command, "load_editor", lambda options: untrained)

    def go(*words: str) -> tuple[int, bytes, str]:
        try:
            code = cli.main(["edit", *words, "--steps", "1"])
        except SystemExit as end:  # argparse's, for a value that is none
            code = int(end.code or 0)
        said = capfdbinary.readouterr()
        return code, said.out, said.err.decode()

    return go


def near(picture: Image.Image, expected: Image.Image, off: int) -> bool:
    """Whether the middles of the quarters are the expected colours."""
    middles = [(16 + x * 32, 12 + y * 24) for y in range(2) for x in range(2)]
    pairs = ((picture.convert("RGB").getpixel(place), expected.convert("RGB").getpixel(place)) for place in middles)
    return all(abs(a - b) <= off for one, other in pairs for a, b in zip(one, other, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("row", GIVEN, ids=lambda row: row.what)
def test_what_goes_in(row, run, tmp_path):
    """By an empty instruction, which gives the picture back as it was read, and by one that edits it."""
    (tmp_path / "given").mkdir()
    word = row.make(tmp_path / "given")
    code, _, said = run(word, "--instruction", " ", "make it snow", "--out", "out")
    written = sorted((tmp_path / "out").iterdir()) if (tmp_path / "out").exists() else []
    if row.refused:
        assert (code, written) == (2, []) and row.refused in said and "Traceback" not in said
        return
    assert code == 0, said
    back = [Image.open(path) for path in written if "_edited_1_" in path.name]
    edited = [Image.open(path) for path in written if "_edited_2_" in path.name]
    assert len(back) == len(edited) == row.pictures
    assert all(picture.size == SIZE and picture.mode == "RGB" for picture in (*back, *edited))
    assert all(near(picture, row.becomes or PICTURE, row.off) for picture in back)


@pytest.mark.slow
@pytest.mark.parametrize("row", OUT, ids=lambda row: row.what)
def test_what_comes_out(row, run, tmp_path, monkeypatch):
    monkeypatch.setattr(images_module, "WINDOWS", row.windows)
    PICTURE.save("a.png")
    row.before()
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    code, out, said = run("a.png", "--instruction", "make it snow", *(["--out", row.out] if row.out else []))
    new = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    if row.refused:
        assert (code, new) == (2, set()) and row.refused in said and "Traceback" not in said
    elif row.out == "-":
        assert (code, new) == (0, set()) and Image.open(io.BytesIO(out)).format == "PNG"
    else:
        assert code == 0 and new | before >= {tmp_path / row.wrote}
        kind = {".jpg": "JPEG", ".webp": "WEBP"}.get(Path(row.wrote).suffix, "PNG")
        picture = Image.open(tmp_path / row.wrote)
        assert (picture.format, picture.size) == (kind, SIZE)
        assert out.decode().strip() == row.wrote


def tables() -> str:
    given = [f"| {row.what} | {row.does} |" for row in GIVEN]
    out = [f"| {row.what} | {row.does} |" for row in OUT]
    head = ["| given | what becomes of it |", "|---|---|"]
    return "\n".join([*head, *given, "", "| `--out` | what is written |", "|---|---|", *out])


def test_the_page_has_every_row():
    assert len(GIVEN) >= 40 and len(OUT) >= 20
    assert tables() in PAGE.read_text(encoding="utf-8")


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(text[: text.index("| given |")] + tables() + "\n", encoding="utf-8")
    sys.stdout.write(f"{len(GIVEN)} kinds of pictures, {len(OUT)} names\n")
