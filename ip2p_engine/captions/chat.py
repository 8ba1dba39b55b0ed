"""Many questions to any server that speaks OpenAI's chat protocol, local or remote.

The standard library's HTTP client is enough for one kind of POST, and what matters here, waiting as the server asks,
is in none of the client libraries completely: a limit that one request meets holds all of them back.
"""

from __future__ import annotations

import base64
import email.utils
import http.client
import json
import logging
import os
import queue
import random
import re
import threading
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from ..errors import CaptionError, ConfigError
from ..files import NO_JSON
from ..version import __version__
from .edits import CaptionEdit, Rejected, UnfinishedBatch

__all__ = ["ChatClient", "ServerConfig", "json_objects", "picture_part"]

log = logging.getLogger(__name__)
TRANSIENT = (408, 409, 425, 429, 500, 502, 503, 504, 529)
# One question that the server's policy or its model's context refuses, or a wrong setting.
PERHAPS_OF_ONE_QUESTION = (400, 413, 422)
ADJUSTABLE = ("max_tokens", "max_completion_tokens", "temperature", "seed")
LONGER = 16
THOUGHTS = re.compile(r"<(think|thinking|reasoning)>.*?</\1>|^.*</(think|thinking|reasoning)>", re.DOTALL)
MAX_ANSWER, LONGEST_ASKED, LOOK_UP = 1_000_000, 3600.0, 0.5

