"""``ip2p captions``: from captions to edits, and the language model that writes them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..hooks import Hooks
from ..progress import write_note
from .options import add_command, check_positive, json_option, local_path, progress_bar, stop_signals

__all__ = ["add"]

OPTIONS = {
    "grammar": ("sample", "held_out"),
    "language-model": ("language_model", "device", "batch", "temperature", "max_tokens"),
    "server": ("base_url", "model", "key_variable", "concurrency", "retries", "temperature", "max_tokens")
    + ("system", "examples", "request"),
}
"""What each source alone understands."""
FINE_TUNE = "fine-tune"
UNKNOWN_CAPTIONS = (
    "the grammar knows captions of scenes alone (ip2p captions --sample 10 shows some); for captions of your own give "
    "--source server with --base-url and --model, or --source language-model"
)


def add(commands: Any) -> None:
    _add_captions(commands)
    _add_fine_tune(commands)


def _add_captions(commands: Any) -> None:
    parser = add_command(commands, "captions", _captions, "write instructions and edited captions for captions")
    parser.add_argument("captions", nargs="?", metavar="IN", help="a .txt (one a line), .jsonl or .parquet file")
    parser.add_argument(
        "--column", help="of a .jsonl or .parquet file (default: caption, input, original_prompt, text)"
    )
    parser.add_argument(
        "--out", type=local_path, required=True, metavar="FILE", help="a .jsonl file; an unfinished one goes on"
    )
    parser.add_argument(
        "--source", choices=tuple(OPTIONS), default="grammar", help="who thinks of the edits (default: grammar)"
    )
    parser.add_argument("--per-caption", type=int, default=1, metavar="N", help="edits of each caption (default: 1)")
    parser.add_argument("--retry-rejected", action="store_true", help="ask again about what was rejected")
    parser.add_argument("--seed", type=int, default=0, help="of the whole run (default: 0)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    grammar = parser.add_argument_group("grammar: scenes, exact and free")
    grammar.add_argument("--sample", type=int, metavar="N", help="N captions of scenes instead of a file")
    grammar.add_argument("--held-out", action="store_true", help="phrasings and scenes that are kept from training")
    model = parser.add_argument_group("language-model: a causal model on this machine")
    model.add_argument("--language-model", metavar="FOLDER", help="as ip2p captions-fine-tune writes it, or a hub id")
    model.add_argument("--device", help="cpu, cuda, mps (default: a GPU if there is one)")
    model.add_argument("--batch", type=int, help="texts at once (default: 16)")
    server = parser.add_argument_group("server: anything that speaks OpenAI's protocol")
    server.add_argument("--base-url", metavar="URL", help="such as http://127.0.0.1:8000/v1")
    server.add_argument("--model", help="the name under which the server knows it")
    server.add_argument("--key-variable", help="the environment variable with the key (default: OPENAI_API_KEY)")
    server.add_argument("--concurrency", type=int, help="requests at one time (default: 4)")
    server.add_argument("--system", type=Path, metavar="FILE", help="a text that the model is told in place of ours")
    server.add_argument("--examples", type=Path, metavar="FILE", help="triplets to show it in place of ours (.jsonl)")
    server.add_argument("--request", metavar="JSON", help='more fields, such as {"reasoning_effort": "low"}')
    server.add_argument("--retries", type=int, help="of errors that may pass (default: 8)")
    both = parser.add_argument_group("language-model and server")
    both.add_argument("--temperature", type=float, help="default: 0.7, the paper's")
    both.add_argument("--max-tokens", type=int, help="of one answer (default: 160, of a server 256)")


def _add_fine_tune(commands: Any) -> None:
    summary = "train a language model on triplets that people wrote, for ip2p captions"
    parser = add_command(commands, f"captions-{FINE_TUNE}", _fine_tune, summary)
    parser.add_argument(
        "triplets", metavar="TRIPLETS", help="a .jsonl or .parquet file: caption, instruction, edited caption"
    )
    parser.add_argument("--base", required=True, help="a causal model: a folder or a hub id")
    parser.add_argument("--out", type=local_path, required=True, metavar="FOLDER")
    parser.add_argument("--epochs", type=int, default=1, help="default: 1, the paper's")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, help="default: 2e-5, with LoRA 2e-4")
    parser.add_argument("--lora-rank", type=int, default=0, metavar="R", help="0 trains every weight (default: 0)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cpu, cuda, mps (default: a GPU if there is one)")
    parser.add_argument("--json", action="store_true", help="print the losses as JSON")


def _captions(options: argparse.Namespace) -> None:
    from ..captions.edits import make_captions

    _refuse_options_of_others(options)
    captions, source = _input(options), _source(options)
    with stop_signals() as should_stop, progress_bar(0, "captions") as bar:
        report = make_captions(
            captions,
            source,
            options.out,
            per_caption=options.per_caption,
            seed=options.seed,
            retry_rejected=options.retry_rejected,
            hooks=Hooks(on_progress=bar, should_stop=should_stop),
        )
    if options.source == "grammar" and options.captions and not report.written:
        write_note(f"ip2p: {UNKNOWN_CAPTIONS}")
    sys.stdout.write((json.dumps(vars(report)) if options.json else f"{options.out}: {report.as_text()}") + "\n")


def _refuse_options_of_others(options: argparse.Namespace) -> None:
    """A forgotten --source would use the captions up: what a source has rejected it is not asked again."""
    for source, names in OPTIONS.items():
        for name in names:
            if getattr(options, name) not in (None, False) and name not in OPTIONS[options.source]:
                flag = f"--{name.replace('_', '-')}"
                raise ConfigError(f"{flag} is no option of --source {options.source}; use it with --source {source}")


def _given(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


def _input(options: argparse.Namespace) -> Iterator[str]:
    from ..captions.edits import read_captions

    if (options.captions is None) == (options.sample is None):
        raise ConfigError("ip2p captions reads one file of captions, or samples scenes; give IN or --sample N")
    if options.captions is not None:
        return read_captions(options.captions, column=options.column)
    from ..scenes.grammar import sample_captions

    check_positive("--sample", options.sample)
    return sample_captions(options.sample, seed=options.seed, held_out=options.held_out)


def _source(options: argparse.Namespace) -> Any:
    if options.source == "grammar":
        from ..scenes.grammar import GrammarSource

        return GrammarSource(held_out=options.held_out)
    if options.source == "language-model":
        return _language_model(options)
    from ..captions.server import ServerConfig, ServerSource

    if not options.base_url or not options.model:
        raise ConfigError("--source server needs to know where and what; give --base-url URL and --model NAME")
    return ServerSource(ServerConfig(**_server_options(options)))


def _server_options(options: argparse.Namespace) -> dict[str, Any]:
    """The server's fields, those from files read."""
    from ..captions.edits import read_edits
    from ..errors import CaptionError
    from ..files import text_lines

    given = _given(options, *OPTIONS["server"])
    if "system" in given:
        given["system"] = "".join(text_lines(given["system"], CaptionError))
    if "examples" in given:
        given["examples"] = tuple(read_edits(given["examples"]))
    if "request" in given:
        given["extra"] = json_option("--request", given.pop("request"))
    return given


