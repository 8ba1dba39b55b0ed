"""Edits from any server that speaks OpenAI's chat protocol, local or remote.

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
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import CaptionError, ConfigError
from ..files import NO_JSON
from ..version import __version__
from .edits import CaptionEdit, Rejected, Request, UnfinishedBatch, is_unicode

__all__ = ["PictureRequest", "SeeingSource", "ServerConfig", "ServerSource"]

log = logging.getLogger(__name__)
TRANSIENT = (408, 409, 425, 429, 500, 502, 503, 504, 529)
# A caption that the server's policy or its model's context refuses, or a wrong setting.
PERHAPS_OF_ONE_CAPTION = (400, 413, 422)
ADJUSTABLE = ("max_tokens", "max_completion_tokens", "temperature", "seed")
LONGER = 16
THOUGHTS = re.compile(r"<(think|thinking|reasoning)>.*?</\1>|^.*</(think|thinking|reasoning)>", re.DOTALL)
MAX_ANSWER, LONGEST_ASKED, LOOK_UP = 1_000_000, 3600.0, 0.5

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


class ServerSource:
    """A source of edits; requests run side by side, answers keep their order."""

    def __init__(self, config: ServerConfig, on_wait: Callable[[], None] | None = None) -> None:
        """``on_wait`` is called twice a second while answers are awaited; what it raises ends the waiting.

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

    def propose(self, requests: Sequence[Request]) -> list[CaptionEdit | Rejected]:
        """One answer a request; raises UnfinishedBatch once one has failed for good, and gives the rest up."""
        self._gate.open()
        work: queue.SimpleQueue[tuple[Request, Future]] = queue.SimpleQueue()
        futures: list[Future] = [Future() for _ in requests]
        for one in zip(requests, futures, strict=True):
            work.put(one)
        # Daemons, since an executor's threads would keep the process until the last silent server has timed out.
        for _ in range(min(self.config.concurrency, len(requests))):
            threading.Thread(target=self._work_off, args=(work,), daemon=True).start()
        try:
            waiting: set[Future] = set(futures)
            while waiting:
                done, waiting = wait(futures, LOOK_UP, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
                if self._on_wait is not None:
                    self._on_wait()
        except CaptionError as error:
            self._gate.close()
            raise UnfinishedBatch(str(error), [_finished(future) for future in futures]) from error
        except BaseException:
            self._gate.close()
            raise
        return [future.result() for future in futures]

    def _work_off(self, work: queue.SimpleQueue[tuple[Request, Future]]) -> None:
        while True:
            try:
                request, future = work.get_nowait()
            except queue.Empty:
                return
            try:
                future.set_result(self._ask(request))
            except BaseException as error:
                future.set_exception(error)

    _names: tuple[str, ...] = ("instruction", "edited_caption")
    """What an answer has to hold."""

    def _body(self, request: Request, config: ServerConfig, unwanted: set[str]) -> dict[str, Any]:
        return _body(_messages(request.caption, config), request, config, unwanted)

    def _ask(self, request: Request) -> CaptionEdit | Rejected:
        """The server's answer; a refusal counts as one if it is of this caption alone, and else ends the run."""
        try:
            return self._answer(request)
        except _Refused as refusal:
            if refusal.code in PERHAPS_OF_ONE_CAPTION and self._takes_others():
                return Rejected(reason="refused", text=refusal.said)
            raise

    def _takes_others(self) -> bool:
        """Whether the server answers at all; until it has, it is asked about a caption that nobody minds."""
        with self._trial:
            try:
                if not self._answers:
                    self._answer(Request.make(EXAMPLES[0][0], 0, 0))
            except _Refused:
                return False
        return True

    def _answer(self, request: Request) -> CaptionEdit | Rejected:
        config, attempt = self.config, 0
        while True:
            self._gate.wait()
            body = self._body(request, config, self._unwanted)
            try:
                answer = _parsed(request.caption, self._post(json.dumps(body).encode()), self._names)
                self._answers = True
                if answer != CUT_OFF or config.max_tokens >= LONGER * self.config.max_tokens:
                    return answer
                config = replace(config, max_tokens=4 * config.max_tokens)
            except _Refused as refusal:
                if refusal.code not in PERHAPS_OF_ONE_CAPTION or not self._gives_up(body, refusal.said):
                    raise
            except _Passing as trouble:
                if attempt == self.config.retries:
                    tried = f"{self.config.base_url} failed {attempt + 1} times, at last with: {trouble}"
                    raise CaptionError(f"{tried}; see to the server, then repeat the same call") from trouble
                self._hold_back(trouble, attempt)
                attempt += 1

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


@dataclass(frozen=True, kw_only=True)
class PictureRequest(Request):
    """Two pictures to be described, as JPEG."""

    before: bytes
    after: bytes


class SeeingSource(ServerSource):
    """A vision model that describes both pictures of a pair, and says what was asked for."""

    _names = ("caption", "instruction", "edited_caption")

    def _body(self, request: Request, config: ServerConfig, unwanted: set[str]) -> dict[str, Any]:
        content: list[dict[str, Any]] = [{"type": "text", "text": config.system or SEEING}]
        if isinstance(request, PictureRequest):
            shown = (base64.b64encode(data).decode() for data in (request.before, request.after))
            addresses = (f"data:image/jpeg;base64,{data}" for data in shown)
            content += [{"type": "image_url", "image_url": {"url": address}} for address in addresses]
        return _body([{"role": "user", "content": content}], request, config, unwanted)


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


def _finished(future: Future) -> CaptionEdit | Rejected | None:
    return future.result() if future.done() and future.exception() is None else None


def _key(variable: str) -> str:
    """The key in an environment variable; what is wrong with it is said without it."""
    key = os.environ.get(variable, "").strip()
    if not all(" " < letter <= "~" for letter in key):
        got = f"the key in {variable} has spaces, control characters or letters beyond ASCII"
        raise ConfigError(f"{got}; set the variable to the key alone")
    return key


def _messages(content: str, config: ServerConfig) -> list[dict[str, Any]]:
    messages = [{"role": "system", "content": config.system or INSTRUCTION}]
    for caption, instruction, edited in [tuple(vars(one).values()) for one in config.examples] or EXAMPLES:
        answer = json.dumps({"instruction": instruction, "edited_caption": edited})
        messages += [{"role": "user", "content": caption}, {"role": "assistant", "content": answer}]
    return [*messages, {"role": "user", "content": content}]


def _body(
    messages: Sequence[Mapping[str, Any]], request: Request, config: ServerConfig, unwanted: set[str]
) -> dict[str, Any]:
    """``unwanted``: fields that the server has refused."""
    fields = {"temperature": config.temperature, "max_tokens": config.max_tokens, "seed": request.seed % 2**31}
    if "max_tokens" in unwanted:
        fields["max_completion_tokens"] = config.max_tokens
    said = {name: value for name, value in fields.items() if name not in unwanted}
    return {"model": config.model, "messages": list(messages), **said, **config.extra}


def _parsed(caption: str, answer: Any, names: Sequence[str]) -> CaptionEdit | Rejected:
    """The edit in a chat answer; _Passing if it is no chat answer, Rejected if the model wrote something else."""
    try:
        choice = answer["choices"][0]
        text = choice["message"]["content"]
    except (KeyError, IndexError, TypeError) as error:
        raise _Passing(f"an answer without choices: {json.dumps(answer)[:200]}") from error
    edit = fields_of(_said(text), names)
    if edit is not None:
        return CaptionEdit(**{"caption": caption, **edit})
    if choice.get("finish_reason") == "length":
        return CUT_OFF
    shown = text if isinstance(text, str) else "" if text is None else json.dumps(text)[:1000]
    return Rejected(reason="malformed", text=shown)


def _said(content: Any) -> str:
    """The text of an answer, which some servers give in parts."""
    parts = content if isinstance(content, list) else [{"text": content}]
    texts = [part.get("text") for part in parts if isinstance(part, dict)]
    return "".join(text for text in texts if isinstance(text, str))


def fields_of(text: str, names: Sequence[str]) -> dict[str, str] | None:
    """The texts under these names in the last JSON object that has them, behind what the model thought; or None."""
    text = THOUGHTS.sub("", text)
    flat = [found.group() for found in re.finditer(r"\{[^{}]*\}", text)]
    whole = re.search(r"\{.*\}", text, re.DOTALL)
    for part in [*reversed(flat), *([whole.group()] if whole else [])]:
        try:
            fields = json.loads(part)
        except NO_JSON:
            continue
        values = [fields.get(name) if isinstance(fields, dict) else None for name in names]
        if all(isinstance(value, str) and value.strip() and is_unicode(value) for value in values):
            return {name: " ".join(str(value).split()) for name, value in zip(names, values, strict=True)}
    return None


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
