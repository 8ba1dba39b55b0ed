"""``ip2p edit --like`` and ``--verify``: a result made again from the settings that it carries."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..errors import ConfigError, ImageError, first_line
from ..images import open_image, pixels_digest, read_settings, save_image
from ..progress import write_note
from .options import DTYPES

__all__ = ["Again", "read_again", "typed_options", "verify"]

# Settings name no address and no path of this machine: those of a stranger would lead there.
OF_THE_HUB = re.compile(r"(hf://)?[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)+")
# What a difference of settings means, by the names of the settings.
SOURCE = ("source_sha256", "mask", "control.image_sha256")
CHECKPOINT = ("checkpoint_digest", "weights", "loras", "vae.digest", "embeddings", "control.digest")
VERSIONS = ("ip2p_engine", "torch", "device", "dtype")
PLACES = ("checkpoint", "base", "source", "vae.name", "control.name", "control.image", "edited_at")
SINCE = ("source_sha256", "checkpoint_digest")  # which ip2p 0.1.0 did not write


def typed_options(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> dict[str, Any]:
    """The options of a command that stand on its line, without what is theirs by default."""
    arguments = arguments[arguments.index(parser.prog.split()[-1]) + 1 :]
    kept = [(action, action.default) for action in parser._actions]
    try:
        for action, _ in kept:
            action.default = argparse.SUPPRESS if action.dest == "help" else None
        found = vars(parser.parse_args(arguments))
    finally:
        for action, default in kept:
            action.default = default
    return {name: value for name, value in found.items() if value not in (None, []) and name not in parser._defaults}


@dataclass(frozen=True, kw_only=True)
class Again:
    """A result, what it says of itself, and how to make it again."""

    path: Path
    settings: dict[str, Any]
    typed: dict[str, Any]
    options: argparse.Namespace
    """As if the settings had been typed, but for what was."""
    config: Any

    @property
    def lacking(self) -> list[str]:
        """What its settings do not say, as those of 0.1.0."""
        return [name for name in SINCE if name not in self.settings]

    def compare(self, row: dict[str, Any]) -> None:
        """Say on stderr if what should be the same is not; ``row`` holds the settings of the new result."""
        digest = self.settings.get("checkpoint_digest")
        same_type = self.settings.get("dtype") == row["dtype"]
        if digest and same_type and digest != row["checkpoint_digest"] and "checkpoint" not in self.typed:
            write_note(f"ip2p: the weights of {row['checkpoint']} are not those that {self.path.name} was made with")
        if self.lacking:
            missing = " and ".join(self.lacking)
            write_note(f"ip2p: {self.path.name} does not say {missing}; whether they are the same is not known")


def read_again(path: Path, options: argparse.Namespace, typed: dict[str, Any]) -> Again:
    """A result with its source, checkpoint and the others found: as typed, or by name beside it or here.

    Raises ImageError for a picture without settings, ConfigError for what is not found or is another than it was.
    """
    settings = read_settings(path)
    if not isinstance(settings.get("instruction"), str) or type(settings.get("seed")) is not int:
        raise ImageError(f"{path} carries settings of no edit; give a picture that ip2p edit wrote")
    try:
        found = _Finder(path, settings).all(typed)
    except (AttributeError, LookupError, TypeError) as error:
        raise ImageError(f"{path} carries settings that no edit has ({first_line(error)}); get it again") from error
    values = {**vars(options), **found, **typed}
    return Again(
        path=path, settings=settings, typed=typed, options=argparse.Namespace(**values), config=_config(settings, typed)
    )


def _config(settings: dict[str, Any], typed: dict[str, Any]) -> Any:
    """The edit's settings, and what was typed instead; a setting that a result lacks has its old value."""
    from ..edit import EditConfig

    names = {field.name for field in fields(EditConfig)}
    said = {name: value for name, value in settings.items() if name in names and value is not None}
    if "size" in typed:
        said.pop("resolution", None)
    said |= {name: value for name, value in typed.items() if name in names}
    said = {name: tuple(value) if isinstance(value, list) else value for name, value in said.items()}
    try:
        return EditConfig(**{"sampler": "euler_ancestral", "schedule": "model", **said})
    except TypeError as error:
        raise ConfigError(f"its settings cannot be used ({error}); leave --like and --verify out") from error


