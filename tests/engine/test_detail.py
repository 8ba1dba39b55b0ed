"""The source's detail: what is gained where an edit tones a picture, and nothing lost where it draws something new."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFilter

from ip2p_engine import detail
from ip2p_engine.detail import with_detail
from ip2p_engine.images import give_back

SIDES = [512, pytest.param(2048, marks=pytest.mark.slow)]
SHRUNK = 4  # the edit happens at a quarter of the side


def picture(values):
    return Image.fromarray((values.clip(0, 1) * 255).round().astype(np.uint8))


def levels(image):
    return np.asarray(image) / 255


@pytest.fixture(scope="module", params=SIDES)
def photo(request):
    """Noise of every scale, with discs of their own colour and contrast: sharp edges and fine texture."""
    random, full = np.random.default_rng(1), request.param
    values = np.zeros((full, full, 3))
    for power in range(2, full.bit_length()):
        side = 2**power
        grey, colour = random.standard_normal((side, side, 1)), random.standard_normal((side, side, 3))
        for channel, plane in enumerate(np.moveaxis((grey + 0.35 * colour).astype(np.float32), -1, 0)):
            values[..., channel] += np.asarray(Image.fromarray(plane).resize((full, full))) * 2.0 ** (-0.75 * power)
    y, x = np.mgrid[:full, :full] / full
    for _ in range(12):
        left, top, radius = random.random(3) * (1, 1, 0.2)
        inside = ((x - left) ** 2 + (y - top) ** 2 < radius**2)[..., None]
        values = np.where(inside, values * 0.5 + random.standard_normal(3) * 0.25, values)
    return (0.5 + 0.25 * values / values.std()).clip(0, 1)


def small(values):
    side = len(values) // SHRUNK
    return levels(picture(values).resize((side, side), Image.Resampling.LANCZOS))


def coded(values, seed):
    """As an autoencoder gives a picture back: softer, with some noise."""
    soft = levels(picture(values).filter(ImageFilter.GaussianBlur(0.7)))
    return picture(soft + np.random.default_rng(seed).standard_normal(soft.shape) * 0.008)


def grey(values):
    return (values @ (0.299, 0.587, 0.114))[..., None].repeat(3, 2)


def disc(values):
    full = len(values)
    y, x = np.mgrid[:full, :full] / full
    return (x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.2**2


def sketch(values):
    """Dark lines where the small picture has edges, which no colour transform gives."""
    plane = small(grey(values))[..., 0]
    down, across = np.gradient(plane)
    lines = (1 - 8 * np.hypot(down, across)).clip(0, 1)[..., None].repeat(3, 2)
    return levels(picture(lines).resize((len(values), len(values)), Image.Resampling.BICUBIC))


def gain(photo, truth, where=None):
    """Decibels by which the result is nearer to the truth than the enlarged edit."""
    edited, whole = coded(small(truth), 3), truth.shape[1::-1]
    results = (with_detail(coded(small(photo), 2), edited, picture(photo)), give_back(edited, whole))
    where = np.ones(whole, dtype=bool) if where is None else where
    ours, enlarged = (((levels(result) - truth)[where] ** 2).mean() for result in results)
    return 10 * np.log10(enlarged / ours)


@pytest.mark.parametrize(
    "tone",
    [
        lambda s: s**1.3 * (0.25, 0.3, 0.5),
        lambda s: (s * (1.15, 0.8, 0.55) + (0.1, 0.02, 0)).clip(0, 1),
        grey,
        lambda s: s * 0.45 + 0.5,
        lambda s: 1 - s,
    ],
    ids=["night", "sunset", "black and white", "fog", "negative"],
)
def test_a_tone_gains_six_decibels(photo, tone):
    assert gain(photo, tone(photo)) >= 6


@pytest.mark.parametrize("kind", ["flat", "textured"])
def test_a_new_object_keeps_its_own_pixels(photo, kind):
    new = np.array((0.8, 0.1, 0.1)) if kind == "flat" else photo[::-1, ::-1] * (0.9, 0.3, 0.3)
    inside = disc(photo)
    truth = np.where(inside[..., None], new, photo)
    assert gain(photo, truth, ~inside) >= 3
    assert gain(photo, truth, inside) >= -0.3


def test_drawn_lines_stay(photo):
    assert gain(photo, sketch(photo)) >= -0.3


def test_bands_and_crops_join(photo, monkeypatch):
    """A frame that was cropped to be edited; rows in bands are the rows of the whole."""
    source = picture(photo).crop((0, 0, 150, 350))
    seen = source.crop((0, 100, 150, 250)).resize((128, 128))
    edited = Image.eval(seen, lambda level: level // 2)
    monkeypatch.setattr(detail, "BAND", 100)
    banded = with_detail(seen, edited, source)
    monkeypatch.setattr(detail, "BAND", 10_000)
    whole = with_detail(seen, edited, source)
    assert banded.size == (150, 350)
    assert np.abs(np.asarray(banded).astype(int) - np.asarray(whole)).max() <= 1
    error = np.abs(np.asarray(banded)[100:250].astype(float) - np.asarray(source)[100:250] / 2)
    assert error.mean() < 3


@pytest.mark.parametrize(("opens", "holds"), [("always", "a tone"), ("never", "an object")])
def test_the_gate_does_both(photo, monkeypatch, opens, holds):
    """A gate that is always open loses what is new, and one that is always shut gains nothing."""
    monkeypatch.setattr(detail, "OPEN", 1e6 if opens == "always" else -2e-6)
    monkeypatch.setattr(detail, "SHUT", 2e6 if opens == "always" else -1e-6)
    inside = disc(photo)
    new = np.where(inside[..., None], photo[::-1, ::-1] * (0.9, 0.3, 0.3), photo)
    assert (gain(photo, grey(photo)) >= 6) == (holds == "a tone")
    assert (gain(photo, new, inside) >= -0.3) == (holds == "an object")
