"""What a checkpoint recommends, changed where it lies: its weights stay as they are, to the bit."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError
from ..files import disk_errors, whole_file
from .read import SAFE_SUFFIXES
from .recognise import CONFIG_FILE, CONFIG_KEY
from .source import EMBEDDED, open_bundle
from .spec import Bundle, spec_to_json

__all__ = ["check_card", "write_card"]


def check_card(source: str | Path) -> Path:
    """The path of a checkpoint whose card can be written; raises CheckpointError for another."""
    path = Path(source).expanduser()
    if source in EMBEDDED or not path.exists():
        raise CheckpointError(f"{source} is no checkpoint of your own on this disk; ip2p convert writes a copy that is")
    folder = path.is_dir() and (path / "model_index.json").is_file()
    if not folder and (path.is_dir() or path.suffix.lower() not in SAFE_SUFFIXES):
        raise CheckpointError(
            f"{path} is neither a .safetensors file nor a diffusers folder; ip2p convert makes it one of the two"
        )
    return path


def write_card(source: str | Path, values: Mapping[str, Any]) -> Path:
    """Write fields of ModelSpec, such as ``text_cfg`` and ``steps``, into a .safetensors file's header or a folder.

    The file is whole before and after. Raises CheckpointError for other layouts and for values that no spec takes.
    """
    path = check_card(source)
    bundle = open_bundle(path, header_only=True)
    try:
        spec = replace(bundle.spec, **values)
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{path} cannot recommend {dict(values)}: {error}") from error
    with disk_errors(path, "written", CheckpointError):
        if path.is_dir():
            with whole_file(path / CONFIG_FILE) as stream:
                stream.write((spec_to_json(spec) + "\n").encode())
        else:
            _with_metadata(path, {CONFIG_KEY: spec_to_json(spec, _architecture(bundle))})
    return path


def _architecture(bundle: Bundle) -> dict[str, Any]:
    """The networks' configurations, which shapes alone may not tell."""
    autoencoder = {} if bundle.autoencoder is None else {"autoencoder": dict(bundle.autoencoder.config)}
    return {
        "unet": dict(bundle.unet.config),
        "text_encoders": [dict(part.config) for part in bundle.text_encoders],
        **autoencoder,
    }


def _with_metadata(path: Path, added: Mapping[str, str]) -> None:
    """Rewrite a safetensors file with more in its header; the tensors are copied as they are."""
    with path.open("rb") as old:
        header = json.loads(old.read(struct.unpack("<Q", old.read(8))[0]))
        header["__metadata__"] = {**header.get("__metadata__", {}), **added}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with whole_file(path) as new:
            new.write(struct.pack("<Q", len(text)) + text)
            shutil.copyfileobj(old, new, 1 << 20)
