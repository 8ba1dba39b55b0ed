"""From what a user writes to a checkpoint taken apart: embedded models, files, folders, URLs, Hugging Face ids."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, first_line
from ..files import disk_errors, is_url, locked, public_name, reason_of, whole_folder
from .download import (
    A_DAY,
    CACHE_VARIABLE,
    bring,
    cache,
    check_room,
    download,
    fetched,
    pour,
    size_of,
    snapshot,
    storage_of,
)
from .published import EMBEDDED_MODELS, PUBLISHED, Published, published
from .read import WEIGHT_SUFFIXES, read_header, read_weights
from .recognise import EMBEDDED_FOLDER, PHOTOS_FOLDER, bundle_of_file, bundle_of_folder, choose_files
from .spec import Bundle
from .training_run import RUN, RunStep, base_of, bundle_of_step, find_step

__all__ = [
    "CACHE_VARIABLE",
    "EMBEDDED",
    "fetch",
    "fetch_published",
    "local_copy",
    "open_bundle",
    "readable",
]

log = logging.getLogger(__name__)
HOMES = (EMBEDDED_FOLDER / "unet", EMBEDDED_FOLDER / "unet_text_to_image", PHOTOS_FOLDER / "unet")
EMBEDDED = dict(zip(EMBEDDED_MODELS, HOMES, strict=True))
"""Where the UNets of the models lie that are part of the engine."""
HUB = "hf://"
HUB_SECONDS = 10
SHOWN = 200  # characters of a name
# What a file that is not as it should be makes Python, numpy and torch raise.
STRANGE = (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def open_bundle(
    source: str | Path,
    *,
    weights: str = "ema",
    text_heads: int | None = None,
    prediction: str | None = None,
    header_only: bool = False,
    base: str | Path | None = None,
) -> Bundle:
    """Take apart an embedded model by its name, a file, a folder, a hub id (owner/name, hf://owner/name/file) or a URL.

    Of a training run (its folder, RUN@STEP, or a step's file) it is the UNet of a step, with the other networks of
    ``base``, or of what the run began with. Raises CheckpointError for a source that is missing or none of these.
    """
    if weights not in ("ema", "raw"):
        raise CheckpointError(f"weights is {weights!r}; choose ema (averaged, the paper's choice) or raw")
    options: dict[str, Any] = {"weights": weights, "text_heads": text_heads, "prediction": prediction}
    with readable(str(source)):
        step = None if source in EMBEDDED else find_step(str(source), weights)
        if step is not None and not step.exported:
            return _bundle_of_run(step, base, weights, header_only=header_only)
        source = step.file if step is not None else source
        known = None if Path(source).expanduser().exists() else published(str(source))
        own = EMBEDDED.get(str(source))
        path = own.parent if own else local_copy(str(source), weights)
        if path.is_dir():
            unet_folder = own.name if own else "unet"
            bundle = bundle_of_folder(path, unet_folder=unet_folder, header_only=header_only, **options)
        else:
            bundle = bundle_of_file(read_header(path) if header_only else read_weights(path), **options)
        return replace(bundle, spec=replace(bundle.spec, **known.recommends)) if known else bundle


def _bundle_of_run(step: RunStep, base: str | Path | None, weights: str, *, header_only: bool) -> Bundle:
    origin = base_of(step.about) if base is None else base
    try:
        giver = open_bundle(origin, header_only=header_only)
    except CheckpointError as error:
        raise CheckpointError(
            f"{step.folder} was trained from {public_name(origin)}, which gives the other networks and cannot be "
            f"opened ({error}); name it as the `base`"
        ) from error
    return bundle_of_step(step, giver, weights, header_only=header_only)


def fetch_published(name: str) -> Path:
    """Bring a checkpoint of the table here, or the rest of one; returns where it lies. Raises CheckpointError."""
    known = published(name)
    if known is None:
        names = ", ".join(one.name for one in PUBLISHED)
        raise CheckpointError(f"{name} is not in the table of published checkpoints; choose one of {names}")
    return _published_path(known, "ema")


def _published_path(known: Published, weights: str) -> Path:
    """Where it lies, brought here if it does not."""
    here = fetched(known) if known.file or known.addresses or weights == "ema" else None
    if here is not None:
        return here
    try:
        if known.addresses:
            with _readable_address(known.page):
                return download(known)
        return _download(known.repository, known.file, weights)
    except CheckpointError as error:
        if known.gated:
            raise CheckpointError(f"{error}; its licence has to be accepted at {known.page} first") from error
        raise


@contextmanager
def readable(source: str) -> Iterator[None]:
    """Whatever else is wrong with a checkpoint, as one sentence."""
    name = public_name(source)[:SHOWN]
    try:
        with disk_errors(Path(name), "read", CheckpointError):
            yield
    except STRANGE as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise CheckpointError(f"{name} is damaged or no checkpoint that we know ({reason}); get it again") from error


def local_copy(source: str, weights: str) -> Path:
    """An existing path, a URL's copy, or what the hub gives: owner/name, or with hf:// also one file of it."""
    path = Path(source).expanduser()
    if not source.strip():
        raise CheckpointError("the checkpoint's name is empty; give a checkpoint file, a diffusers folder or a hub id")
    if path.exists():
        return path
    if is_url(source):
        return fetch(source, weights)
    known = published(source)
    if known is not None:
        return _published_path(known, weights)
    explicit = source.startswith(HUB)
    owner, name, *rest = [*source.removeprefix(HUB).split("/", 2), "", ""][:3]
    may_be_local = path.suffix.lower() in WEIGHT_SUFFIXES or bool(rest[0]) or Path(owner).exists()
    if not HUB_ID.fullmatch(f"{owner}/{name}") or (may_be_local and not explicit):
        raise CheckpointError(f"{source} does not exist; give a checkpoint file, a diffusers folder or a hub id")
    return _download(f"{owner}/{name}", rest[0], weights)


def _download(repository: str, file: str, weights: str) -> Path:
    """The repository's needed files, from the hub or its local cache; nothing is fetched twice."""
    try:
        return _fetch(repository, file, weights)
    except CheckpointError:
        raise
    except Exception as error:  # the client raises its own errors, and requests' or httpx's by its version
        reason = first_line(error)
        raise CheckpointError(
            f"{repository} is no local path and the hub does not give it ({reason}); "
            "check the spelling, log in, or give a downloaded file"
        ) from error


def _fetch(repository: str, file: str, weights: str) -> Path:
    """One named file, a pipeline's folder, or the only file of a repository without one."""
    from huggingface_hub import hf_hub_download, snapshot_download

    if file:
        bring(repository, file)
        return Path(hf_hub_download(repository, file))
    names, cached = _listing(repository)
    chosen = choose_files(names, weights=weights)
    large = [name for name in chosen if name.endswith(WEIGHT_SUFFIXES)]
    only = "" if large else _only_file(repository, names)
    if cached:
        return cached / only
    for name in large or [only]:
        bring(repository, name)
    return Path(hf_hub_download(repository, only) if only else snapshot_download(repository, allow_patterns=chosen))


def _listing(repository: str) -> tuple[list[str], Path | None]:
    """(file names, None) as the hub says, or without a connection (names, folder) of what was downloaded before."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        said = HfApi().model_info(repository, timeout=HUB_SECONDS)
        return [sibling.rfilename for sibling in said.siblings or ()], None
    except HfHubHTTPError:
        raise
    except Exception:  # no connection, or offline by choice
        cached = snapshot(repository)
        if cached is None:
            raise
        return [path.relative_to(cached).as_posix() for path in cached.rglob("*") if path.is_file()], cached


def _only_file(repository: str, names: list[str]) -> str:
    """The only file of weights; of a training run that was pushed its average, beside what it goes on from."""
    if RUN in names and (averaged := next((n for n in ("ema.safetensors", "raw.safetensors") if n in names), None)):
        return averaged
    files = sorted(name for name in names if name.lower().endswith(WEIGHT_SUFFIXES))
    if len(files) != 1:
        holds = f"the files {', '.join(files[:4])}" if files else "no weights"
        advice = f"name one, e.g. {HUB}{repository}/{files[0]}" if files else "give another one"
        raise CheckpointError(f"{repository} has no pipeline and {holds}; {advice}")
    return files[0]


def fetch(url: str, weights: str) -> Path:
    """A local copy of a file, or of what loading needs of a diffusers folder; copied again only if it has changed.

    Copies lie in ``$IP2P_CACHE``, or ~/.cache/instruct-pix2pix. Raises CheckpointError for an address that cannot be
    read.
    """
    with _readable_address(url):
        return _copy_here(url, public_name(url), weights)


@contextmanager
def _readable_address(url: str) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # each kind of storage raises its own
        advice = "check the address and your access to it, or give a downloaded file"
        raise CheckpointError(f"{public_name(url)} cannot be read ({reason_of(error, url)}); {advice}") from error


def _copy_here(url: str, name: str, weights: str) -> Path:
    storage, path = storage_of(url)
    alone = Path(name).name if storage.isfile(path) else ""
    files = {alone: path} if alone else _folder(storage, path, weights)
    if not files:
        raise CheckpointError(
            f"{name} is not there or holds no checkpoint; give the address of a file or of a diffusers folder"
        )
    state = "\n".join([name, *(f"{part} {storage.ukey(file)}" for part, file in sorted(files.items()))])
    target = cache() / hashlib.sha256(state.encode()).hexdigest()[:32]
    refusal = f"another process has been copying {name} for a day; end it"
    with locked(target.with_suffix(".lock"), refusal, CheckpointError, wait=A_DAY):
        if not target.exists():
            log.info("copying %s", name)
            _copy(storage, files, target)
    return target / alone


def _folder(storage: Any, path: str, weights: str) -> dict[str, str]:
    """{name within the folder: path} of what loading a diffusers folder needs."""
    found = {file.removeprefix(path.rstrip("/") + "/"): file for file in storage.find(path)}
    return {name: found[name] for name in choose_files(found, weights=weights)}


def _copy(storage: Any, files: dict[str, str], target: Path) -> None:
    """All files, or none."""
    with whole_folder(target) as new:
        sizes = {name: size_of(storage, file, file) for name, file in files.items()}
        check_room(sum(sizes.values()), target.parent)
        for name, file in files.items():
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            with (new / name).open("wb") as stream:
                pour(storage, file, stream, 0, sizes[name], lambda: None)
                if stream.tell() != sizes[name]:
                    raise CheckpointError(f"{name} broke off at {stream.tell():,} of {sizes[name]:,} bytes; try again")