class _Finder:
    """Where what settings call by name lies now."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path, self._settings = path, settings

    def all(self, typed: dict[str, Any]) -> dict[str, Any]:
        """The options that the settings mean; what was typed is not looked for."""
        said = self._settings
        found: dict[str, Any] = {
            "instruction": [said["instruction"]],
            "seed": said["seed"],
            "seeds": 1,
            "weights": "raw" if said.get("weights") == "raw" else "ema",
            **self._device(),
        }
        if "images" not in typed:
            found["images"] = [self._source()]
        if "checkpoint" not in typed:
            found["checkpoint"] = self._checkpoint(said.get("checkpoint"), "checkpoint")
            found["base"] = self._checkpoint(said["base"], "base") if said.get("base") else None
        if "lora" not in typed:
            found["lora"] = [f"{self._file(one['name'], 'lora')}:{one['weight']}" for one in said.get("loras") or []]
        if "embedding" not in typed:
            found["embedding"] = [self._file(one["name"], "embedding") for one in said.get("embeddings") or []]
        if "vae" not in typed and said.get("vae"):
            found["vae"] = self._checkpoint(said["vae"]["name"], "vae")
        control = said.get("control") or {}
        if "control" not in typed and control:
            found["control"] = self._checkpoint(control["name"], "control")
        if "control_image" not in typed and control:
            found["control_image"] = Path(self._file(control["image"], "control-image"))
        if "mask" not in typed and said.get("mask"):
            found["mask"] = Path(self._file(said["mask"], "mask"))
        return found

    def _device(self) -> dict[str, Any]:
        """The device and the type, where there is such a device; elsewhere what is usual here."""
        from ..devices import usable_device

        try:
            usable_device(self._settings.get("device"))
        except ConfigError:
            return {}
        said = self._settings.get("dtype")
        return {"device": self._settings.get("device"), "dtype": said if said in DTYPES else None}

    def _source(self) -> str:
        place = self._file(self._settings.get("source"), "IMAGE")
        expected = self._settings.get("source_sha256")
        if expected and pixels_digest(open_image(place)) != expected:
            raise ConfigError(
                f"{place} has the name of the source of {self._path.name} and other pixels; name the right picture, "
                "or this one to edit it all the same"
            )
        return place

    def _checkpoint(self, name: Any, option: str) -> str:
        """A published name or an id of the hub as it is, a file beside the result or here."""
        from ..checkpoint.published import EMBEDDED_MODELS, published

        if isinstance(name, str) and (name in EMBEDDED_MODELS or published(name) or OF_THE_HUB.fullmatch(name)):
            return name
        return self._file(name, option)

    def _file(self, name: Any, option: str) -> str:
        flag = option if option.isupper() else f"--{option}"
        if isinstance(name, str) and Path(name).name == name:
            for folder in (self._path.parent, Path()):
                if (folder / name).exists():
                    return str(folder / name)
        what = f"{name!r}, which is neither beside it nor here" if isinstance(name, str) else "a picture without a name"
        raise ConfigError(f"{self._path.name} was made with {what}; give it as {flag}")


def verify(again: Again, editor: Any, *, as_json: bool) -> int:
    """Make a result again, say whether it comes out equal and what differs; 0 if it does, else 1."""
    options, source = again.options, again.options.images
    if len(source) != 1:
        raise ConfigError(f"--verify makes one picture, and {len(source)} are given; name its source alone")
    mask = None if options.mask is None or again.config.auto_mask else options.mask
    (made,) = editor.edit(
        str(source[0]),
        options.instruction,
        seeds=options.seed,
        masks=mask,
        control_images=options.control_image,
        config=again.config,
    )
    share, most = _distance(again.path, made)
    found = _differing(again.settings, made.settings)
    equal = most == 0
    report = {"file": str(again.path), "equal": equal, "largest": most, "share": share, "differs": found}
    report |= {"lacking": again.lacking} if again.lacking else {}
    sys.stdout.write((json.dumps(report) if as_json else _sentence(again, report)) + "\n")
    return 0 if equal else 1


def _distance(path: Path, made: Any) -> tuple[float, int]:
    """(share of the pixels, largest difference in levels) of a file and a picture written in its own format."""
    import numpy as np

    with TemporaryDirectory(prefix="ip2p-") as folder:
        written = save_image(made.image, Path(folder) / f"again{path.suffix.lower()}", made.settings)
        ours, theirs = (np.asarray(open_image(one)).astype(int) for one in (written, path))
    if ours.shape != theirs.shape:
        return 1.0, 255
    off = np.abs(ours - theirs).max(-1)
    return float((off > 0).mean()), int(off.max())


def _differing(said: dict[str, Any], now: dict[str, Any]) -> dict[str, list[str]]:
    """{source, checkpoint, settings, versions: the settings that differ}, of those that both have."""
    said, now = _flat(said), _flat(now)
    names = [name for name in said if name in now and name not in PLACES and said[name] != now[name]]
    if "dtype" in names:  # the digest is of the numbers as they are held
        names = [name for name in names if name != "checkpoint_digest"]
    groups: dict[str, list[str]] = {"source": [], "checkpoint": [], "settings": [], "versions": []}
    for name in names:
        kind = next(
            (
                kind
                for kind, own in (("source", SOURCE), ("checkpoint", CHECKPOINT), ("versions", VERSIONS))
                if name in own
            ),
            "settings",
        )
        groups[kind].append(name)
    return {kind: own for kind, own in groups.items() if own}


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """One level, as JSON would give it back."""
    plain = json.loads(json.dumps(settings, default=str))
    inner = {f"{name}.{key}": value for name in ("vae", "control") for key, value in (plain.get(name) or {}).items()}
    return {**{name: value for name, value in plain.items() if name not in ("vae", "control")}, **inner}


def _sentence(again: Again, report: dict[str, Any]) -> str:
    name = again.path.name
    lines = [f"{name} comes out again, pixel for pixel"]
    if not report["equal"]:
        lines = [
            f"{name} does not come out equal: {report['share']:.1%} of the pixels, up to {report['largest']} of 255"
        ]
    lines += [f"  {kind} differs: {', '.join(own)}" for kind, own in report["differs"].items()]
    if not report["equal"] and not report["differs"]:
        lines.append("  nothing that its settings name differs")
    if report["largest"] == 1:
        lines.append("  one level is what rounding on another machine or by another version makes")
    if again.lacking:
        maker = f"ip2p {again.settings.get('ip2p_engine', 'of before')}"
        lines.append(f"  made by {maker}: it does not say {' and '.join(again.lacking)}, so only the pixels tell")
    return "\n".join(lines)
