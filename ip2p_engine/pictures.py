"""The pictures of an edit: opened and fitted before the network runs, given back at full size when asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from threading import BoundedSemaphore, Lock
from typing import TYPE_CHECKING, Any

from PIL import Image

from .images import (
    Picture,
    Size,
    fit,
    give_back,
    open_image,
    open_mask,
    pixel_count,
    pixels_digest,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["EditResult", "Fitted", "Opener", "area_pictures", "full_size", "opened", "whole_area"]

# Cores that this process may use; a container may have fewer than the machine. Not told on Windows and macOS.
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
# Full-size pictures that are opened or written at one time: memory does not grow with the threads that wait to, and on
# one core they take turns, as a loop would. Large ones take all places.
PLACES, LARGE = max(min(2, CORES), min(4, CORES // 2)), 40_000_000
_PLACES, _LARGE = BoundedSemaphore(PLACES), Lock()


@dataclass(frozen=True, kw_only=True)
class EditResult:
    """One edited picture and all that is needed to make it again."""

    edited: Image.Image | None
    """As the decoder gave it, at the size that was edited; None if nothing was."""
    picture: Picture
    """What was given to be edited."""
    size: tuple[int, int]
    """Of ``image``: the source's size, or the size that was edited at."""
    profile: bytes | None = None
    """The source's colour profile, in which the pixels are given."""
    mask: Picture | None = None
    """White where the picture could change; elsewhere it is the source."""
    seen: Image.Image | None = None
    """The source as it was edited, cropped and small; None if nothing was edited."""
    area: Image.Image | None = None
    """With auto_mask: where the instruction may act, grey, at the size that was edited."""
    round_trip: Image.Image | None = None
    """With detail: the source as the autoencoder gives it back, at the size that was edited."""
    instruction: str
    seed: int
    evaluations: int
    """Network evaluations that this picture took."""
    latent: Tensor | None
    """The clean latent (4, h, w), float32, as the decoder got it; None if nothing was edited."""
    settings: dict[str, Any]
    index: int = 0
    """Its place among the results that were asked for."""

    @property
    def source(self) -> Image.Image:
        """The picture that was edited, upright RGB; a file is opened again."""
        return opened(self.picture)

    @cached_property
    def image(self) -> Image.Image:
        """The edited picture, at the source's size unless ``restore_size`` is off; made when first asked for."""
        if self.edited is None:
            return self._own_source()
        if self.round_trip is self.mask is self.area is None:
            image = self._whole(self.edited, None)
        else:
            # Opened first: what decoding takes is free again before more is made of a large picture.
            source = self._own_source()
            masks = [] if self.mask is None else [self._framed(open_mask(self.mask, source.size))]
            masks += [] if self.area is None else [whole_area(self.area, self.size)]
            source = self._framed(source)
            image = self._whole(self.edited, source)
            for mask in masks[:-1]:
                image = Image.composite(image, source, mask)
            for mask in masks[-1:]:  # as composite, without a copy
                source.paste(image, mask=mask)
                image = source
        if self.profile:
            image.info["icc_profile"] = self.profile
        return image

    def _own_source(self) -> Image.Image:
        return self.picture.copy() if isinstance(self.picture, Image.Image) else self.source

    def _whole(self, edited: Image.Image, source: Image.Image | None) -> Image.Image:
        if self.round_trip is not None and source is not None:
            from .detail import with_detail

            return with_detail(self.round_trip, edited, source)
        return edited if self.size == edited.size else give_back(edited, self.size)

    def _framed(self, picture: Image.Image) -> Image.Image:
        """The source or its mask at the size of the result."""
        return picture if picture.size == self.size else fit(picture, self.size)


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A picture at its working size, and what has to be known of the original."""

    picture: Picture
    small: Image.Image | None
    size: tuple[int, int]
    profile: bytes | None
    digest: str
    mask: Picture | None = None
    small_mask: Image.Image | None = None


def area_pictures(area: Tensor) -> list[Image.Image]:
    """Areas (B, 1, h, w) as grey pictures with soft borders, 8 pixels a place."""
    height, width = area.shape[-2:]
    levels = (area[:, 0].float().cpu() * 255).round().byte().numpy()
    return [Image.fromarray(one).resize((8 * width, 8 * height), Image.Resampling.BILINEAR) for one in levels]


def whole_area(area: Image.Image, size: Size) -> Image.Image:
    """A grey picture at the edited size as a mask of the whole picture's."""
    return area if area.size == size else give_back(area, size)


@contextmanager
def full_size(pixels: int) -> Iterator[None]:
    """Wait for a place to open or write a full-size picture in; one of more than ``LARGE`` pixels is alone."""
    wanted = PLACES if pixels > LARGE else 1
    with _LARGE if wanted > 1 else nullcontext():  # two that collect places would wait for each other
        for _ in range(wanted):
            _PLACES.acquire()
    try:
        yield
    finally:
        for _ in range(wanted):
            _PLACES.release()


def opened(picture: Picture) -> Image.Image:
    """The picture itself where it is open already, else it is opened now."""
    return picture if isinstance(picture, Image.Image) else open_image(picture)


def _fitted(picture: Picture, mask: Picture | None, size: Size | None) -> Fitted:
    """Open and fit a picture, and keep the fitted one alone; size None: nothing is to be edited."""
    with full_size(pixel_count(picture)):
        whole = opened(picture)
        return Fitted(
            picture=picture,
            small=None if size is None else fit(whole, size),
            size=whole.size,
            profile=whole.info.get("icc_profile"),
            digest=pixels_digest(whole),
            mask=None if size is None else mask,
            small_mask=None if size is None or mask is None else fit(open_mask(mask, whole.size), size),
        )


class Opener:
    """Opens and fits pictures in threads, one batch ahead of the network."""

    def __init__(self, pictures: Sequence[Picture], masks: Mapping[int, Picture]) -> None:
        """``masks`` by the row of their picture."""
        self._pictures, self._masks = pictures, masks
        self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="ip2p-open")
        self._ahead: dict[tuple[int, Any], Future[Fitted]] = {}

    def __enter__(self) -> Opener:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def take(self, size: Size | None, rows: set[int], following: set[tuple[int, Size | None]]) -> dict[int, Any]:
        """A batch's pictures by row, as futures of Fitted; the following batch's (row, size) are begun."""
        now = {(row, size) for row in rows}
        known = self._ahead
        self._ahead = {key: known.get(key) or self._begin(*key) for key in sorted(now | following, key=str)}
        return {row: self._ahead[row, size] for row in sorted(rows)}

    def _begin(self, row: int, size: Size | None) -> Future[Fitted]:
        return self._pool.submit(_fitted, self._pictures[row], self._masks.get(row), size)
