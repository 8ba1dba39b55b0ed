"""IP2P Captions: what could be edited in a picture, as instruction and edited caption."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import folder_paths

from ..ip2p_engine.errors import CaptionError, ConfigError
from . import _host
from ._api import io, schema

GRAMMAR, SERVER, MODEL = "scenes grammar", "server", "model: "
FOLDER = "ip2p_captions"
URL_VARIABLE, MODEL_VARIABLE = "IP2P_CAPTIONS_URL", "IP2P_CAPTIONS_MODEL"


class Captions(io.ComfyNode):
    """Edits of captions."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IP2P_Captions",
            display_name="IP2P Captions",
            group="data",
            description=(
                "Thinks of an instruction and an edited caption for each caption (section 3.1.1 of the paper). The "
                "outputs are lists: what they are wired to runs once for each edit."
            ),
            search_aliases=["make captions", "edit instructions", "prompt generator", "llm captions"],
            inputs=[
                io.String.Input(
                    "captions",
                    multiline=True,
                    default="",
                    tooltip="What your pictures show, one a line. Empty, the scenes grammar makes some up.",
                ),
                io.Combo.Input(
                    "source",
                    options=[GRAMMAR, *_models(), SERVER],
                    default=GRAMMAR,
                    tooltip=(
                        "scenes grammar: exact and free, for scenes only. model: a causal language model that was "
                        "fine-tuned for it, a folder in models/ip2p_captions. server: an OpenAI-compatible one, named "
                        f"by the environment variables {URL_VARIABLE} and {MODEL_VARIABLE}."
                    ),
                ),
                io.Int.Input(
                    "count",
                    default=4,
                    min=1,
                    max=10_000,
                    tooltip=(
                        "Edits in all, 1 to 10,000; captions take turns. Raise it for a larger data set. Unusable "
                        "and repeated answers are left out, so it may become fewer."
                    ),
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**48,
                    control_after_generate=True,
                    tooltip="Change it for other edits of the same captions.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="caption", is_output_list=True, tooltip="The picture before."),
                io.String.Output(display_name="edited_caption", is_output_list=True, tooltip="The picture after."),
                io.String.Output(
                    display_name="instruction", is_output_list=True, tooltip="What leads from one to the other."
                ),
            ],
        )

    @classmethod
    def execute(cls, captions: str = "", source: str = GRAMMAR, count: int = 4, seed: int = 0) -> io.NodeOutput:
        edits = make_edits([line.strip() for line in captions.splitlines() if line.strip()], source, count, seed)
        columns = ("caption", "edited_caption", "instruction")
        return io.NodeOutput(*([getattr(edit, name) for edit in edits] for name in columns))


def make_edits(captions: list[str], source: str, count: int, seed: int) -> list[Any]:
    """``count`` edits at most; raises CaptionError if no answer could be used."""
    from ..ip2p_engine.captions.edits import Rejected, Request
    from ..ip2p_engine.scenes.grammar import sample_captions

    if not captions:
        if source != GRAMMAR:
            raise ConfigError("there are no captions; write at least one line")
        captions = list(sample_captions(count, seed=seed))
    requests = [Request.make(captions[n % len(captions)], n // len(captions), seed) for n in range(count)]
    thinker = _source(source)
    answers, show = [], _host.progress(count)
    for start in range(0, count, thinker.batch):
        answers += thinker.propose(requests[start : start + thinker.batch])
        show(len(answers), count)
    edits = [answer for answer in answers if not isinstance(answer, Rejected) and not answer.is_no_op]
    if not edits:
        reasons = ", ".join(sorted({answer.reason for answer in answers if isinstance(answer, Rejected)})) or "no-op"
        raise CaptionError(
            f"none of {count} answers could be used ({reasons}); the {source} may not know such captions"
        )
    return list(dict.fromkeys(edits))


def _source(name: str) -> Any:
    if name == GRAMMAR:
        from ..ip2p_engine.scenes.grammar import GrammarSource

        return GrammarSource()
    if name == SERVER:
        return _server()
    if name.removeprefix(MODEL) not in [model.removeprefix(MODEL) for model in _models()]:
        raise ConfigError(f"source {name!r} is not there; put the model's folder into models/{FOLDER}")
    from ..ip2p_engine.captions.language_model import LanguageModelSource

    return LanguageModelSource(_folder() / name.removeprefix(MODEL), on_wait=_host.check_interrupted)


def _server() -> Any:
    """The address is no widget: a workflow from elsewhere could send the key in the environment to anyone."""
    from ..ip2p_engine.captions.server import ServerConfig, ServerSource

    address, model = os.environ.get(URL_VARIABLE, ""), os.environ.get(MODEL_VARIABLE, "")
    if not address or not model:
        raise ConfigError(f"no caption server is known; start ComfyUI with {URL_VARIABLE} and {MODEL_VARIABLE} set")
    return ServerSource(ServerConfig(base_url=address, model=model), on_wait=_host.check_interrupted)


def _folder() -> Path:
    return Path(folder_paths.models_dir) / FOLDER


def _models() -> list[str]:
    return [MODEL + path.parent.name for path in sorted(_folder().glob("*/config.json"))]