def _language_model(options: argparse.Namespace) -> Any:
    if not options.language_model:
        raise ConfigError("--source language-model needs a model; give --language-model FOLDER")
    from ..captions.language_model import LanguageModelSource, SampleConfig
    from ..edit import usable_device

    config = SampleConfig(**_given(options, "temperature", "batch", "max_tokens"))
    return LanguageModelSource(options.language_model, config=config, device=usable_device(options.device))


def _fine_tune(options: argparse.Namespace) -> None:
    from ..captions.edits import read_edits
    from ..captions.language_model import FineTuneConfig, fine_tune
    from ..edit import usable_device

    names = ("epochs", "batch", "learning_rate", "lora_rank", "seed")
    config = FineTuneConfig(**{name: getattr(options, name) for name in names})
    edits, device = read_edits(options.triplets), usable_device(options.device)
    with stop_signals() as should_stop, progress_bar(0, "steps") as bar:
        hooks = Hooks(on_progress=bar, should_stop=should_stop)
        losses = fine_tune(options.base, edits, options.out, config=config, device=device, hooks=hooks)
    text = f"{options.out}: {len(edits):,} triplets, {len(losses)} steps, loss {losses[0]:.3f} to {losses[-1]:.3f}"
    sys.stdout.write((json.dumps({"out": str(options.out), "losses": losses}) if options.json else text) + "\n")
