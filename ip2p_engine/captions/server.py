"""Edits from any server that speaks OpenAI's chat protocol."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .chat import ChatClient, ServerConfig, json_objects, picture_part
from .edits import CaptionEdit, Rejected, Request, is_unicode

__all__ = ["PictureRequest", "SeeingSource", "ServerConfig", "ServerSource"]

INSTRUCTION = """\
You write training data for an image editor that follows instructions. You get the caption of a picture. Think of one \
edit of the picture that is interesting and can be seen, and answer with one JSON object and nothing else: \
{"instruction": what a user would ask for, in a few words, "edited_caption": the caption of the edited picture, \
which changes what was asked for and keeps everything else word for word}"""
SEEING = """\
You see a picture before and after an edit. Answer with one JSON object and nothing else: {"caption": the first \
picture in one sentence, "edited_caption": the second picture, word for word the same but for what changed, \
"instruction": what a user would ask for to get from the first to the second, in a few words}"""
EXAMPLES = (
    ("photograph of a girl riding a horse", "have her ride a dragon", "photograph of a girl riding a dragon"),
    ("a small harbour town by the sea", "make it winter", "a small harbour town by the sea in winter"),
    ("a bowl of apples on a table", "swap the apples for lemons", "a bowl of lemons on a table"),
)


class ServerSource(ChatClient[Request, CaptionEdit]):
    """A source of edits; requests run side by side, answers keep their order."""

    _names: tuple[str, ...] = ("instruction", "edited_caption")
    """What an answer has to hold."""

    def propose(self, requests: Sequence[Request]) -> list[CaptionEdit | Rejected]:
        """One answer a request; raises UnfinishedBatch once one has failed for good, and gives the rest up."""
        return self.ask(requests)

    def _messages(self, question: Request) -> list[dict[str, Any]]:
        config = self.config
        messages = [{"role": "system", "content": config.system or INSTRUCTION}]
        for caption, instruction, edited in [tuple(vars(one).values()) for one in config.examples] or EXAMPLES:
            answer = json.dumps({"instruction": instruction, "edited_caption": edited})
            messages += [{"role": "user", "content": caption}, {"role": "assistant", "content": answer}]
        return [*messages, {"role": "user", "content": question.caption}]

    def _read(self, question: Request, text: str) -> CaptionEdit | None:
        edit = fields_of(text, self._names)
        return None if edit is None else CaptionEdit(**{"caption": question.caption, **edit})

    def _harmless(self) -> Request:
        return Request.make(EXAMPLES[0][0], 0, 0)

    def _seed(self, question: Request) -> int:
        return question.seed


@dataclass(frozen=True, kw_only=True)
class PictureRequest(Request):
    """Two pictures to be described, as JPEG."""

    before: bytes
    after: bytes


class SeeingSource(ServerSource):
    """A vision model that describes both pictures of a pair, and says what was asked for."""

    _names = ("caption", "instruction", "edited_caption")

    def _messages(self, question: Request) -> list[dict[str, Any]]:
        content: list[dict[str, Any]] = [{"type": "text", "text": self.config.system or SEEING}]
        if isinstance(question, PictureRequest):
            content += [picture_part(data, "jpeg") for data in (question.before, question.after)]
        return [{"role": "user", "content": content}]


def fields_of(text: str, names: Sequence[str]) -> dict[str, str] | None:
    """The texts under these names in the last JSON object that has them, or None."""
    for fields in json_objects(text):
        values = [fields.get(name) for name in names]
        if all(isinstance(value, str) and value.strip() and is_unicode(value) for value in values):
            return {name: " ".join(str(value).split()) for name, value in zip(names, values, strict=True)}
    return None
