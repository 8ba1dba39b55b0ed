"""Published layouts of edit data, by the names of their columns: which column is which part of a pair."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import DatasetError
from .record import SCORES

__all__ = [
    "LAYOUTS",
    "ONE_OF_A_PAIR",
    "Layout",
    "cell",
    "inline_picture",
    "is_inline",
    "is_picture",
    "layout_of",
    "table_text",
]

CLIP = {"clip_sim_source": "sim_0", "clip_sim_target": "sim_1"}
CLIP |= {"clip_sim_dir": "sim_direction", "clip_sim_image": "sim_image"}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the parts of a pair stand; a name with dots reaches into lists and JSON, such as ``json.edit``."""

    name: str
    before: str
    instruction: str | tuple[str, ...]
    """One column, of a text or a list of texts; or several, each another way to say the edit."""
    after: str
    caption: str = ""
    edited_caption: str = ""
    inverse: str = ""
    """The instruction that leads back."""
    mask: str = ""
    kind: str = ""
    session: str = ""
    licence: str = ""
    key: str = ""
    paraphrases: str = ""
    own_scores: str = ""
    """Numbers by name in one column."""
    numbers: Mapping[str, str] = field(default_factory=dict)
    """{their column: seed, p, cfg or one of SCORES}."""
    scores: tuple[str, ...] = ()
    without: str = ""
    """Rows that have a value here are of another task."""

    @property
    def instructions(self) -> tuple[str, ...]:
        return (self.instruction,) if isinstance(self.instruction, str) else self.instruction

    def fits(self, names: Sequence[str]) -> bool:
        """Whether a table with these columns can be read so."""
        return all(_there(name, names) for name in (self.before, self.after, *self.instructions))

    def columns(self) -> list[str]:
        """The columns, as far as the layout knows them, without what leads into them."""
        parts = (getattr(self, name) for name in list(NAMES)[3:])
        every = (self.before, *self.instructions, self.after, *parts, self.without, *self.numbers, *self.scores)
        return [name for name in dict.fromkeys(every) if name]


LAYOUTS = (
    Layout(
        name="timbrooks/instructpix2pix-clip-filtered",
        before="original_image",
        instruction="edit_prompt",
        after="edited_image",
        caption="original_prompt",
        edited_caption="edited_prompt",
    ),
    Layout(
        name="osunlp/MagicBrush",
        before="source_img",
        instruction="instruction",
        after="target_img",
        mask="mask_img",
        session="img_id",
        caption="source_global_caption",
        edited_caption="target_global_caption",
    ),
    Layout(
        name="UCSC-VLAA/HQ-Edit",
        before="input_image",
        instruction="edit",
        after="output_image",
        caption="input",
        edited_caption="output",
        inverse="inverse_edit",
    ),
    Layout(
        name="BleachNick/UltraEdit",
        before="source_image",
        instruction="edit_prompt",
        after="edited_image",
        caption="source_caption",
        edited_caption="target_caption",
        mask="mask_image",
        scores=("dinov2_sim", "ssim"),
    ),
    Layout(
        name="TIGER-Lab/OmniEdit-Filtered-1.2M",
        before="src_img",
        instruction="edited_prompt_list",
        after="edited_img",
        kind="task",
        scores=("sc_score_1", "sc_score_2", "pq_score", "o_score"),
    ),
    Layout(
        name="Bin1117/AnyEdit",
        before="image_file",
        instruction="edit_instruction",
        after="edited_file",
        caption="input",
        edited_caption="output",
        kind="edit_type",
        without="visual_input",
    ),
    Layout(name="AILab-CVC/SEED-Data-Edit", before="source_image", instruction="instruction", after="target_image"),
    Layout(
        name="apple/pico-banana-400k",
        before="local_input_image",
        instruction="text",
        after="output_image",
        kind="edit_type",
    ),
    Layout(
        name="apple/pico-banana-400k (addresses)",
        before="open_image_input_url",
        instruction="text",
        after="output_image",
        kind="edit_type",
    ),
    Layout(
        name="paint-by-inpaint/PIPE",
        before="source_img",
        after="target_img",
        instruction=("Instruction_VLM-LLM", "Instruction_Class", "Instruction_Ref_Dataset"),
    ),
    Layout(
        name="fusing/instructpix2pix-1000-samples",
        before="input_image",
        instruction="edit_prompt",
        after="edited_image",
    ),
    Layout(
        name="chat (ImgEdit, GPT-Image-Edit)", before="image.0", instruction="conversations.0.value", after="image.-1"
    ),
    Layout(name="chat (messages)", before="images.0", instruction="messages.0.content", after="images.-1"),
    Layout(name="DiffSynth-Studio", before="edit_image", instruction="prompt", after="image"),
    Layout(name="musubi-tuner", before="control_path", instruction="caption", after="image_path"),
    Layout(name="musubi-tuner (numbered)", before="control_path_0", instruction="caption", after="image_path"),
    Layout(name="webdataset", before="source.jpg", instruction="json.edit", after="target.jpg"),
    Layout(name="folder pairs", before="control", instruction="txt", after="target"),
)
"""The first that fits is taken; where none does, NAMES decide, and they find the parts that a layout does not name."""

