"""Pictures side by side, with captions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from PIL import Image, ImageDraw, ImageFont

from .errors import ConfigError

__all__ = ["strip"]

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def strip(pictures: Iterable[Image.Image], captions: Sequence[str], *, height: int = 256) -> Image.Image:
    """Pictures side by side on white, each ``height`` pixels high, captions below; ConfigError if they do not pair."""
    shown = [_scaled(picture, height) for picture in pictures]
    if not shown or len(shown) != len(captions):
        raise ConfigError(f"a strip got {len(shown)} pictures and {len(captions)} captions; give one caption each")
    letter = max(11, round(height / 16))
    font, gap, line = ImageFont.load_default(letter), max(4, height // 16), round(letter * 1.35)
    columns = [max(picture.width, round(0.75 * height)) for picture in shown]
    texts = [_wrapped(caption, font, column) for caption, column in zip(captions, columns, strict=True)]
    bottom = gap + height + max(map(len, texts)) * line + gap + (gap // 2 if any(texts) else 0)
    sheet = Image.new("RGB", (sum(columns) + gap * (len(shown) + 1), bottom), "white")
    draw, x = ImageDraw.Draw(sheet), gap
    for picture, column, lines in zip(shown, columns, texts, strict=True):
        sheet.paste(picture, (x + (column - picture.width) // 2, gap))
        for row, words in enumerate(lines):
            place = (x + column / 2, gap + height + gap // 2 + row * line)
            draw.text(place, words, fill=(40, 40, 40), font=font, anchor="ma")
        x += column + gap
    return sheet


def _scaled(picture: Image.Image, height: int) -> Image.Image:
    method = Image.Resampling.LANCZOS if picture.height > height else Image.Resampling.BICUBIC
    picture = picture if picture.mode == "RGB" else picture.convert("RGB")
    return picture.resize((max(1, round(picture.width * height / picture.height)), height), method)


def _wrapped(caption: str, font: Font, width: int) -> list[str]:
    """The caption in lines of at most ``width`` pixels; a word that is longer is broken."""
    lines: list[str] = []
    for word in caption.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines
