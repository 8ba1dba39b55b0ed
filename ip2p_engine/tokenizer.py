"""CLIP's byte-pair tokenizer, from the vocabulary that open_clip carries; open_clip itself stays unloaded."""

from __future__ import annotations

import gzip
import html
import importlib.util
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

import torch
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor

from .errors import ConfigError

__all__ = [
    "END_OF_TEXT",
    "MAX_TOKENS",
    "START_OF_TEXT",
    "check_length",
    "clean",
    "clip_tokenizer",
    "merges",
    "token_chunks",
    "tokenize",
]

START_OF_TEXT, END_OF_TEXT, MAX_TOKENS = 49406, 49407, 77
CHUNK, LONG_WORD = MAX_TOKENS - 2, 8
LONGEST = 32 * CHUNK
VOCABULARY_FILE = "bpe_simple_vocab_16e6.txt.gz"
MERGE_COUNT = 49152 - 256 - 2
START_SYMBOL, END_SYMBOL = "<|startoftext|>", "<|endoftext|>"
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


Words = Mapping[str, Sequence[int]]
"""Words that stand for tokens of their own (textual inversion), e.g. "embedding:style"."""


def tokenize(texts: Sequence[str], *, pad: int = END_OF_TEXT) -> Tensor:
    """Token ids as Stable Diffusion's text encoder sees them (ftfy, lower case, truncated to 77).

    Returns int64, shape (len(texts), 77). ``pad`` fills the rest: 49407 for SD1.x, 0 for open_clip's models.
    """
    rows = [token_chunks(text, pad=pad)[:1] for text in texts]
    return torch.cat([torch.empty((0, MAX_TOKENS), dtype=torch.int64), *rows])


def token_chunks(text: str, *, pad: int = END_OF_TEXT, words: Words = MappingProxyType({})) -> Tensor:
    """A whole text as ComfyUI reads it: 75 tokens a row between a start and an end, the last row filled with ``pad``.

    A word of ``words`` that is short is not torn apart. Returns int64, shape (chunks, 77); a text of up to 75 tokens is
    one chunk, as ``tokenize`` has it.
    """
    parts: list[list[int]] = [[]]
    for group in _groups(text, words):
        if len(parts[-1]) + len(group) > CHUNK and len(group) < LONG_WORD:
            parts.append([])
        while group:
            room = CHUNK - len(parts[-1])
            parts[-1] += group[:room]
            if group := group[room:]:
                parts.append([])
    rows = torch.full((len(parts), MAX_TOKENS), pad, dtype=torch.int64)
    for row, part in zip(rows, parts, strict=True):
        row[: len(part) + 2] = torch.tensor([START_OF_TEXT, *part, END_OF_TEXT])
    return rows


def _groups(text: str, words: Words) -> list[list[int]]:
    """A text's tokens without start and end: those of each of ``words``, and of what is between them."""
    encoder, text = clip_tokenizer(), clean(text)
    known = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    # A word ends at a space or a comma; as in ComfyUI the suffix of its file may stand there too.
    cut = rf"(?<!\S)({known})(?:\.(?:safetensors|pt|bin))?(?![^\s,])"
    parts = re.split(cut, text) if words else [text]
    return [
        list(words[part] if n % 2 else encoder.encode(part, add_special_tokens=False).ids)
        for n, part in enumerate(parts)
    ]


def check_length(text: str) -> None:
    """Raises ConfigError for a text that no instruction needs and that would fill the memory."""
    if len(text.encode("utf-8", "replace")) <= LONGEST:  # a token is a byte at least
        return
    count = len(clip_tokenizer().encode(clean(text), add_special_tokens=False).ids)
    if count > LONGEST:
        raise ConfigError(f"the text {text[:40]!r}... has {count:,} tokens; give at most {LONGEST:,}")


def clean(text: str) -> str:
    """What CLIP's authors do to a text first: broken Unicode repaired, HTML's entities read, its ends trimmed."""
    import ftfy  # here: whoever loads networks or converts them needs none of it

    return html.unescape(html.unescape(ftfy.fix_text(text))).strip()


@lru_cache(maxsize=1)
def clip_tokenizer() -> Tokenizer:
    """The tokenizer itself, without the repair of text that ``tokenize`` does first.

    Made as transformers' CLIPTokenizer is, whose arguments differ from one version of it to the next.
    """
    pairs = merges()
    characters = _byte_characters()
    symbols = [*characters, *(c + "</w>" for c in characters), *("".join(pair) for pair in pairs)]
    vocabulary = {symbol: i for i, symbol in enumerate([*symbols, START_SYMBOL, END_SYMBOL])}
    tokenizer = Tokenizer(BPE(vocabulary, pairs, end_of_word_suffix="</w>", unk_token=END_SYMBOL))
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    cut = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.add_special_tokens([START_SYMBOL, END_SYMBOL])
    return tokenizer


def merges() -> list[tuple[str, str]]:
    """The vocabulary's byte pairs, most frequent first; raises ConfigError if open_clip is not installed."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("open_clip, which carries the CLIP vocabulary, is missing; pip install open_clip_torch")
    path = Path(spec.submodule_search_locations[0]) / VOCABULARY_FILE
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    return [(left, right) for left, right in map(str.split, lines[1 : 1 + MERGE_COUNT])]


def _byte_characters() -> list[str]:
    """The printable stand-ins for the 256 bytes, in the vocabulary's order (Radford et al., 2019)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(b) for b in printable] + [chr(256 + n) for n in range(len(others))]