Question = TypeVar("Question")
Answer = TypeVar("Answer")


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Where the server is, and how patient and how busy to be."""

    base_url: str
    """Up to and without /chat/completions, such as http://127.0.0.1:8000/v1."""
    model: str
    key_variable: str = "OPENAI_API_KEY"
    """The environment variable with the key; a key is never a setting, so that none is saved. Unset: no key is sent."""
    temperature: float = 0.7
    """As in the paper's code."""
    max_tokens: int = 256
    """Of an answer; one that is cut off is asked for again with up to sixteen times as many, as models that think need.
    Servers that want max_completion_tokens, or take no temperature or seed, say so and get what they want."""
    system: str = ""
    """What the model is told first; empty for our own text, which asks for instruction and edited_caption as JSON."""
    examples: tuple[CaptionEdit, ...] = ()
    """Answers to show it; none for our own three."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """More fields of the request, such as {"reasoning_effort": "low"}; they win over ours."""
    concurrency: int = 4
    """Requests under way at one time."""
    retries: int = 8
    """After the first attempt, of errors that may pass: limits, server errors, lost connections."""
    timeout: float = 120.0
    """Seconds that one attempt may be silent."""
    first_wait: float = 1.0
    """Seconds before the first retry; doubled for each further one, with jitter of half to all of it."""
    longest_wait: float = 120.0

    def __post_init__(self) -> None:
        if not re.fullmatch(r"https?://[^\s/]+[!-~]*", self.base_url):
            raise ConfigError(f"base_url is {self.base_url!r}; give an address such as http://127.0.0.1:8000/v1")
        if not self.model:
            raise ConfigError("model is empty; give the name under which the server knows it")
        for name, least in (("concurrency", 1), ("retries", 0), ("max_tokens", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; give a whole number of at least {least}")
        for name in ("timeout", "first_wait", "longest_wait"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; give seconds above 0")


CUT_OFF = Rejected(reason="cut off")
"""The answer reached max_tokens before it was one."""


class ChatClient(ABC, Generic[Question, Answer]):
    """Puts questions to a server, several at one time; a kind of question says how it is put and read."""

    def __init__(self, config: ServerConfig, on_wait: Callable[[], None] | None = None) -> None:
        """``on_wait`` is called between answers, at least twice a second; what it raises ends the waiting.

        Raises ConfigError for a key that no header can carry.
        """
        self.config, self.name, self._on_wait = config, config.model, on_wait
        self._key = _key(config.key_variable)
        self.batch = 8 * config.concurrency
        self._gate = _Gate()
        self._unwanted: set[str] = set()
        self._answers, self._trial = False, threading.Lock()
        # No redirects: the key would go wherever they lead.
        self._opener = urllib.request.build_opener(_NoRedirects)

    @abstractmethod
    def _messages(self, question: Question) -> list[dict[str, Any]]:
        """What the server is sent."""

    @abstractmethod
    def _read(self, question: Question, text: str) -> Answer | None:
        """What an answer says, or None if it is none."""

    @abstractmethod
    def _harmless(self) -> Question:
        """A question that no policy refuses."""

    @abstractmethod
    def _seed(self, question: Question) -> int:
        """Of the server's randomness, for servers that take one."""

    def answers(self, questions: Sequence[Question]) -> Iterator[tuple[int, Answer | Rejected]]:
        """(place, answer) as they come; raises CaptionError once one has failed for good, and gives the rest up."""
        self._gate.open()
        work: queue.SimpleQueue[tuple[int, Question]] = queue.SimpleQueue()
        found: queue.SimpleQueue[tuple[int, Answer | Rejected | BaseException]] = queue.SimpleQueue()
        for one in enumerate(questions):
            work.put(one)
        # Daemons, since an executor's threads would keep the process until the last silent server has timed out.
        for _ in range(min(self.config.concurrency, len(questions))):
            threading.Thread(target=self._work_off, args=(work, found), daemon=True).start()
        try:
            left = len(questions)
            while left:
                if self._on_wait is not None:
                    self._on_wait()
                try:
                    place, answer = found.get(timeout=LOOK_UP)
                except queue.Empty:
                    continue
                if isinstance(answer, BaseException):
                    raise answer
                left -= 1
                yield place, answer
        finally:
            self._gate.close()

    def ask(self, questions: Sequence[Question]) -> list[Answer | Rejected]:
        """One answer a question, in their order; raises UnfinishedBatch with those that came before one failed."""
        answers: list[Answer | Rejected | None] = [None] * len(questions)
        try:
            for place, answer in self.answers(questions):
                answers[place] = answer
        except CaptionError as error:
            raise UnfinishedBatch(str(error), answers) from error
        return [answer for answer in answers if answer is not None]

    def _work_off(self, work: queue.SimpleQueue[Any], found: queue.SimpleQueue[Any]) -> None:
        while True:
            try:
                place, question = work.get_nowait()
            except queue.Empty:
                return
            try:
                found.put((place, self._ask(question)))
            except BaseException as error:
                found.put((place, error))

    def _ask(self, question: Question) -> Answer | Rejected:
        """The server's answer; a refusal counts as one if it is of this question alone, and else ends the run."""
        try:
            return self._answer(question)
        except _Refused as refusal:
            if refusal.code in PERHAPS_OF_ONE_QUESTION and self._takes_others():
                return Rejected(reason="refused", text=refusal.said)
            raise

    def _takes_others(self) -> bool:
        """Whether the server answers at all; until it has, it is asked what nobody minds."""
        with self._trial:
            try:
                if not self._answers:
                    self._answer(self._harmless())
            except _Refused:
                return False
        return True

    def _answer(self, question: Question) -> Answer | Rejected:
        room, attempt, messages = self.config.max_tokens, 0, self._messages(question)
        while True:
            self._gate.wait()
            body = self._body(question, messages, room)
            try:
                answer = self._parsed(question, self._post(json.dumps(body).encode()))
                self._answers = True
                if answer != CUT_OFF or room >= LONGER * self.config.max_tokens:
                    return answer
                room *= 4
            except _Refused as refusal:
                if refusal.code not in PERHAPS_OF_ONE_QUESTION or not self._gives_up(body, refusal.said):
                    raise
            except _Passing as trouble:
                if attempt == self.config.retries:
                    tried = f"{self.config.base_url} failed {attempt + 1} times, at last with: {trouble}"
                    raise CaptionError(f"{tried}; see to the server, then repeat the same call") from trouble
                self._hold_back(trouble, attempt)
                attempt += 1

    def _body(self, question: Question, messages: list[dict[str, Any]], room: int) -> dict[str, Any]:
        """Without the fields that the server has refused."""
        config = self.config
        fields = {"temperature": config.temperature, "max_tokens": room, "seed": self._seed(question) % 2**31}
        if "max_tokens" in self._unwanted:
            fields["max_completion_tokens"] = room
        told = {name: value for name, value in fields.items() if name not in self._unwanted}
        return {"model": config.model, "messages": messages, **told, **config.extra}

    def _parsed(self, question: Question, reply: Any) -> Answer | Rejected:
        """What a chat answer says; _Passing if it is no chat answer, Rejected if the model wrote something else."""
        try:
            choice = reply["choices"][0]
            content = choice["message"]["content"]
        except (KeyError, IndexError, TypeError) as error:
            raise _Passing(f"an answer without choices: {json.dumps(reply)[:200]}") from error
        answer = self._read(question, THOUGHTS.sub("", _said(content)))
        if answer is not None:
            return answer
        if choice.get("finish_reason") == "length":
            return CUT_OFF
        shown = content if isinstance(content, str) else "" if content is None else json.dumps(content)[:1000]
        return Rejected(reason="malformed", text=shown)

    def _gives_up(self, body: Mapping[str, Any], said: str) -> bool:
        """Whether a refusal names a field that can be left out, or called otherwise, from now on."""
        named = [name for name in ADJUSTABLE if name in body and re.search(rf"\b{name}\b", said)]
        new = set(named[:1]) - set(self.config.extra)
        for name in new - self._unwanted:
            log.info("%s takes no %s", self.config.base_url, name)
        self._unwanted |= new
        return bool(new)

    def _hold_back(self, trouble: _Passing, attempt: int) -> None:
        """This request waits twice as long each time; what the server asks for holds all of them."""
        log.info("%s: %s", self.config.base_url, trouble)
        if trouble.wait > LONGEST_ASKED:
            asked = f"{self.config.base_url} asks to wait {trouble.wait / 3600:.1f} hours ({trouble})"
            raise CaptionError(f"{asked}; repeat the same call then")
        self._gate.hold(trouble.wait)
        pause = min(self.config.longest_wait, self.config.first_wait * 2**attempt)
        self._gate.sleep(pause * random.uniform(0.5, 1))

    def _post(self, body: bytes) -> Any:
        """The server's answer as JSON; _Passing for trouble that may pass, CaptionError for the rest."""
        url = self.config.base_url.rstrip("/") + "/chat/completions"
        headers = {"Content-Type": "application/json", "User-Agent": f"ip2p/{__version__}"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        post = urllib.request.Request(url, data=body, headers=headers)  # base_url is http or https
        try:
            with self._opener.open(post, timeout=self.config.timeout) as answer:
                self._gate.hold(_used_up(answer.headers))
                content = answer.read(MAX_ANSWER)
        except urllib.error.HTTPError as error:
            said = f"HTTP {error.code} {_message(error)}".strip()
            if error.code not in TRANSIENT:
                raise _Refused(url, said, error.code) from error
            raise _Passing(said, _asked_wait(error.headers)) from error
        except (OSError, http.client.HTTPException) as error:
            raise _Passing(f"{type(error).__name__}: {error}") from error
        try:
            return json.loads(content)
        except NO_JSON as error:
            raise _Passing(f"{type(error).__name__}: {error}") from error


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments: Any) -> None:
        return None


