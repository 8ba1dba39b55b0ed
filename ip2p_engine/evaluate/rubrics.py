"""What a judge that sees is asked, and what its answers amount to.

VIEScore (Ku et al. 2024) as GEdit-Bench (Liu et al. 2025) has it: two sub-scores of following and two of quality, 0 to
10; the smallest of each, and overall the root of their product. ImgEdit (Ye et al. 2025): three scores by kind of edit,
1 to 5, and overall their mean. The words are our own, so the scores are not the benchmarks': whoever changes one of
them counts ``version`` up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from ..files import digest_of_text

__all__ = ["RUBRICS", "Part", "Rubric", "imgedit_kind"]

Scores = Sequence[float]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One question to the judge."""

    name: str
    criteria: tuple[str, ...]
    """What each number of an answer is of."""
    text: str
    both: bool = True
    """Whether the picture before the edit is shown as well."""


@dataclass(frozen=True, kw_only=True)
class Rubric:
    """A benchmark's way to judge."""

    name: str
    title: str
    version: int
    lowest: int
    highest: int
    area: int | None
    """Pixels of a picture as it is shown; None shows it as it is."""
    parts: Callable[[str | None, str], tuple[Part, ...]]
    """The questions of an edit, by its kind and instruction."""
    marks: Callable[[Mapping[str, Scores]], dict[str, float]]
    """What the answers amount to, "overall" last."""
    names: tuple[str, ...]
    """Of the marks."""
    published: Mapping[str, float]
    """Overall marks of papers, by the benchmark's own judge and prompts."""
    published_by: str

    @property
    def prompts(self) -> str:
        """A digest of all that is asked."""
        asked = (part.text for kind in (None, *IMGEDIT) for part in self.parts(kind, "{instruction}"))
        return digest_of_text("\n".join(dict.fromkeys(asked)))[:8]


ANSWER = """
Answer with one JSON object and nothing else: {{"reasoning": one short sentence, "score": [{numbers}]}}"""

FOLLOWING = """\
The first picture is the original. The second is what an image editor made of it. It was asked: "{instruction}"
Give two whole numbers from 0 to 10.
First, was the request carried out? 0: there is nothing of it to be seen. 10: all of it is there, exactly as asked.
Second, was the rest left alone? 0: the second picture shows something else altogether. 10: nothing has changed but \
what had to.
Go by what can be seen. If both pictures are the same, nothing was carried out and all was left alone."""
QUALITY = """\
An image editor made this picture. Give two whole numbers from 0 to 10.
First, does it look natural? 0: light, shadows, distances or proportions cannot be, or parts do not belong together. \
10: it could be a picture that nobody edited.
Second, is it free of flaws? 0: large parts are distorted, smeared, noisy or cut off, or faces, hands and bodies are \
malformed. 10: there is no such flaw."""


def _viescore(kind: str | None, instruction: str) -> tuple[Part, ...]:
    answer = ANSWER.format(numbers="first number, second number")
    return (
        Part(
            name="following",
            criteria=("carried out", "left alone"),
            text=FOLLOWING.format(instruction=instruction) + answer,
        ),
        Part(name="quality", criteria=("natural", "free of flaws"), text=QUALITY + answer, both=False),
    )


def _viescore_marks(scores: Mapping[str, Scores]) -> dict[str, float]:
    following, quality = float(min(scores["following"])), float(min(scores["quality"]))
    return {"SC": following, "PQ": quality, "overall": math.sqrt(following * quality)}


