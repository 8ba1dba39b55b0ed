"""``ip2p evaluate judge``: edits scored by a vision-language model."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..hooks import Hooks
from ..progress import write_note
from .evaluate_data import told
from .options import (
    Several,
    add_command,
    add_reading_options,
    json_option,
    local_path,
    progress_bar,
    reading_of,
    stop_signals,
)

__all__ = ["add_judge", "add_pairs_judge"]

SHOWN = 5


def add_judge(actions: Any) -> None:
    judge = add_command(actions, "judge", _judge, "have edits scored by a vision-language model on a server")
    judge.add_argument(
        "folder", type=Path, metavar="RUN", help="of ip2p evaluate edits, a benchmark's results, or a table"
    )
    judge.add_argument("--edits", type=Path, metavar="FILE", help="GEdit-Bench's table or ImgEdit's JSON, of results")
    judge.add_argument("--sources", type=Path, metavar="FOLDER", help="where ImgEdit's pictures lie")
    judge.add_argument(
        "--beside", action=Several, nargs="+", default=[], metavar="NAME=FILE", help="others' scores, below a line"
    )
    judge.add_argument("--out", type=local_path, help="the run's folder (default: RUN/judged-RUBRIC)")
    _add_asking(judge)


def add_pairs_judge(actions: Any) -> None:
    """``ip2p dataset judge``."""
    judge = add_command(actions, "judge", _judge_pairs, "have pairs scored by a vision-language model, to filter by it")
    judge.add_argument("store", metavar="STORE")
    judge.add_argument("--out", type=local_path, required=True, help="a store with the scores; the same again goes on")
    _add_asking(judge)
    add_reading_options(judge)
    judge.add_argument("--json", action="store_true", help="print the result as JSON")


def _add_asking(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--as", dest="rubric", choices=("viescore", "imgedit"), default="viescore", help="how to score")
    parser.add_argument("--votes", type=int, default=1, metavar="N", help="answers to each question (default: 1)")
    parser.add_argument("--plan", action="store_true", help="say what it will cost, and ask nothing")
    parser.add_argument("--retry-rejected", action="store_true", help="ask again what could not be used")
    _add_server_options(parser)


def _add_server_options(parser: argparse.ArgumentParser) -> None:
    """Of a vision-language model that judges."""
    group = parser.add_argument_group("the server: anything that speaks OpenAI's protocol")
    group.add_argument("--server", required=True, metavar="URL", help="such as http://127.0.0.1:8000/v1")
    group.add_argument("--model", required=True, help="the name under which the server knows it; it has to see")
    group.add_argument("--key-variable", default="OPENAI_API_KEY", help="the environment variable with the key")
    group.add_argument("--concurrency", type=int, default=4, help="requests at one time (default: 4)")
    group.add_argument("--retries", type=int, default=8, help="of errors that may pass (default: 8)")
    group.add_argument("--temperature", type=float, help="default: 0, with several votes 0.7")
    group.add_argument("--max-tokens", type=int, default=300, help="of one answer (default: 300)")
    group.add_argument("--request", metavar="JSON", help='more fields, such as {"reasoning_effort": "low"}')


def _server(options: argparse.Namespace) -> Any:
    from ..captions.chat import ServerConfig

    names = ("model", "key_variable", "concurrency", "retries", "max_tokens")
    warmth = options.temperature if options.temperature is not None else 0.0 if options.votes == 1 else 0.7
    extra = json_option("--request", options.request) if options.request else {}
    given = {name: getattr(options, name) for name in names}
    return ServerConfig(base_url=options.server, temperature=warmth, extra=extra, **given)


def _judge(options: argparse.Namespace) -> None:
    from ..evaluate.benchmarks import edits_of, read_scores
    from ..evaluate.judge import cost_of, judge
    from ..evaluate.rubrics import RUBRICS
    from ..evaluate.run_folder import check_run

    rubric, server = RUBRICS[options.rubric], _server(options)
    home = options.folder if options.folder.is_dir() else options.folder.with_suffix("")
    out = options.out or home / f"judged-{rubric.name}"
    beside = {name: read_scores(Path(file), rubric, options.edits) for name, file in map(_named, options.beside)}
    edits, missing = edits_of(options.folder, options.edits, options.sources)
    check_run(out, "judge")
    asked = {"votes": options.votes, "retry_rejected": options.retry_rejected}
    cost = cost_of(edits, rubric, server, out, **asked)
    if options.plan:
        sys.stdout.write(f"{len(edits):,} edits: {cost.as_text()}\n")
        return
    write_note(f"ip2p: {len(edits):,} edits: {cost.as_text()}")
    with stop_signals() as should_stop, progress_bar(cost.requests + cost.known, "answers") as bar:
        found = judge(edits, rubric, server, out, **asked, hooks=Hooks(on_progress=bar, should_stop=should_stop))
    _write(options, found, beside, out)
    for path in missing[:SHOWN]:
        write_note(f"ip2p: {path} is missing, and {len(missing):,} pictures in all; their edits are left out")


def _write(options: argparse.Namespace, found: Any, beside: dict[str, Any], out: Path) -> None:
    from ..evaluate.benchmarks import write_scores
    from ..evaluate.judged import judged_rows, judgement_tables, rows_by_others
    from ..evaluate.run_folder import save_run, text_of, write_rows

    rows = judged_rows(found)
    others = rows_by_others(out, rows)
    tables = judgement_tables(found, rows, {**others, **beside})
    write_rows(out, [*(row for some in others.values() for row in some), *rows])
    write_scores(found, out)
    save_run(out, "judge", settings={**told(options), "prompts": found.rubric.prompts}, tables=tables)
    sys.stdout.write("\n\n".join(text_of(table) for table in tables) + "\n")


def _named(text: str) -> tuple[str, str]:
    name, sign, file = text.partition("=")
    if not (sign and name and file):
        raise ConfigError(f"--beside is {text!r}; give NAME=FILE, such as theirs=theirs_combined_gpt_score.csv")
    return name, file


def _judge_pairs(options: argparse.Namespace) -> None:
    from ..evaluate.judge_pairs import cost_of_pairs, judge_pairs
    from ..evaluate.rubrics import RUBRICS

    rubric, server, reading = RUBRICS[options.rubric], _server(options), reading_of(options)
    cost = cost_of_pairs(options.store, options.out, rubric, server, reading, votes=options.votes)
    if options.plan:
        sys.stdout.write(f"{cost.as_text()}\n")
        return
    write_note(f"ip2p: at most {cost.as_text()}")
    faults: list[str] = []
    with stop_signals() as should_stop, progress_bar(0, "pairs") as bar:
        watch = {"on_progress": bar, "on_error": lambda _, error: faults.append(str(error))}
        hooks = Hooks(**watch, should_stop=should_stop)
        asked = {"votes": options.votes, "retry_rejected": options.retry_rejected, "hooks": hooks}
        found = judge_pairs(options.store, options.out, rubric, server, reading, **asked)
    for fault in faults[:SHOWN]:
        write_note(f"ip2p: left out: {fault}")
    said = f"{options.out}: {found.new:,} new pairs, {len(faults):,} left out"
    values = {"out": str(options.out), "new": found.new, "rejected": found.rejected, "left_out": len(faults)}
    sys.stdout.write((json.dumps(values) if options.json else said) + "\n")