class _Refused(CaptionError):
    """An answer of the server's that no patience changes."""

    def __init__(self, url: str, said: str, code: int) -> None:
        super().__init__(f"{url} refused the request ({said}); check address, model and key")
        self.said, self.code = said, code


class _Passing(Exception):
    """Trouble that may pass; ``wait`` is how many seconds the server asks for."""

    def __init__(self, said: str, wait: float = 0.0) -> None:
        super().__init__(said)
        self.wait = wait


class _Gate:
    """Holds all requests back until a moment, and lets waiting ones go when the work is given up."""

    def __init__(self) -> None:
        self._until, self._lock, self._closed = 0.0, threading.Lock(), threading.Event()

    def open(self) -> None:
        self._closed.clear()

    def close(self) -> None:
        self._closed.set()

    def hold(self, seconds: float) -> None:
        with self._lock:
            self._until = max(self._until, time.monotonic() + seconds)

    def wait(self) -> None:
        while (left := self._until - time.monotonic()) > 0:
            if left > LONGEST_ASKED:
                raise CaptionError(f"the server asks to wait {left / 3600:.1f} hours; repeat the same call then")
            self.sleep(left)
        self.sleep(0)

    def sleep(self, seconds: float) -> None:
        if self._closed.wait(seconds):
            raise CaptionError("the work was given up")


