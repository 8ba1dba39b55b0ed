"""Data sets of pairs on disk, and the pictures in them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import folder_paths

from ..ip2p_engine.errors import DatasetError
from . import _host
from ._api import Pairs, io, schema
from ._pair_store import make_record, with_key

KIND, SCENES = "datasets", "embedded scenes"
MANIFEST = {"config": {"made_by": "InstructPix2Pix nodes for ComfyUI"}}


class SaveDataset(io.ComfyNode):
    """Pairs into a folder under output/datasets."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IP2P_SaveDataset",
            display_name="IP2P Save Data Set",
            group="data",
            description=(
                "Adds pairs to a data set in output/datasets, in the Parquet layout of the Hugging Face hub. Pairs "
                "whose texts and pictures are in it already are skipped, so running a workflow again is safe."
            ),
            search_aliases=["save dataset", "export dataset", "hugging face dataset", "parquet"],
            is_input_list=True,
            is_output_node=True,
            inputs=[
                Pairs.Input(
                    "pairs", tooltip="Pairs to add, or lists of pairs, from IP2P CLIP Filter or IP2P Pair Images."
                ),
                io.String.Input(
                    "name",
                    default="my-pairs",
                    tooltip="The folder inside output/datasets, made if it is new. Another name begins another set.",
                ),
            ],
            outputs=[
                Pairs.Output(display_name="pairs", tooltip="All pairs of the data set, for IP2P Train."),
                io.String.Output(display_name="report", tooltip="What is in it now. Show it with Preview Any."),
            ],
        )

    @classmethod
    def execute(cls, pairs: list[Sequence[Any]], name: list[str]) -> io.NodeOutput:
        from ..ip2p_engine.data.store import PairStore
        from ..ip2p_engine.data.tools import info

        folder = _host.output_folder(KIND, name[0])
        done = add(chain.from_iterable(pairs), folder, sum(map(len, pairs)))
        if cls.hidden.extra_pnginfo and "workflow" in cls.hidden.extra_pnginfo:
            (folder / "workflow.json").write_text(json.dumps(cls.hidden.extra_pnginfo["workflow"]), encoding="utf-8")
        return io.NodeOutput(PairStore(folder), _host.preformatted(f"{done}\n\n{info(folder).as_text()}"))


def add(pairs: Iterable[Any], folder: Path, count: int) -> str:
    """Write those of ``count`` pairs that a data set lacks; says how many. Cancelled, it keeps what was written."""
    from ..ip2p_engine.data.store import PairWriter

    added = there = 0
    show = _host.progress(count)
    with PairWriter(folder, manifest=MANIFEST) as writer:
        keys = writer.done_keys()
        for record in map(with_key, pairs):
            show(added + there, count)
            if record.key in keys:
                there += 1
                continue
            writer.write(record)
            keys.add(record.key)
            added += 1
    return f"{added} pairs added, {there} were there"


class LoadDataset(io.ComfyNode):
    """Pairs from a folder, or true edits of scenes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IP2P_LoadDataset",
            display_name="IP2P Load Data Set",
            group="data",
            description=(
                "Opens a data set of pairs: folders of Parquet files in output/datasets, input/datasets and the "
                "datasets folders of extra_model_paths.yaml, or true edits of the embedded world, drawn as asked for."
            ),
            search_aliases=["load dataset", "magicbrush", "hugging face dataset", "open dataset"],
            inputs=[
                io.Combo.Input(
                    "name",
                    options=[SCENES, *data_sets()],
                    tooltip=(
                        "Which data set; press R after saving one. embedded scenes needs no files: the renderer draws "
                        "true edits."
                    ),
                ),
                io.Int.Input(
                    "count",
                    default=64,
                    min=1,
                    max=100_000,
                    tooltip="How many embedded scenes to draw, 64 for a try; a data set on disk is opened whole.",
                ),
                io.Int.Input("seed", default=0, min=0, max=2**48, tooltip="Change it for other embedded scenes."),
                io.Int.Input(
                    "preview",
                    default=8,
                    min=1,
                    max=256,
                    tooltip="How many pairs to show, 1 to 256; training sees all, whatever is shown.",
                ),
            ],
            outputs=[
                Pairs.Output(display_name="pairs", tooltip="All pairs, for IP2P Train and IP2P Evaluate."),
                io.Image.Output(
                    display_name="before", is_output_list=True, tooltip="The first pictures before the edit."
                ),
                io.Image.Output(display_name="after", is_output_list=True, tooltip="The same after it."),
                io.String.Output(display_name="instruction", is_output_list=True, tooltip="What was asked for."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, name: str, count: int = 64, seed: int = 0, preview: int = 8) -> str:
        files = [] if name == SCENES else sorted(folder_of(name).rglob("*.parquet"))
        state = [(path.name, path.stat().st_mtime_ns, path.stat().st_size) for path in files]
        return f"{name} {count} {seed} {preview} {state}"

    @classmethod
    def execute(cls, name: str, count: int = 64, seed: int = 0, preview: int = 8) -> io.NodeOutput:
        pairs = scenes(count, seed) if name == SCENES else open_data_set(name)
        shown = list(islice(pairs, preview))
        return io.NodeOutput(pairs, *_host.images_of(shown), [one.edit_prompt for one in shown])


def scenes(count: int, seed: int) -> tuple[Any, ...]:
    """True edits of scenes that the embedded model was trained among."""
    from ..ip2p_engine.scenes.grammar import edits_drawn
    from ..ip2p_engine.scenes.world import render

    pairs, show = [], _host.progress(count)
    for number, edit in enumerate(islice(edits_drawn(seed=seed, held_out=False), count)):
        show(number, count)
        texts = {
            "original_prompt": edit.caption,
            "edited_prompt": edit.edited_caption,
            "edit_prompt": edit.instruction,
        }
        pairs.append(make_record(render(edit.source), render(edit.target), seed=number, **texts))
    return tuple(pairs)


def open_data_set(name: str) -> Sequence[Any]:
    """The pairs of a data set that ``data_sets`` lists; raises DatasetError for an empty one."""
    from ..ip2p_engine.data.store import PairStore

    pairs = PairStore(folder_of(name))
    if not len(pairs):
        raise DatasetError(f"the data set {name} is empty; run the workflow that saves it")
    return pairs


def data_sets() -> list[str]:
    """Folders with Parquet files, as root/name."""
    found = []
    for label, root in _roots().items():
        folders = [path for path in sorted(root.glob("*")) if path.is_dir()] if root.is_dir() else []
        found += [f"{label}/{path.name}" for path in folders if next(path.rglob("*.parquet"), None)]
    return found


def folder_of(name: str) -> Path:
    """The folder of a data set that ``data_sets`` lists; raises DatasetError."""
    label, _, rest = name.partition("/")
    if name not in data_sets():
        raise DatasetError(f"data set {name!r} is not there; press R in ComfyUI to refresh the lists and choose again")
    return _host.contained(_roots()[label], rest)


def _roots() -> dict[str, Path]:
    """Where data sets may lie, by the name that stands before theirs."""
    roots = {
        "output": Path(folder_paths.get_output_directory()) / KIND,
        "input": Path(folder_paths.get_input_directory()) / KIND,
    }
    extra = folder_paths.folder_names_and_paths.get(KIND, ([],))[0]
    return roots | {f"{KIND}{number or ''}": Path(path) for number, path in enumerate(extra)}