NAMES = {
    "before": "original_image source_image source_img src_img src_image input_image input_img before_image "
    "image_before before image_file control_image control_path control_path_0 conditioning_image kontext_images "
    "local_input_image open_image_input_url source original control input source.jpg source.png source.webp "
    "input.jpg input.png original.jpg original.png before.jpg before.png",
    "after": "edited_image target_image target_img edited_img tgt_img output_image output_img after_image image_after "
    "after edited_file image_path target edited output image target.jpg target.png target.webp output.jpg output.png "
    "edited.jpg edited.png after.jpg after.png",
    "instruction": "edit_prompt edit_instruction instruction edit editing_prompt edit_text instructions prompt "
    "edited_prompt_list text caption json.edit json.edit_prompt json.instruction json.prompt edit.txt "
    "instruction.txt prompt.txt txt",
    "caption": "original_prompt source_caption original_caption source_prompt caption input json.input "
    "json.original_prompt",
    "edited_caption": "edited_prompt target_caption edited_caption target_prompt output json.output json.edited_prompt",
    "inverse": "inverse_edit inverse_instruction inverse_prompt",
    "mask": "mask mask_img mask_image mask_file mask.png",
    "kind": "kind edit_type task task_type edit_kind",
    "session": "session session_id",
    "licence": "licence license",
    "key": "key",
    "paraphrases": "paraphrases",
    "own_scores": "scores",
}
"""Each part's names in the field, the likeliest first; a column that one part has taken is no other's."""
LONE = "image file_name jpg jpeg png webp"
LAST = {"before at last": f"{LONE} 0.jpg 0.png 0.webp", "after at last": f"{LONE} 1.jpg 1.png 1.webp"}
"""What is the one picture where the other has a name that says what it is."""
BEFORE_WORDS = (
    "source src input in original orig before start pre control conditioning condition reference ref init first"
)
AFTER_WORDS = "target tgt output out edited edit after end post result final modified second"
INSTRUCTION_WORDS = "instruction instructions instr edit prompt request command text caption"
ENGLISH = {"en", "eng", "english"}
FILLERS = (
    "image images img imgs picture pictures photo pic file files path paths url urls filename name local data bytes "
    "the pair pairs jpg jpeg png webp json txt"
)
"""Of columns that no name above is: what their words say, the likeliest first, beside words that say nothing."""
PARTS = (*BEFORE_WORDS.split(), *AFTER_WORDS.split(), "mask")
ONE_OF_A_PAIR = re.compile(rf"(?P<root>.+?)[-_. ](?P<part>{'|'.join(PARTS)})", re.IGNORECASE)
"""The names of files that say which part of which pair they are."""
NUMBERS = CLIP | {name: name for name in ("seed", "p", "cfg", *SCORES)}
INLINE, SHORTEST = "data:image/", 64
BEGINNINGS = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*")
"""Of the files that are written as base64."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".jp2", ".ppm")
WHAT = {"before": "picture before", "after": "picture after", "instruction": "instruction"}
PICTURE_PARTS = ("before", "after", "mask", *LAST)


def layout_of(
    names: Sequence[str], sample: Sequence[Mapping[str, Any]], columns: Sequence[str] | None, place: str
) -> Layout:
    """The layout of a table by its columns and its first rows; ``columns`` name picture, instruction, edited picture.

    Raises DatasetError where nothing fits, with what is there.
    """
    if columns is not None:
        for column in columns:
            if not _there(column, names):
                raise DatasetError(
                    f"{place} has the columns {_listed(names)} and no {column!r}; name three with `columns`"
                )
        before, instruction, after = columns
        same = (one for one in LAYOUTS if (one.before, one.instruction, one.after) == (before, instruction, after))
        found = next(same, None) or Layout(name="columns", before=before, instruction=instruction, after=after)
        return _filled(found, names, sample)
    fitting = next((layout for layout in LAYOUTS if layout.fits(names)), None)
    return _filled(fitting or _by_names(names, sample, place), names, sample)


def _by_names(names: Sequence[str], sample: Sequence[Mapping[str, Any]], place: str) -> Layout:
    found: dict[str, Any] = _two_in_one(sample) or _two_by_number(sample)
    for part in ("before", "after", "instruction"):
        if part in found:
            continue
        known = list(found.values())
        taken = _named(part, names, sample, known) or _worded(part, sample, known, place)
        taken = taken or _named(f"{part} at last", names, sample, known)
        if not taken:
            said = f"{place} has the columns {_listed(names)}, of which none is known for the {WHAT[part]}"
            raise DatasetError(f"{said}; name picture, instruction and edited picture with `columns`")
        found[part] = taken
    return Layout(name="by the names of its columns", **found)


def _two_in_one(sample: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The only column of pictures, but for a mask, where it is a list of two, before and after."""
    lists = [
        name for name, one in _values(sample) if isinstance(one, list | tuple) and one and all(map(is_picture, one))
    ]
    if len(lists) != 1 or len(_first(sample, lists[0])) != 2 or set(_pictures(sample)) - set(lists):
        return {}
    return {"before": f"{lists[0]}.0", "after": f"{lists[0]}.-1"}


