"""Addresses in shared storage (s3://, gs://, https:// ...): which names are one, and what may be said of it."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

__all__ = ["is_url", "public_name", "reason_of"]


def is_url(source: str) -> bool:
    """Whether something is named by an address other than the hub's."""
    return "://" in source and not source.startswith("hf://")


def public_name(source: str | Path) -> str:
    """A source as pictures and manifests may name it: an address without its user, password and signed query."""
    text = str(source)
    if not is_url(text):
        return text
    parts = urlsplit(text)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def reason_of(error: Exception, *urls: str | Path) -> str:
    """The first line of an error of whatever class a kind of storage raises, with the addresses made public."""
    # Not cut short: of half an address the secret would stay.
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    for url in map(str, urls):
        text = text.replace(url, public_name(url))
    return text
