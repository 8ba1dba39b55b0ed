"""A loaded model with what people bring beside the checkpoint: another autoencoder, words of their own."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.added import Word, read_autoencoder, read_word
from ..checkpoint.build import build
from ..checkpoint.merge import with_weights
from ..checkpoint.spec import autoencoder_dtype
from ..errors import CheckpointError
from ..tokenizer import END_OF_TEXT
from .model import Model

__all__ = ["with_autoencoder", "with_words"]

TABLE = "embeddings.token_embedding.weight"


def with_autoencoder(model: Model, source: str | Path) -> Model:
    """A model that reads and makes its pictures by another autoencoder. Raises CheckpointError."""
    part = read_autoencoder(source, model.spec, dict(model.autoencoder.config))
    dtype = autoencoder_dtype(model.spec.family, model.dtype)
    device = model.autoencoder.device
    return replace(model, autoencoder=build(part, name=Path(source).name, device=device, dtype=dtype))


def with_words(model: Model, paths: Sequence[Path]) -> tuple[Model, tuple[Word, ...]]:
    """A model whose text encoders know more tokens (textual inversion, Gal et al. 2022), and what they are.

    Their rows go behind the table's others, so nothing else changes. Raises CheckpointError for a file of another
    family, and for a word that is known already.
    """
    widths = tuple(encoder.config.hidden_size for encoder in model.text_encoders)
    added = tuple(read_word(path, widths) for path in paths)
    starts = {encoder.config.vocab_size for encoder in model.text_encoders}
    if len(starts) > 1:
        raise CheckpointError("the text encoders know different numbers of tokens, so none can be added")
    words, start = dict(model.words), starts.pop()
    for word in added:
        tokens = range(start, start := start + len(word.vectors[0]))
        if known := words.keys() & word.names:
            raise CheckpointError(f"{min(known)!r} is a word already; rename {word.path.name} or leave it out")
        words.update(dict.fromkeys(word.names, list(tokens)))
    encoders = [
        _widened(encoder, torch.cat([word.vectors[place] for word in added]))
        for place, encoder in enumerate(model.text_encoders)
    ]
    return replace(model, text_encoders=tuple(encoders), words=words), added


def _widened(encoder: Any, rows: torch.Tensor) -> Any:
    """A text encoder with more rows in its table of tokens, which shares all else."""
    state = encoder.state_dict()
    name = next(key for key in state if key.endswith(TABLE))
    shell = copy.copy(encoder)
    shell.config = copy.deepcopy(encoder.config)
    shell.config.vocab_size += len(rows)
    # Some files say 2, by which transformers looks for the largest number, and that is a new word's.
    shell.config.eos_token_id = END_OF_TEXT
    return with_weights(shell, {**state, name: torch.cat([state[name], rows.to(state[name])])})