def _pictures(sample: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns of a picture, but for masks."""
    return [name for name, one in _values(sample) if is_picture(one) and name not in NAMES["mask"].split()]


def _two_by_number(sample: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The only two columns of pictures, but for a mask, whose names differ by a number alone, the lower one before."""
    pictures = _pictures(sample)
    numbers = {int(found[1]): name for name in pictures if (found := re.search(r"(\d{1,9})\D*$", name))}
    if len(pictures) != 2 or len(numbers) != 2 or len({re.sub(r"\d+", "", name) for name in pictures}) != 1:
        return {}
    return {"before": numbers[min(numbers)], "after": numbers[max(numbers)]}


def _worded(part: str, sample: Sequence[Mapping[str, Any]], taken: Sequence[str], place: str) -> str:
    """A column that the words of its name make a part's; empty if none is. Raises DatasetError where several are."""
    words = {"before": BEFORE_WORDS, "after": AFTER_WORDS, "instruction": INSTRUCTION_WORDS}[part].split()
    found: dict[str, int] = {}
    for name, value in _values(sample):
        own = [word for word in _words(name) if word not in FILLERS.split()]
        fits = is_picture(value) if part != "instruction" else isinstance(value, str | list) and not is_picture(value)
        if name in taken or not own or not fits:
            continue
        ranks = [words.index(word) for word in own if word in words]
        if ranks and (part == "instruction" or len(ranks) == len(own)):
            found[name] = min(ranks)
    best = [name for name, rank in found.items() if rank == min(found.values())]
    best = [name for name in best if ENGLISH & set(_words(name))] or best
    if len(best) > 1:
        raise DatasetError(
            f"{place} has {' and '.join(best)}, each of which could be the {WHAT[part]}; "
            "name picture, instruction and edited picture with `columns`"
        )
    return best[0] if best else ""


def _words(name: str) -> list[str]:
    """Of source_image, sourceImage and source.image1."""
    parts = re.split(r"[\W_\d]+|(?<=[a-z])(?=[A-Z])", name)
    return [part.lower() for part in parts if part]


def _values(sample: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Any]]:
    """(name, first value) of the columns, and with dots of what lies one level below in objects."""
    names: dict[str, None] = {}
    for row in sample:
        for name, value in row.items():
            names[str(name)] = None
            if isinstance(value, Mapping) and not is_picture(value):
                names.update({f"{name}.{below}": None for below in value})
    yield from ((name, value) for name in names if (value := _first(sample, name)) is not None)