GRADES = """\
The first picture is the original. The second is what an image editor made of it. It was asked: "{instruction}"
Give three whole numbers from 1 to 5: 1 is failed, 2 poor, 3 fair, 4 good with small faults, 5 without fault.
First, {first}
Second, {second}
Third, {third}
What was not carried out cannot have been carried out well: neither the second nor the third number may be larger \
than the first."""
IMGEDIT = {
    "add": (
        "is what should be added there, as it was described, where and as often as asked?",
        "does it belong to the picture: its edges, size, perspective, style, light and shadow?",
        "is all that was there before still there and unchanged, and nothing impossible covered or passed through?",
    ),
    "remove": (
        "is what should go gone, all of it, and nothing else?",
        "is the place where it was filled so that nobody would know: texture, lines that go on, no trace or shadow?",
        "is all the rest unchanged, and what now shows behind it plausible?",
    ),
    "replace": (
        "was the right thing replaced by what was asked for, wholly?",
        "does the new thing belong to the picture: its edges, size, perspective, style, light and shadow?",
        "is all the rest unchanged, and does the new thing stand or lie as it would?",
    ),
    "alter": (
        "did the right thing get the property that was asked for, and only that property?",
        "does the changed part look real: even, without spill over its edges, in keeping with the light?",
        "are shape, texture and details of the thing, and all the rest, as they were?",
    ),
    "background": (
        "is the surrounding what was asked for, all of it?",
        "are the edges of what stands before it clean, and do light and perspective of both agree?",
        "is what stands before it unchanged, with all its details?",
    ),
    "style": (
        "is the picture in the style that was asked for, everywhere?",
        "is it done well: even, detailed, without smears and patches of the old style?",
        "are the things of the picture, their places and their shapes still the same?",
    ),
    "extract": (
        "is the thing that was asked for shown, the right one and all of it?",
        "is it cut out cleanly: sharp edges, nothing of its surroundings left, a plain ground?",
        "are its shape, colours and details those of the original?",
    ),
    "action": (
        "does the right one do, or hold itself, as asked?",
        "does the new posture look real: joints, limbs, clothes, no doubled or missing parts?",
        "is it still the same one, with the same face, clothes and surroundings?",
    ),
    "compose": (
        "was every one of the requests carried out?",
        "do all the changes look real, and fit one another and the picture?",
        "is all that nobody spoke of unchanged?",
    ),
    "other": (
        "was the request carried out, all of it and nothing else?",
        "does the change look real: edges, texture, perspective, light and shadow?",
        "is all that nobody spoke of unchanged, with its details?",
    ),
}
"""What is asked about a kind of edit: was it done, was it done well, was the rest kept."""
SYNONYMS = {"adjust": "alter", "attribute": "alter", "color": "alter", "colour": "alter", "hybrid": "compose"}
SYNONYMS |= {"addition": "add", "removal": "remove", "replacement": "replace", "motion": "action"}


def imgedit_kind(kind: str | None) -> str:
    """ImgEdit's name of a kind of edit; "other" where it has none."""
    plain = (kind or "").strip().lower()
    found = SYNONYMS.get(plain, plain)
    return found if found in IMGEDIT else "other"


def _imgedit(kind: str | None, instruction: str) -> tuple[Part, ...]:
    first, second, third = IMGEDIT[imgedit_kind(kind)]
    text = GRADES.format(instruction=instruction, first=first, second=second, third=third)
    answer = ANSWER.format(numbers="first number, second number, third number")
    return (Part(name="edit", criteria=("done", "done well", "kept"), text=text + answer),)


def _imgedit_marks(scores: Mapping[str, Scores]) -> dict[str, float]:
    done, well, kept = map(float, scores["edit"])
    return {"done": done, "done well": well, "kept": kept, "overall": fmean((done, well, kept))}


RUBRICS = {
    "viescore": Rubric(
        name="viescore",
        title="GEdit-Bench (VIEScore)",
        version=1,
        lowest=0,
        highest=10,
        area=512 * 512,
        parts=_viescore,
        marks=_viescore_marks,
        names=("SC", "PQ", "overall"),
        published={
            "InstructPix2Pix": 3.22,
            "MagicBrush": 4.19,
            "AnyEdit": 2.85,
            "FLUX.1 Kontext dev": 6.26,
            "GPT-4o": 7.49,
        },
        published_by="GEdit-Bench-EN's own prompts and judge",
    ),
    "imgedit": Rubric(
        name="imgedit",
        title="ImgEdit",
        version=1,
        lowest=1,
        highest=5,
        area=None,
        parts=_imgedit,
        marks=_imgedit_marks,
        names=("done", "done well", "kept", "overall"),
        published={
            "InstructPix2Pix": 1.88,
            "MagicBrush": 1.90,
            "AnyEdit": 2.45,
            "UltraEdit": 2.70,
            "Step1X-Edit": 3.06,
            "FLUX.1 Kontext dev": 3.52,
            "GPT-4o": 4.20,
        },
        published_by="ImgEdit's own prompts and judge",
    ),
}
