"""A run on the Hugging Face hub: pushed with a model card, and taken up from there on another machine."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..checkpoint.training_run import CHECKPOINTS, RUN
from ..errors import ConfigError, first_line
from ..files import disk_errors, is_within, link_or_copy, read_json
from .checkpoints import latest
from .config import HUB_ID

__all__ = ["model_card", "pull", "push", "ready"]

log = logging.getLogger(__name__)
CARD, LOG, VALIDATION = "README.md", "log.jsonl", "validation.jsonl"
KEPT = (LOG, VALIDATION, "loss.png", "lora.safetensors", "conv_in.safetensors", "ema.safetensors", "raw.safetensors")
SHOWN = (
    "steps",
    "batch_size",
    "resolution",
    "learning_rate",
    "schedule",
    "optimizer",
    "precision",
    "lora_rank",
    "seed",
)


def ready(repository: str) -> None:
    """See that a repository can be pushed to; a new one is private. Raises ConfigError."""
    with _hub(repository) as api:
        api.create_repo(repository, private=True, exist_ok=True)


def push(folder: Path, repository: str, step: int) -> None:
    """What a run goes on from and what it leaves, in one commit; what is there already is not sent again.

    Of the checkpoints the last alone. Raises ConfigError where the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    about = _public(read_json(folder / RUN, ConfigError))
    last = latest(folder / CHECKPOINTS)
    files = [path for name in KEPT if (path := folder / name).is_file()] + [path for path in (last,) if path]
    files += sorted((folder / "validation").glob("*.png"))
    files += sorted(path for path in (folder / "diffusers").rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in files}
    card = model_card(about, _rows(folder / VALIDATION), sorted(names), repository, step)
    made = {RUN: (json.dumps(about, indent=2) + "\n").encode(), CARD: card.encode()}
    with _hub(repository) as api:
        there = set(api.list_repo_files(repository))
        gone = [name for name in there if name.startswith(f"{CHECKPOINTS}/") and name not in names]
        operations: list[Any] = [CommitOperationDelete(path_in_repo=name) for name in gone]
        sent: dict[str, Any] = {**{name: str(path) for name, path in names.items()}, **made}
        operations += [CommitOperationAdd(path_in_repo=name, path_or_fileobj=value) for name, value in sent.items()]
        api.create_commit(repository, operations=operations, commit_message=f"After step {step}")
    log.info("%s was pushed to %s after step %d", folder, repository, step)


def pull(repository: str, folder: Path) -> None:
    """Bring a run from the hub into a folder that holds none, to go on with it. Raises ConfigError."""
    if (folder / RUN).exists():
        return
    with _hub(repository) as api:
        names = [name for name in api.list_repo_files(repository) if is_within(name)]
        steps = sorted(name for name in names if name.startswith(f"{CHECKPOINTS}/step-"))
        if RUN not in names or not steps:
            raise ConfigError(f"{repository} holds no run to go on with (run.json and a checkpoint); give another one")
        pictures = [name for name in names if name.startswith("validation/")]
        wanted = [name for name in (LOG, VALIDATION) if name in names] + [*pictures, steps[-1], RUN]
        for name in wanted:  # run.json last: with it the folder holds a run
            found = Path(api.hf_hub_download(repository, name)).resolve()
            target = folder / name
            with disk_errors(target, "written", ConfigError):
                target.parent.mkdir(parents=True, exist_ok=True)
                link_or_copy(found, target)


def model_card(
    about: Mapping[str, Any], validations: list[dict[str, Any]], files: list[str], repository: str, step: int
) -> str:
    """README.md: what it is, what it was made of, how it was trained, how to use it."""
    config, spec = about["config"], about["spec"]
    base, licences = str(about["base"]), about.get("licences", [])
    head = ["---", "tags:", "- instruct-pix2pix", "- image-to-image", "pipeline_tag: image-to-image"]
    head += ["library_name: diffusers"] if "diffusers/model_index.json" in files else []
    head += [f"base_model: {base}"] if HUB_ID.fullmatch(base) else []
    what = "A LoRA" if config["lora_rank"] else "An InstructPix2Pix"
    kind = f"{spec['family']}, predicts {spec['prediction']}, {spec['in_channels']} input channels"
    lines = [*head, "---", "", f"# {repository.partition('/')[2]}", ""]
    lines += [f"{what} after {step:,} of {config['steps']:,} steps, trained from `{base}` ({kind}).", ""]
    lines += ["## Data", "", f"`{about['data']}`; licences: {', '.join(licences) or 'the data say nothing of any'}."]
    lines += [f"Held out: {about['held_out']:,} pairs, by {about['split_rule']}."] if about.get("held_out") else []
    seen = about.get("test_pairs", 0)
    lines += [f"{seen:,} pairs of the test split were trained on; measure it on other data."] if seen else []
    lines += ["", "## Training", "", "| setting | value |", "|---|---|"]
    lines += [f"| {name} | {config[name]} |" for name in SHOWN]
    if validations:
        lines += ["", "| step | validation loss, raw | average |", "|---|---|---|"]
        lines += [f"| {row['step']} | {row['raw']:.5f} | {row['ema']:.5f} |" for row in validations[-10:]]
    lines += ["", "![loss](loss.png)"] if "loss.png" in files else []
    pictures = [name for name in files if name.startswith("validation/")]
    lines += ["", f"![source, edit, truth]({pictures[-1]})"] if pictures else []
    lines += ["", "## Use", "", "```sh", *_use(files, repository, base), "```", ""]
    return "\n".join(lines)


def _public(about: Mapping[str, Any]) -> dict[str, Any]:
    """run.json without where things lie on this machine."""
    places = {name: Path(about[name]).name for name in ("data", "base") if Path(str(about[name])).is_absolute()}
    return {name: value for name, value in {**about, **places}.items() if name != "directory"}


def _use(files: list[str], repository: str, base: str) -> Iterator[str]:
    edit = 'ip2p edit photo.png --instruction "make it snow"'
    if "ema.safetensors" in files:
        yield f"{edit} --checkpoint hf://{repository}/ema.safetensors"
    elif "lora.safetensors" in files:
        yield f"hf download {repository} lora.safetensors --local-dir ."
        yield f"{edit} --checkpoint {base} --lora lora.safetensors"
    yield f"ip2p train --data DATA --base {base} --out RUN --resume-from-hub {repository}   # goes on"


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line] if path.is_file() else []


@contextmanager
def _hub(repository: str) -> Iterator[Any]:
    """The hub's client; whatever it raises as one sentence."""
    from huggingface_hub import HfApi

    try:
        yield HfApi()
    except ConfigError:
        raise
    except Exception as error:  # the client raises its own errors, and requests' or httpx's by its version
        reason = first_line(error)
        advice = "check its name, log in (hf auth login), and give the same call again"
        raise ConfigError(f"the hub does not do what was asked of {repository} ({reason}); {advice}") from error
