"""``ip2p edit`` and ``ip2p demo``."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..errors import ConfigError
from .options import (
    BY_PICTURE,
    Several,
    add_command,
    add_guidance_options,
    add_model_options,
    check_positive,
    edit_config,
    load_editor,
    local_path,
)

__all__ = ["add"]

AUTO = Path("auto")

# Diffusers imports them where they are installed, for adapters and schedulers that no edit uses, and with peft come
# transformers' losses: a fifth of the command's time.
UNUSED = ("peft", "scipy")


def add(commands: Any) -> None:
    _add_edit(commands)
    _add_area(commands)
    _add_demo(commands)


def _add_area(commands: Any) -> None:
    parser = add_command(commands, "area", _area, "where may an instruction act? a mask to look at and to change")
    parser.add_argument("image", metavar="IMAGE", help="a picture file")
    parser.add_argument("--instruction", required=True, metavar="TEXT")
    parser.add_argument("--size", default="paper", help="as for ip2p edit (default: paper)")
    parser.add_argument("--resolution", type=int, help="longer side that the paper's rule aims at")
    parser.add_argument("--out", type=local_path, default=Path("area.png"), help="white may change (default: area.png)")
    add_model_options(parser, checkpoint=None, usual=BY_PICTURE)


def _area(options: argparse.Namespace) -> None:
    from ..edit import EditConfig
    from ..images import check_output, open_image, save_image, upright_size
    from ..scenes.notice import model_for

    check_output(options.out)
    upright_size(options.image)  # before the network is loaded
    options.checkpoint = options.checkpoint or model_for(open_image(options.image))
    config = EditConfig(size=options.size, resolution=options.resolution)
    (mask,) = load_editor(options).find_area(str(options.image), options.instruction, config=config)
    save_image(mask, options.out)
    share = sum(mask.histogram()[128:]) / (mask.width * mask.height)
    sys.stdout.write(f"{options.out}: {100 * share:.0f} % of the picture may change\n")


def _add_edit(commands: Any) -> None:
    parser = add_command(commands, "edit", _edit, "edit pictures by instructions")
    parser.set_defaults(unused=UNUSED, parser=parser)
    parser.add_argument(
        "images",
        nargs="*",
        metavar="IMAGE",
        help="files, folders, patterns, addresses or - (standard input), named before --instruction",
    )
    parser.add_argument("--instruction", action=Several, nargs="+", metavar="TEXT", help='e.g. "make it snow"')
    parser.add_argument(
        "--like",
        type=Path,
        metavar="RESULT",
        help="make a result again by its settings, its source beside it or named; other options replace them",
    )
    parser.add_argument(
        "--verify", type=Path, metavar="RESULT", help="does it come out equal? if not (code 1), what differs is said"
    )
    parser.add_argument(
        "--table",
        type=Path,
        metavar="FILE",
        help="in place of the two: .csv or .jsonl of image, instruction and, at will, seed, text_cfg, image_cfg, steps",
    )
    parser.add_argument(
        "--mask",
        type=Path,
        metavar="FILE",
        help="white where the pictures may change, the rest stays; auto: where the instruction may act (ip2p area)",
    )
    parser.add_argument("--control", metavar="FILE", help="a ControlNet: a file, a diffusers folder, a hub id or a URL")
    parser.add_argument("--control-image", type=Path, metavar="FILE", help="what it looks at, for all pictures")
    parser.add_argument("--control-weight", type=float, default=1.0, help="how strongly it acts (default: 1)")
    parser.add_argument("--detail", action="store_true", help="take the source's detail where the edit only tones it")
    add_model_options(parser, checkpoint=None, usual=BY_PICTURE)
    add_guidance_options(parser)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first result (default: 0)")
    parser.add_argument("--seeds", type=int, default=1, metavar="K", help="results per picture and instruction")
    parser.add_argument(
        "--size",
        default="paper",
        help="paper: the 64 rule of the paper's code; keep: the picture's own; or WxH (default: paper)",
    )
    parser.add_argument("--resolution", type=int, help="longer side that the paper's rule aims at")
    parser.add_argument("--batch", type=int, default=8, help="edits in one batch at most (default: 8)")
    parser.add_argument(
        "--out",
        type=local_path,
        default=Path("."),
        help="a folder, where nothing is overwritten; if there is one result a file, or - (standard output)",
    )
    parser.add_argument("--strict", action="store_true", help="let a broken picture end it, before the network runs")
    parser.add_argument("--png-level", type=int, default=1, metavar="0-9", help="0: fast, 9: small (default: 1)")
    parser.add_argument("--keep-exif", action="store_true", help="the source's EXIF in the result; place and time too")
    parser.add_argument("--json", action="store_true", help="print the settings of each result as JSON")


def _add_demo(commands: Any) -> None:
    parser = add_command(commands, "demo", _demo, "a first edit with the embedded models, no download")
    parser.add_argument("--out", type=local_path, default=Path("ip2p-demo.png"), help="default: ip2p-demo.png")
    parser.add_argument("--seed", type=int, default=0)
    add_model_options(parser, checkpoint="embedded-photos")


def _edit(options: argparse.Namespace) -> int:
    from ..progress import write_line
    from .edit_again import read_again, typed_options, verify
    from .edit_files import STDOUT, Writing, edit_files

    again = None
    if asked := options.verify or options.like:
        if options.table or (options.verify and options.like):
            raise ConfigError("--like, --verify and --table each say what is made; give one of them")
        again = read_again(asked.expanduser(), options, typed_options(options.parser, options.arguments))
        options = again.options
    _check_options(options)
    if again and options.verify:
        return verify(again, load_editor(options), as_json=options.json)
    auto = options.mask == AUTO and not AUTO.exists()
    own = ("size", "resolution", "batch", "detail", "control_weight")
    config = edit_config(options, **{name: getattr(options, name) for name in own}, auto_mask=auto)
    config = again.config if again else config

    def show(row: dict[str, Any]) -> None:
        if again:
            again.compare(row)
        if options.out != STDOUT:
            write_line(json.dumps(row) if options.json else row["file"])

    with TemporaryDirectory(prefix="ip2p-") as scratch:
        edit_files(
            _rows(options, Path(scratch)),
            load=lambda name: load_editor(argparse.Namespace(**{**vars(options), "checkpoint": name})),
            checkpoint=options.checkpoint,
            config=config,
            writing=Writing(
                out=options.out, png_level=options.png_level, keep_exif=options.keep_exif, strict=options.strict
            ),
            show=show,
            mask=None if auto or options.mask is None else options.mask.expanduser(),
            control=options.control_image and options.control_image.expanduser(),
        )
    return 0


def _check_options(options: argparse.Namespace) -> None:
    from .edit_files import STDOUT

    if options.resolution and options.size != "paper":
        raise ConfigError(f"--resolution is for --size paper, and --size is {options.size}; leave one of the two out")
    if bool(options.control) != bool(options.control_image):
        raise ConfigError("a ControlNet and what it looks at go together; give both --control and --control-image")
    if not 0 <= options.png_level <= 9:
        raise ConfigError(f"--png-level is {options.png_level}; give a whole number from 0 to 9")
    if options.json and options.out == STDOUT:
        raise ConfigError("--json and --out - both write to standard output; leave one of the two out")


def _rows(options: argparse.Namespace, scratch: Path) -> list[Any]:
    """The edits that are asked for: a table's rows, or every picture by every instruction with every seed."""
    from .edit_sources import cross, find_sources, read_table

    seeds = range(options.seed, options.seed + check_positive("--seeds", options.seeds))
    if options.table:
        if options.images or options.instruction or options.seeds > 1:
            raise ConfigError("--table brings its own pictures, instructions and seeds; leave the others out")
        return read_table(options.table.expanduser(), options.seed, scratch)
    if not options.images or not options.instruction:
        raise ConfigError('name the pictures first: ip2p edit photo.png --instruction "make it snow" (or --table FILE)')
    return cross(find_sources(options.images, scratch), options.instruction, list(seeds))


def _demo(options: argparse.Namespace) -> None:
    """One picture, four instructions, one strip; photographs keep their own detail."""
    from ..edit import EditConfig
    from ..images import check_output, save_image
    from ..photos import first_edit
    from ..scenes import demo
    from ..strips import strip

    check_output(options.out)
    scenes = options.checkpoint == "embedded"
    world: Any = demo if scenes else first_edit
    source, instructions = world.demo_source(), world.INSTRUCTIONS
    editor = load_editor(options)
    started = time.perf_counter()
    results = editor.edit(source, instructions, seeds=options.seed, config=EditConfig(detail=not scenes))
    seconds = time.perf_counter() - started
    pictures = [result.image for result in results]
    settings = {"edits": [result.settings for result in results]}
    save_image(strip([source, *pictures], ["before", *instructions]), options.out, settings)
    said = demo.describe(pictures) if scenes else []
    made = f"{options.out}: {len(results)} edits in {seconds:.1f} s ({seconds / len(results):.2f} s an edit)"
    sys.stdout.write("\n".join([*said, made, ""]))
