"""From what a user writes to a checkpoint taken apart: embedded models, files, folders, Hugging Face ids."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import CheckpointError
from .folder import bundle_of_folder, choose_files
from .parts import Bundle
from .read import WEIGHT_SUFFIXES, read_header, read_weights
from .single_file import bundle_of_file

__all__ = ["EMBEDDED", "open_bundle"]

EMBEDDED_FOLDER = Path(__file__).parent.parent / "scenes" / "embedded"
EMBEDDED = {"embedded": "unet", "embedded-sd": "unet_text_to_image"}
HUB = "hf://"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def open_bundle(
    source: str | Path,
    *,
    weights: str = "ema",
    text_heads: int | None = None,
    prediction: str | None = None,
    header_only: bool = False,
) -> Bundle:
    """Take apart "embedded", "embedded-sd", a file, a folder, or a hub id (owner/name, hf://owner/name/file).

    Raises CheckpointError for a source that does not exist or is no checkpoint.
    """
    if weights not in ("ema", "raw"):
        raise CheckpointError(f"weights is {weights!r}; choose ema (averaged, the paper's choice) or raw")
    path = EMBEDDED_FOLDER if source in EMBEDDED else _local_path(str(source), weights)
    options = {"weights": weights, "text_heads": text_heads, "prediction": prediction}
    if path.is_dir():
        unet_folder = EMBEDDED.get(str(source), "unet")
        return bundle_of_folder(path, unet_folder=unet_folder, header_only=header_only, **options)  # type: ignore[arg-type]
    return bundle_of_file(read_header(path) if header_only else read_weights(path), **options)  # type: ignore[arg-type]


def _local_path(source: str, weights: str) -> Path:
    """An existing path, or what the hub gives: bare owner/name, or with hf:// also one file of a repository."""
    path = Path(source).expanduser()
    if path.exists():
        return path
    explicit = source.startswith(HUB)
    owner, name, *rest = [*source.removeprefix(HUB).split("/", 2), "", ""][:3]
    may_be_local = path.suffix.lower() in WEIGHT_SUFFIXES or bool(rest[0]) or Path(owner).exists()
    if not HUB_ID.fullmatch(f"{owner}/{name}") or (may_be_local and not explicit):
        raise CheckpointError(f"{source} does not exist; give a checkpoint file, a diffusers folder or a hub id")
    return _download(f"{owner}/{name}", rest[0], weights)


def _download(repository: str, file: str, weights: str) -> Path:
    """The repository's needed files, from the hub or its local cache; nothing is fetched twice."""
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        if file:
            return Path(hf_hub_download(repository, file))
        try:
            names = HfApi().list_repo_files(repository)
        except (OfflineModeIsEnabled, OSError):
            return Path(snapshot_download(repository, local_files_only=True))
        return Path(snapshot_download(repository, allow_patterns=choose_files(names, weights=weights)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{repository} is no local path and the hub does not give it ({reason}); "
            "check the spelling, log in, or give a downloaded file"
        ) from error
