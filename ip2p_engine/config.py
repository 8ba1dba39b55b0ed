"""Settings as frozen dataclasses: validated when made, saved with every run, overridden by name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import ConfigError
from .version import __version__

__all__ = ["as_list", "from_mapping", "to_json", "versions_of", "with_overrides"]

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")


def as_list(value: Any, single: Any) -> list[Any]:
    """One thing of the given type, or a sequence of them, as a list."""
    return [value] if isinstance(value, single) else list(value)


def with_overrides(config: Config, overrides: Mapping[str, Any]) -> Config:
    """A copy with some fields replaced; None keeps a field. Raises ConfigError for a name that the config lacks."""
    known = {field.name for field in dataclasses.fields(config)}
    unknown = sorted(set(overrides) - known)
    if unknown:
        raise ConfigError(f"unknown setting {unknown[0]!r}; choose among {', '.join(sorted(known))}")
    return dataclasses.replace(config, **{name: value for name, value in overrides.items() if value is not None})


def from_mapping(kind: type[Config], values: Mapping[str, Any]) -> Config:
    """A config from saved values; raises ConfigError for names it lacks or values it refuses."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{kind.__name__} cannot be made from {values!r}; give names and values")
    known = {field.name for field in dataclasses.fields(kind)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ConfigError(f"{kind.__name__} has no setting {unknown[0]!r}; choose among {', '.join(sorted(known))}")
    try:
        return kind(**values)
    except TypeError as error:
        raise ConfigError(f"{kind.__name__} cannot be made from {dict(values)}: {error}") from error


def versions_of(*packages: str) -> dict[str, str]:
    """The versions of this package and of others, as far as they are installed: what results depend on."""
    found = {"ip2p_engine": __version__}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def to_json(config: Any) -> str:
    """A config as one line of JSON."""
    return json.dumps(dataclasses.asdict(config), sort_keys=True)