def _key(variable: str) -> str:
    """The key in an environment variable; what is wrong with it is said without it."""
    key = os.environ.get(variable, "").strip()
    if not all(" " < letter <= "~" for letter in key):
        got = f"the key in {variable} has spaces, control characters or letters beyond ASCII"
        raise ConfigError(f"{got}; set the variable to the key alone")
    return key


def _said(content: Any) -> str:
    """The text of an answer, which some servers give in parts."""
    parts = content if isinstance(content, list) else [{"text": content}]
    texts = [part.get("text") for part in parts if isinstance(part, dict)]
    return "".join(text for text in texts if isinstance(text, str))


def picture_part(data: bytes, kind: str) -> dict[str, Any]:
    """An encoded picture as a part of a message."""
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{base64.b64encode(data).decode()}"}}


def json_objects(text: str) -> Iterator[dict[str, Any]]:
    """The JSON objects in a text, the last first; one around others comes after them."""
    flat = [found.group() for found in re.finditer(r"\{[^{}]*\}", text)]
    whole = re.search(r"\{.*\}", text, re.DOTALL)
    for part in [*reversed(flat), *([whole.group()] if whole else [])]:
        try:
            fields = json.loads(part)
        except NO_JSON:
            continue
        if isinstance(fields, dict):
            yield fields


def _message(error: urllib.error.HTTPError) -> str:
    """What the server says in words; the protocol puts it into error.message."""
    try:
        text = error.read(2000).decode(errors="replace")
        return str(json.loads(text)["error"]["message"])[:300]
    except (OSError, http.client.HTTPException):
        return error.reason
    except (*NO_JSON, KeyError, TypeError):
        return " ".join(text.split())[:300]


def _asked_wait(headers: Any) -> float:
    """Seconds: Retry-After as a number or a date (RFC 9110, 10.2.3), or the reset of a limit that is used up."""
    asked = headers.get("Retry-After", "")
    if re.fullmatch(r"\s*\d+(\.\d+)?\s*", asked):
        return float(asked)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(asked).timestamp() - time.time())
    except ValueError:
        return _used_up(headers)


def _used_up(headers: Any) -> float:
    """Seconds until a limit that is used up is renewed (x-ratelimit-*, such as 1s, 6m0s, 20ms); 0 if none is."""
    waits = [0.0]
    for kind in ("requests", "tokens"):
        if headers.get(f"x-ratelimit-remaining-{kind}", "").strip() == "0":
            waits.append(_duration(headers.get(f"x-ratelimit-reset-{kind}", "")))
    return max(waits)


def _duration(text: str) -> float:
    units = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "": 1.0}
    parts = re.findall(r"(\d+(?:\.\d+)?)(ms|s|m|h|)", text)
    return sum(float(number) * units[unit] for number, unit in parts)