def _filled(layout: Layout, names: Sequence[str], sample: Sequence[Mapping[str, Any]]) -> Layout:
    """With the parts that are there under their names, and without those that are not."""
    parts: dict[str, Any] = {}
    used = [layout.before, layout.after, *layout.instructions]
    for part in list(NAMES)[3:]:
        own = getattr(layout, part)
        parts[part] = own if own and _there(own, names) else _named(part, names, sample, [*used, *parts.values()])
    scores = layout.scores or tuple(name for name in names if "score" in name and _is_number(_first(sample, name)))
    return replace(
        layout,
        **parts,
        without=layout.without if _there(layout.without, names) else "",
        numbers={theirs: ours for theirs, ours in NUMBERS.items() if theirs in names},
        scores=tuple(name for name in scores if name in names),
    )


def _named(part: str, names: Sequence[str], sample: Sequence[Mapping[str, Any]], taken: Sequence[str]) -> str:
    """The first of a part's names that is there and holds what belongs there; empty if none does."""
    known = (NAMES.get(part) or LAST.get(part, "")).split()
    english = [f"{name}_en" for name in known] if part == "instruction" else []
    for name in (*english, *known):
        if name in taken or not _there(name, names):
            continue
        value = _first(sample, name)
        if value is None and name not in names:
            continue
        fits = not isinstance(value, Mapping) or is_picture(value)
        if value is None or part == "own_scores" or (fits and is_picture(value) == (part in PICTURE_PARTS)):
            return name
    return ""


def _there(name: str, names: Sequence[str]) -> bool:
    """A column, or where one leads into; ``source.jpg`` of a tar does not lead into ``source``."""
    return bool(name) and (name in names or (name.partition(".")[0] in names and not name.endswith(SUFFIXES)))


def _first(sample: Sequence[Mapping[str, Any]], name: str) -> Any:
    return next((value for value in (cell(row, name) for row in sample) if value is not None), None)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_picture(value: Any) -> bool:
    """Whether a value can be a picture: bytes, the hub's form, a decoded one, a path or address, or one in a list."""
    if isinstance(value, list | tuple):
        return len(value) == 1 and is_picture(value[0])
    if isinstance(value, str):
        return value.startswith(("http://", "https://")) or value.lower().endswith(SUFFIXES) or is_inline(value)
    if isinstance(value, Mapping):
        return {"bytes", "path"} <= set(value)
    return not isinstance(value, bool | int | float)


def is_inline(text: str) -> bool:
    """Whether a text is a picture itself: an address with it inside, or base64."""
    if text.startswith(INLINE):
        return True
    start = "".join(text[:SHORTEST].split())
    if len(text) < SHORTEST or not re.fullmatch(r"[A-Za-z0-9+/]+", start):
        return False
    return base64.b64decode(start[: len(start) // 4 * 4]).startswith(BEGINNINGS)


def inline_picture(text: str) -> bytes | None:
    """The file that a text spells out in base64; None for any other text. Raises DatasetError for broken base64."""
    if not is_inline(text):
        return None
    packed = text.partition(";base64,")[2] if text.startswith(INLINE) else text
    try:
        return base64.b64decode("".join(packed.split()), validate=True)
    except ValueError as error:
        raise DatasetError(f"a picture written as text is no base64 ({error}); correct it") from error


def table_text() -> str:
    """The table of layouts for people, in Markdown."""
    head = ["layout", "picture", "instruction", "edited picture", "also read"]
    rows = [head, ["---"] * len(head)]
    for one in LAYOUTS:
        named = (*one.instructions, one.before, one.after)
        others = [name for name in (*one.columns(), *one.scores) if name not in named]
        cells = [one.before, " or ".join(one.instructions), one.after, ", ".join(dict.fromkeys(others))]
        rows.append([one.name, *(f"`{cell}`" if cell and " " not in cell else cell for cell in cells)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def cell(row: Mapping[str, Any], name: str) -> Any:
    """A row's value; dots lead into objects by name and into lists by number. None where nothing is there."""
    if not name or "." not in name or row.get(name) is not None:
        return row.get(name)
    value: Any = row
    for part in name.split("."):
        if isinstance(value, Mapping):
            value = value.get(part)
        elif isinstance(value, list | tuple) and part.lstrip("-").isdecimal() and -len(value) <= int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(str, names[:30]))[:600]
    return shown + (" ..." if len(names) > 30 else "")
