"""Captions to edits: three sources behind one promise; nothing asked twice, nothing unusable kept."""

from __future__ import annotations

import email.utils
import io
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from ip2p_engine.captions.edits import CaptionEdit, Rejected, Request, make_captions, plain, read_captions, read_edits
from ip2p_engine.captions.language_model import (
    Delimiters,
    FineTuneConfig,
    LanguageModelSource,
    SampleConfig,
    fine_tune,
)
from ip2p_engine.captions.server import SeeingSource, ServerConfig, ServerSource
from ip2p_engine.cli import main
from ip2p_engine.data.describe import Described, describe
from ip2p_engine.data.record import PairRecord
from ip2p_engine.data.store import PairStore, PairWriter
from ip2p_engine.errors import CaptionError, CheckpointError, ConfigError, Interrupted
from ip2p_engine.files import locked
from ip2p_engine.hooks import Hooks
from ip2p_engine.scenes.grammar import GrammarSource, captions_of, edits_from, parse_caption, sample_captions
from ip2p_engine.scenes.world import all_scenes

ROOT = Path(__file__).parents[2]


def edit(caption="a cat", instruction="make it a dog", edited="a dog"):
    return CaptionEdit(caption=caption, instruction=instruction, edited_caption=edited)


class Table:
    """A source with prepared answers, which remembers what it was asked."""

    name, batch = "table", 2

    def __init__(self, answers):
        self.answers, self.asked = answers, []

    def propose(self, requests):
        self.asked += [(request.caption, request.number) for request in requests]
        return [self.answers[request.caption] for request in requests]


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# The workflow


def test_good_edits_are_kept_and_the_rest_is_counted(tmp_path):
    answers = {
        "a cat": edit(),
        "A cat.": edit("A cat.", "Make it a dog!", "A dog"),
        "a hat": edit("a hat", "keep it", "A hat."),
        "a mat": edit("a mat", " ", "a rug"),
        "a rat": Rejected(reason="malformed", text="???"),
        "a bat": edit("a bat", "make it bloody", "a bloody bat"),
    }
    out = tmp_path / "deep" / "edits.jsonl"
    report = make_captions(
        [*answers, "a cat", "  "], Table(answers), out, moderate=lambda e: "bloody" not in e.edited_caption
    )
    assert (report.written, report.new, report.repeated_captions) == (1, 1, 1)
    assert report.rejected == {"duplicate": 1, "no-op": 2, "malformed": 1, "moderated": 1}
    assert report.as_text() == "1 edits (1 new); rejected: 1 duplicate, 1 malformed, 1 moderated, 2 no-op"
    assert read_edits(out) == [edit()]
    assert {row["reason"] for row in rows(out.with_name("edits.rejected.jsonl"))} == set(report.rejected)


def test_a_later_run_asks_only_for_what_is_new(tmp_path):
    answers = {"a cat": edit(), "a rat": Rejected(reason="malformed"), "a bat": edit("a bat", "b", "c")}
    out = tmp_path / "edits.jsonl"
    make_captions(["a cat", "a rat"], Table(answers), out)
    again = Table(answers)
    report = make_captions(["a bat", "a rat", "a cat"], again, out)
    assert again.asked == [("a bat", 0)]
    assert (report.written, report.new, report.rejected) == (2, 1, {"malformed": 1})
    more = Table(answers)
    assert make_captions(["a cat"], more, out, per_caption=2).rejected == {"malformed": 1, "duplicate": 1}
    assert more.asked == [("a cat", 1)]


def test_another_source_is_asked_about_what_one_rejected(tmp_path):
    out, answers = tmp_path / "edits.jsonl", {"a cat": edit(), "a rat": Rejected(reason="unknown caption")}
    make_captions(answers, Table(answers), out)
    other = Table({"a rat": edit("a rat", "make it a hat", "a hat")})
    other.name = "another"
    assert make_captions(answers, other, out).new == 1 and other.asked == [("a rat", 0)]


def test_a_line_cut_off_by_a_kill_is_asked_for_again(tmp_path):
    out = tmp_path / "edits.jsonl"
    captions = list(sample_captions(20, seed=0))
    make_captions(captions, GrammarSource(), out)
    whole = out.read_bytes()
    out.write_bytes(whole[:-20])
    make_captions(captions, GrammarSource(), out)
    assert out.read_bytes() == whole


def test_a_stop_keeps_what_was_finished(tmp_path):
    answers = {text: edit(text, "double it", f"{text} {text}") for text in "abcdef"}
    source, progress = Table(answers), []
    with pytest.raises(Interrupted, match="stopped with 4 edits"):
        make_captions(
            "abcdef",
            source,
            tmp_path / "e.jsonl",
            hooks=Hooks(
                on_progress=lambda done, of, _: progress.append((done, of)), should_stop=lambda: len(source.asked) >= 4
            ),
        )
    assert progress == [(2, 6), (4, 6)]
    assert len(rows(tmp_path / "e.jsonl")) == 4


def test_bad_outputs_are_refused(tmp_path):
    source = Table({"a cat": edit()})
    with pytest.raises(ConfigError, match="give a name that ends in .jsonl"):
        make_captions(["a cat"], source, tmp_path / "edits.txt")
    with pytest.raises(ConfigError, match="per_caption is 0"):
        make_captions(["a cat"], source, tmp_path / "e.jsonl", per_caption=0)
    with pytest.raises(CaptionError, match="there are no captions"):
        make_captions([" "], source, tmp_path / "e.jsonl")
    (tmp_path / "foreign.jsonl").write_text('{"text": 1}\n')
    with pytest.raises(CaptionError, match="has a line without 'caption'; write to another file"):
        make_captions(["a cat"], source, tmp_path / "foreign.jsonl")
    with (
        locked(tmp_path / ".e.jsonl.lock", "", CaptionError),
        pytest.raises(CaptionError, match="is being written by another process"),
    ):
        make_captions(["a cat"], source, tmp_path / "e.jsonl")


def test_a_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
    out = tmp_path / "e.jsonl"
    make_captions(["a cat"], Table({"a cat": edit()}), out)
    before = out.read_bytes()

    def refuse(handle):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", refuse)
        with pytest.raises(CaptionError, match="No space left on device.*what was written is whole"):
            make_captions(["a bat"], Table({"a bat": edit("a bat", "b", "c")}), out)
    assert out.read_bytes() == before


@pytest.mark.parametrize("name", ["caption", "input", "original_prompt", "text"])
def test_captions_are_read_from_every_format(tmp_path, name):
    texts = ["a cat", "a dög"]
    (tmp_path / "c.txt").write_text("a cat\n\n  a dög \n", encoding="utf-8")
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({name: text, "n": 1}) + "\n" for text in texts))
    pq.write_table(pa.table({name: texts, "n": [1, 2]}), tmp_path / "c.parquet")
    for kind in ("txt", "jsonl", "parquet"):
        assert list(read_captions(tmp_path / f"c.{kind}")) == texts
    assert list(read_captions(tmp_path / "c.jsonl", column=name)) == texts
    with pytest.raises(CaptionError, match="row 1, has .* and no text in title; name its column"):
        list(read_captions(tmp_path / "c.parquet", column="title"))


def test_unreadable_inputs_are_named(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"caption": "a"}\n[1]\n')
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    for name, said in (("bad.jsonl", "line 2, is"), ("bad.parquet", "is no Parquet file"), ("a.xls", "ends in .xls")):
        with pytest.raises(CaptionError, match=said):
            list(read_captions(tmp_path / name))
    with pytest.raises(CaptionError, match="cannot be read"):
        list(read_captions(tmp_path / "missing.txt"))
    (tmp_path / "deep.jsonl").write_text('{"caption": ' + "[" * 100_000 + "\n")
    with pytest.raises(CaptionError, match="line 1, is not JSON"):
        list(read_captions(tmp_path / "deep.jsonl"))
    (tmp_path / "null.jsonl").write_text('{"caption": "a"}\n{"caption": null}\n')
    with pytest.raises(CaptionError, match="row 2, has caption and no text in caption or input"):
        list(read_captions(tmp_path / "null.jsonl"))
    (tmp_path / "half.jsonl").write_text('{"caption": "a \\ud83d"}\n')
    with pytest.raises(CaptionError, match="row 1, has half a letter"):
        list(read_captions(tmp_path / "half.jsonl"))
    for kind, text in (("txt", "a café\n"), ("jsonl", '{"caption": "a café"}\n')):
        path = tmp_path / f"old.{kind}"
        path.write_text(text, encoding="latin-1")
        with pytest.raises(CaptionError, match="is not UTF-8 text"):
            list(read_captions(path))
        path.write_text(text, encoding="utf-8-sig")  # as editors on Windows save it
        assert list(read_captions(path)) == ["a café"]


def test_triplets_are_read_by_anybodys_names(tmp_path):
    names = [("caption", "instruction", "edited_caption"), ("input", "edit", "output")]
    names.append(("original_prompt", "edit_prompt", "edited_prompt"))
    lines = [json.dumps(dict(zip(row, ("a cat", "make it a dog", "a dog"), strict=True))) for row in names]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    assert read_edits(tmp_path / "t.jsonl") == [edit()] * 3


def test_requests_depend_on_seed_caption_and_number_alone():
    seeds = {Request.make(*key).seed for key in (("a", 0, 0), ("a", 1, 0), ("b", 0, 0), ("a", 0, 1))}
    assert len(seeds) == 4
    assert Request.make("a", 0, 0) == Request.make("a", 0, 0)
    assert plain(" A  cat, on-a mat! ") == "a cat on a mat"


# Source one: the grammar of scenes


def test_every_caption_of_the_grammar_is_understood():
    for scene in all_scenes()[::97]:
        for wording, caption in enumerate(captions_of(scene)):
            parsed, found = parse_caption(caption)
            assert found == wording
            assert parsed == (scene if wording else scene.with_(place="centre"))
    assert parse_caption("a photo of a dog") is None


def test_grammar_edits_are_true_and_keep_the_wording():
    source = GrammarSource()
    requests = [Request.make(caption, 0, 5) for caption in sample_captions(200, seed=1)]
    edits = source.propose(requests)
    kinds = Counter()
    for request, answer in zip(requests, edits, strict=True):
        (before, wording), (after, same) = parse_caption(request.caption), parse_caption(answer.edited_caption)
        assert wording == same
        kinds.update(kind for kind, target in edits_from(before) if target == after)
    assert sum(kinds.values()) == 200
    assert len(kinds) == 11
    assert source.propose(requests[7:8]) == edits[7:8]
    assert source.propose([Request.make("a dog", 0, 0)]) == [Rejected(reason="unknown caption", text="a dog")]


# Source two: a language model on this machine


TRIPLETS = [
    edit(),
    edit("a red car", "paint it blue", "a blue car"),
    edit("a house", "add snow", "a house in the snow"),
]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """A random GPT-2 of two layers, and a byte-level tokenizer that was trained on three sentences."""
    folder = tmp_path_factory.mktemp("gpt")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([Delimiters().completion(e) + e.caption for e in TRIPLETS], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    size = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 256, "vocab_size": tokenizer.get_vocab_size()}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    GPT2LMHeadModel(GPT2Config(**size, **ends, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)).save_pretrained(folder)
    return folder


def requests_of(*captions):
    return [Request.make(caption, 0, 0) for caption in captions]


@pytest.mark.slow
def test_a_fine_tuned_model_gives_the_edits_it_learned(tiny_model, tmp_path):
    other = Delimiters(prompt_end=" =>", separator=" |", stop=" .")
    config = FineTuneConfig(epochs=90, batch=3, learning_rate=3e-3, delimiters=other)
    losses = fine_tune(tiny_model, TRIPLETS, tmp_path / "tuned", config=config)
    assert len(losses) == 90
    assert losses[-1] < 0.1 < losses[0]
    source = LanguageModelSource(tmp_path / "tuned", config=SampleConfig(temperature=0))
    assert source.delimiters == other
    assert source.propose(requests_of(*(e.caption for e in TRIPLETS))) == TRIPLETS
    report = make_captions([e.caption for e in TRIPLETS], source, tmp_path / "e.jsonl")
    assert report.written == 3


def test_adapters_learn_and_are_merged(tiny_model, tmp_path):
    config = FineTuneConfig(epochs=3, batch=2, lora_rank=4, learning_rate=1e-2)
    losses = fine_tune(tiny_model, TRIPLETS, tmp_path / "tuned", config=config)
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    before, after = (
        GPT2LMHeadModel.from_pretrained(folder).state_dict() for folder in (tiny_model, tmp_path / "tuned")
    )
    assert before.keys() == after.keys()
    name = "transformer.h.0.attn.c_attn.weight"
    assert not torch.equal(before[name], after[name])
    assert torch.equal(before["transformer.wte.weight"], after["transformer.wte.weight"])


def test_one_epoch_is_the_default_and_training_repeats(tiny_model, tmp_path):
    config = FineTuneConfig(batch=2)
    runs = [fine_tune(tiny_model, TRIPLETS, tmp_path / name, config=config) for name in "ab"]
    assert len(runs[0]) == 2
    assert runs[0] == runs[1]


def test_the_loss_is_of_completions_alone(tiny_model, tmp_path):
    """Against the model's own loss, computed for one example by hand."""
    model = GPT2LMHeadModel.from_pretrained(tiny_model)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_model)
    lines = Delimiters()
    prompt, completion = tokenizer(lines.prompt("a cat"))["input_ids"], tokenizer(lines.completion(edit()))["input_ids"]
    tokens = torch.tensor([[*prompt, *completion, tokenizer.eos_token_id]])
    with torch.no_grad():
        logits = model(tokens).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    expected = -logits.gather(1, tokens[0, len(prompt) :, None]).mean().item()
    assert fine_tune(tiny_model, [edit()], tmp_path / "t") == pytest.approx([expected], rel=1e-5)


def test_an_untrained_model_is_malformed_and_batches_do_not_matter(tiny_model):
    source = LanguageModelSource(tiny_model, config=SampleConfig(max_tokens=12, temperature=1.0))
    requests = requests_of("a cat", "a house in the snow", "x")
    together = source.propose(requests)
    assert {answer.reason for answer in together} == {"malformed"}
    assert len({answer.text for answer in together}) == 3
    assert [source.propose([request])[0] for request in requests] == together
    other = [Request(caption="a cat", number=0, seed=1), Request(caption="a cat", number=0, seed=2)]
    assert len({answer.text for answer in source.propose(other)}) == 2


def test_sampling_may_be_given_up_at_any_token(tiny_model):
    seen = []

    def give_up():
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt

    source = LanguageModelSource(tiny_model, config=SampleConfig(max_tokens=12), on_wait=give_up)
    with pytest.raises(KeyboardInterrupt):
        source.propose(requests_of("a cat"))
    assert len(seen) == 3


def test_a_caption_that_the_context_does_not_hold_is_rejected(tiny_model):
    source = LanguageModelSource(tiny_model, config=SampleConfig(max_tokens=12))
    first, second = source.propose(requests_of("word " * 200, "a cat"))
    assert (first.reason, second.reason) == ("too long", "malformed")
    assert source.propose(requests_of("word " * 200)) == [first]


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("make it a dog\n%%\na dog\nEND", edit()),
        (" make it  a dog\n%%\n a dog \nEND and more", edit()),
        ("make it a dog\n%%\na dog", None),
        ("make it a dog, a dog\nEND", None),
        ("make\n%%\nit\n%%\na dog\nEND", None),
        ("\n%%\na dog\nEND", None),
        ("make it a dog\n%%\n\nEND", None),
        ("a\n##\nb\n%%\nc\nEND", None),
        ("", None),
    ],
)
def test_only_whole_answers_are_edits(text, parsed):
    assert Delimiters().parse("a cat", text) == (parsed or Rejected(reason="malformed", text=text))


def test_bad_settings_and_models_are_refused(tiny_model, tmp_path, caplog):
    for made in (
        lambda: Delimiters(stop=" "),
        lambda: Delimiters(stop="\n%%\n"),
        lambda: FineTuneConfig(epochs=0),
        lambda: FineTuneConfig(learning_rate=0),
        lambda: FineTuneConfig(learning_rate=-1),
        lambda: SampleConfig(temperature=-1),
    ):
        with pytest.raises(ConfigError):
            made()
    with pytest.raises(CheckpointError, match="holds no causal language model"):
        LanguageModelSource(tmp_path)
    shutil.copytree(tiny_model, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="cut holds no causal language model"):
        LanguageModelSource(tmp_path / "cut")
    (tmp_path / "cut" / "ip2p_captions.json").write_text("{}")
    with pytest.raises(CheckpointError, match="ip2p_captions.json names no delimiters"):
        LanguageModelSource(tmp_path / "cut")
    long = [edit("word " * 300)]
    with pytest.raises(CaptionError, match="1 triplets came and none has at most 256 tokens"):
        fine_tune(tiny_model, long, tmp_path / "t")
    fine_tune(tiny_model, [*long, edit()], tmp_path / "t")
    assert "1 triplets are longer than 256 tokens and left out" in caplog.text
    with pytest.raises(Interrupted, match="nothing was saved"):
        fine_tune(tiny_model, TRIPLETS, tmp_path / "stopped", hooks=Hooks(should_stop=lambda: True))
    assert not (tmp_path / "stopped").exists()


# Source three: a server


def answer(instruction="make it a dog", edited="a dog"):
    return json.dumps({"instruction": instruction, "edited_caption": edited})


def reply(content, code=200, headers=None):
    return {
        "code": code,
        "headers": headers or {},
        "body": json.dumps({"choices": [{"message": {"content": content}}]}),
    }


def fault(code, message="busy", **headers):
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return {"code": code, "headers": named, "body": json.dumps({"error": {"message": message}})}


class Server:
    """A real HTTP server on loopback that plays its answers in turn, the last one for ever.

    It answers nothing until ``together`` requests have come.
    """

    def __init__(self, *script, pause=0.0, together=1):
        self.requests, self.times, self.running, self.most = [], [], 0, 0
        self._script, self._pause, self._lock = list(script), pause, threading.Lock()
        self._released, self._together, self._all_here = threading.Event(), together, threading.Event()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                owner.serve(self)

            def log_message(self, *arguments):
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.handle_error = lambda *arguments: None  # clients that time out close their end
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self._released.set()
        self._http.shutdown()
        self._http.server_close()

    def serve(self, handler):
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            step = self._script.pop(0) if len(self._script) > 1 else self._script[0]
            self.requests.append((handler.path, dict(handler.headers), body))
            self.times.append(time.monotonic())
            self.running += 1
            self.most = max(self.most, self.running)
            if len(self.requests) >= self._together:
                self._all_here.set()
        self._all_here.wait(60)
        self._released.wait(self._pause)
        with self._lock:
            self.running -= 1
        if step == "drop":
            handler.connection.close()
            return
        if step == "hang":
            time.sleep(0.6)
        step = step if isinstance(step, dict) else reply(answer())
        data = step["body"].encode()
        handler.send_response(step["code"])
        for name, value in step["headers"].items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(data) + step.get("missing", 0)))
        handler.end_headers()
        handler.wfile.write(data)


@pytest.fixture(autouse=True)
def direct(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def source_of(server, **options):
    return ServerSource(
        ServerConfig(**{"base_url": server.url, "model": "m", "first_wait": 0.01, "timeout": 5, **options})
    )


def test_a_server_is_asked_as_the_protocol_says(monkeypatch, tmp_path):
    monkeypatch.setenv("MY_KEY", "secret-123")
    with Server(reply(f"Sure!\n```json\n{answer()}\n```")) as server:
        source = source_of(server, key_variable="MY_KEY")
        report = make_captions(["a cat"], source, tmp_path / "e.jsonl")
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret-123"
    assert (body["model"], body["temperature"], body["messages"][-1]["content"]) == ("m", 0.7, "a cat")
    assert read_edits(tmp_path / "e.jsonl") == [edit()]
    assert report.written == 1
    assert "secret-123" not in (tmp_path / "e.jsonl").read_text() + repr(source.config)


@pytest.mark.parametrize("key", ["secret-123\n", "secret-123\nsecret-456", "secret-\u2013", "secret 123"])
def test_a_key_is_never_said(key, monkeypatch, capsys):
    """Its line's end is cut off; what cannot be sent was named by the library, with the key."""
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with Server(reply(answer())) as server:
        if key.strip() == "secret-123":
            source_of(server).propose(requests_of("a cat"))
            assert server.requests[0][1]["Authorization"] == "Bearer secret-123"
        else:
            with pytest.raises(ConfigError, match="the key in OPENAI_API_KEY has") as caught:
                source_of(server)
            assert "secret" not in str(caught.value)
    assert "secret" not in "".join(capsys.readouterr())


def test_without_a_key_none_is_sent():
    with Server(reply(answer())) as server:
        source_of(server).propose(requests_of("a cat"))
    assert "Authorization" not in server.requests[0][1]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "no idea",
        "{",
        "{}",
        '{"instruction": "x"}',
        answer(edited=" "),
        '{"instruction": 1, "edited_caption": "a"}',
        '{"a":' * 20_000 + "}",
        answer(edited="a \ud83d"),
        "half a letter: \ud83d",
        None,
        [{"type": "text", "text": "a list"}],
        7,
    ],
    ids=lambda content: repr(content)[:30],
)
def test_what_is_no_edit_is_rejected(content):
    text = content if isinstance(content, str) else json.dumps(content) if content else ""
    with Server(reply(content)) as server:
        assert source_of(server).propose(requests_of("a cat")) == [Rejected(reason="malformed", text=text)]
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "trouble",
    [
        fault(500),
        fault(503),
        fault(429),
        "drop",
        {"code": 200, "headers": {}, "body": "<html>"},
        {"code": 200, "headers": {}, "body": "{}"},
        {"code": 200, "headers": {}, "body": "[" * 100_000},
        {"code": 200, "headers": {}, "body": "{}", "missing": 10},
    ],
    ids=["500", "503", "429", "dropped", "no-json", "no-choices", "nested", "cut-short"],
)
def test_trouble_that_passes_is_waited_out(trouble):
    with Server(trouble, trouble, reply(answer())) as server:
        assert source_of(server, timeout=0.5).propose(requests_of("a cat")) == [edit()]
    assert len(server.requests) == 3


NO_MAX_TOKENS = (
    "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
)
NO_TEMPERATURE = (
    "Unsupported value: 'temperature' does not support 0.7 with this model. Only the default (1) is supported."
)


def cut_off(content=None):
    message = {"choices": [{"message": {"content": content}, "finish_reason": "length"}]}
    return {"code": 200, "headers": {}, "body": json.dumps(message)}


def test_todays_servers_get_the_fields_that_they_want(tmp_path):
    """Each refuses once; what it refused is not sent again."""
    script = [
        fault(400, message=NO_MAX_TOKENS),
        fault(400, message=NO_TEMPERATURE),
        fault(400, message="seed: unknown"),
    ]
    with Server(*script, reply(answer())) as server:
        source = source_of(server, concurrency=1)
        assert source.propose(requests_of("a cat", "a dog")) == [edit(), edit(caption="a dog")]
    first, *_, last = [body for _, _, body in server.requests]
    assert {"max_tokens", "temperature", "seed"} <= set(first)
    assert set(last) == {"model", "messages", "max_completion_tokens"}
    assert len(server.requests) == 5


@pytest.mark.parametrize(
    "content",
    [
        '<think>{a cat} in {braces} {"instruction": "no", "edited_caption": "no"}</think>\n' + answer(),
        "thoughts {x}</think>" + answer(),
        "<reasoning>{</reasoning>```json\n" + answer() + "\n```",
        "First {} then " + answer(instruction="no", edited="no") + " or rather " + answer(),
        [{"type": "text", "text": answer()}],
    ],
)
def test_what_a_model_thought_is_passed_over(content):
    with Server(reply(content)) as server:
        assert source_of(server).propose(requests_of("a cat")) == [edit()]


def test_answers_that_are_cut_off_get_more_room():
    with Server(cut_off(), cut_off("<think>still"), reply(answer())) as server:
        assert source_of(server, max_tokens=100).propose(requests_of("a cat")) == [edit()]
    assert [body["max_tokens"] for _, _, body in server.requests] == [100, 400, 1600]
    with Server(cut_off()) as server:
        assert source_of(server).propose(requests_of("a cat")) == [Rejected(reason="cut off")]
    assert len(server.requests) == 3


def test_own_words_examples_and_fields(tmp_path):
    shown = (CaptionEdit(caption="a", instruction="b", edited_caption="c"),)
    with Server(reply(answer())) as server:
        source_of(server, system="Be brief.", examples=shown, extra={"top_p": 0.9, "seed": 1}).propose(
            requests_of("a cat")
        )
    body = server.requests[0][2]
    assert [one["content"] for one in body["messages"]][:2] == ["Be brief.", "a"]
    assert len(body["messages"]) == 4
    assert (body["top_p"], body["seed"]) == (0.9, 1)


def test_what_was_rejected_is_asked_again_on_wish(tmp_path):
    with Server(reply("no"), reply(answer())) as server:
        source = source_of(server)
        assert make_captions(["a cat"], source, tmp_path / "e.jsonl").written == 0
        assert make_captions(["a cat"], source, tmp_path / "e.jsonl").written == 0
        assert make_captions(["a cat"], source, tmp_path / "e.jsonl", retry_rejected=True).written == 1
        assert make_captions(["a cat"], source, tmp_path / "e.jsonl", retry_rejected=True).new == 0
    assert len(server.requests) == 2


def test_first_captions_of_ones_own_get_a_hint(tmp_path, capsys):
    (tmp_path / "in.txt").write_text("a photo of my cat\n")
    assert main(["captions", str(tmp_path / "in.txt"), "--out", str(tmp_path / "e.jsonl")]) == 0
    assert "the grammar knows captions of scenes alone" in capsys.readouterr().err
    assert (
        main(
            ["captions", str(tmp_path / "in.txt"), "--out", str(tmp_path / "f.jsonl"), "--source", "server"]
            + ["--base-url", "http://127.0.0.1:1/v1", "--model", "m", "--request", "[1]"]
        )
        == 2
    )
    assert "--request is '[1]'; give a JSON object" in capsys.readouterr().err


def test_a_silent_server_times_out_and_is_asked_again():
    with Server("hang", reply(answer())) as server:
        assert source_of(server, timeout=0.2).propose(requests_of("a cat")) == [edit()]
    assert len(server.requests) == 2


def test_who_waits_for_a_silent_server_may_give_up():
    def give_up():
        raise KeyboardInterrupt

    with Server(reply(answer()), pause=3) as server:
        source = ServerSource(source_of(server, timeout=30).config, on_wait=give_up)
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            source.propose(requests_of("a cat"))
    assert time.monotonic() - started < 2


def test_waits_double_with_jitter():
    with Server(fault(500), fault(500), fault(500), reply(answer())) as server:
        source_of(server, first_wait=0.1).propose(requests_of("a cat"))
    gaps = [b - a for a, b in zip(server.times, server.times[1:], strict=False)]
    assert all(0.05 * 2**n <= gap <= 0.1 * 2**n + 0.3 for n, gap in enumerate(gaps))


@pytest.mark.slow
def test_retry_after_holds_all_requests():
    with Server(fault(429, Retry_After="1"), reply(answer())) as server:
        source = source_of(server, concurrency=1)
        assert len(source.propose(requests_of("a cat", "b", "c"))) == 3
    assert server.times[1] - server.times[0] >= 1
    assert server.times[3] - server.times[1] < 0.9


@pytest.mark.slow
def test_retry_after_may_be_a_date():
    date = email.utils.formatdate(time.time() + 2, usegmt=True)
    with Server(fault(503, Retry_After=date), reply(answer())) as server:
        source_of(server).propose(requests_of("a cat"))
    assert 0.7 <= server.times[1] - server.times[0] <= 3


def test_a_limit_that_is_used_up_is_waited_for_before_it_is_broken():
    limit = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "0m0.4s"}
    with Server(reply(answer(), headers=limit), reply(answer())) as server:
        source_of(server, concurrency=1).propose(requests_of("a", "b"))
    assert server.times[1] - server.times[0] >= 0.4


def test_no_more_requests_at_a_time_than_allowed():
    with Server(reply(answer()), pause=0.05) as server:
        captions = [f"caption {n}" for n in range(9)]
        answers = source_of(server, concurrency=3).propose(requests_of(*captions))
    assert [a.caption for a in answers] == captions
    assert server.most == 3


def test_a_server_that_stays_broken_ends_the_run_with_one_sentence(tmp_path):
    with Server(*[reply(answer())] * 8, fault(500, "out of cheese")) as server:
        source = source_of(server, retries=2, concurrency=1)
        said = "failed 3 times, at last with: HTTP 500 out of cheese; see to the server, then repeat the same call"
        with pytest.raises(CaptionError, match=said):
            make_captions([f"caption {n}" for n in range(12)], source, tmp_path / "e.jsonl")
    assert len(rows(tmp_path / "e.jsonl")) == 8  # the first batch stays


@pytest.mark.parametrize("code", [400, 413, 422])
def test_a_caption_that_the_server_refuses_is_rejected(code, tmp_path):
    """The first one too, once the server has answered about another caption."""
    with Server(fault(code, "content policy"), reply(answer())) as server:
        report = make_captions(["a fight", "a cat"], source_of(server, concurrency=1), tmp_path / "e.jsonl")
        assert (report.written, report.rejected) == (1, {"refused": 1}) and len(server.requests) == 3
        make_captions(["a fight"], source_of(server), tmp_path / "e.jsonl")
    assert len(server.requests) == 3 and rows(tmp_path / "e.rejected.jsonl")[0]["text"] == f"HTTP {code} content policy"


def test_a_failure_keeps_what_its_batch_had_finished(tmp_path):
    script = [reply(answer()), reply(answer("add snow", "a cat in the snow")), fault(401, "key expired")]
    with Server(*script) as server, pytest.raises(CaptionError, match="key expired"):
        make_captions(["a cat", "a hat", "a rat"], source_of(server, concurrency=1), tmp_path / "e.jsonl")
    assert [row["caption"] for row in rows(tmp_path / "e.jsonl")] == ["a cat", "a hat"]


def test_half_a_letter_ends_no_run(tmp_path):
    """JSON can say it and UTF-8 cannot."""
    with Server(reply(answer(edited="a \ud83d")), reply("half: \ud83d"), reply(answer())) as server:
        report = make_captions(["a hat", "a rat", "a cat"], source_of(server, concurrency=1), tmp_path / "e.jsonl")
    assert (report.written, report.rejected) == (1, {"malformed": 2})
    assert rows(tmp_path / "e.rejected.jsonl")[1]["text"] == "half: \ud83d"


@pytest.mark.parametrize("code", [400, 401, 404, 302])
def test_a_refusal_is_not_repeated(code, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-123")
    said = rf"refused the request \(HTTP {code} no such model\)"
    script = fault(code, "no such model", Location="http://127.0.0.1:9/")
    with Server(script) as server, pytest.raises(CaptionError, match=said) as caught:
        source_of(server).propose(requests_of("a cat"))
    assert len(server.requests) == (2 if code == 400 else 1)  # asked whether it takes another caption
    assert "secret" not in str(caught.value)


def test_a_wait_of_hours_ends_the_run():
    said = r"asks to wait 2.0 hours \(HTTP 429 daily limit\)"
    with Server(fault(429, "daily limit", Retry_After="7200")) as server, pytest.raises(CaptionError, match=said):
        source_of(server).propose(requests_of("a cat"))


def test_a_limit_that_is_renewed_in_years_ends_the_run():
    """Some servers give the moment, as seconds since 1970, where others give a duration."""
    limit = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1767225600"}
    said = r"asks to wait 49\d{4}\.\d hours; repeat the same call then"
    with Server(reply(answer(), headers=limit)) as server, pytest.raises(CaptionError, match=said):
        source_of(server, concurrency=1).propose(requests_of("a", "b"))


ASK = """
import sys
from ip2p_engine import cli
server = ["--source", "server", "--base-url", {url!r}, "--model", "m"]
sys.exit(cli.main(["captions", {captions!r}, "--out", {out!r}, *server]))
"""


@pytest.mark.slow
def test_a_second_ctrl_c_does_not_wait_for_a_silent_server(tmp_path):
    (tmp_path / "c.txt").write_text("a cat\n")
    with Server("hang", pause=300) as server:
        code = ASK.format(captions=str(tmp_path / "c.txt"), out=str(tmp_path / "e.jsonl"), url=server.url)
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        while not server.requests and process.poll() is None:
            time.sleep(0.05)
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(0.5)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "ip2p: interrupted" in said and "Traceback" not in said


def test_a_failure_lets_waiting_requests_go():
    # Both are on their way before the first is told to wait; else both would.
    with Server(fault(429, Retry_After="30"), fault(401), fault(401), together=2) as server:
        start = time.monotonic()
        with pytest.raises(CaptionError):
            source_of(server, concurrency=2).propose(requests_of("a", "b"))
        assert time.monotonic() - start < 15


@pytest.mark.parametrize(
    ("field", "value"),
    [("base_url", "localhost:8000"), ("base_url", "http://a/ü"), ("model", ""), ("concurrency", 0), ("timeout", 0)],
)
def test_impossible_servers_are_refused(field, value):
    with pytest.raises(ConfigError, match=field):
        ServerConfig(**{"base_url": "http://127.0.0.1/v1", "model": "m", field: value})


def test_a_vision_model_describes_pairs_without_captions(tmp_path):
    stream = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(stream, "PNG")
    texts = {"edit_prompt": "edit", "seed": None, "p": None, "cfg": None}
    pictures = {"original_image": stream.getvalue(), "edited_image": stream.getvalue()}
    with PairWriter(tmp_path / "bare", manifest={}) as writer:
        writer.write(PairRecord(**texts, **pictures, original_prompt="", edited_prompt="", key="a"))
        writer.write(PairRecord(**texts, **pictures, original_prompt="b", edited_prompt="c", key="b"))
        writer.write(PairRecord(**texts, **pictures, original_prompt="", edited_prompt="", key="c"))
    seen = json.dumps({"caption": "red", "instruction": "paint it", "edited_caption": "redder"})
    config = {"model": "m", "first_wait": 0.01, "concurrency": 1}
    with Server(reply(f"<think>{{</think>{seen}"), reply("no idea"), reply(seen)) as server:
        source = SeeingSource(ServerConfig(base_url=server.url, **config))
        assert describe(tmp_path / "bare", tmp_path / "told", source) == Described(new=2, rejected=1)
        assert describe(tmp_path / "bare", tmp_path / "told", source) == Described(new=1, rejected=0)
        body = server.requests[0][2]
        assert [part["type"] for part in body["messages"][0]["content"]] == ["text", "image_url", "image_url"]
        assert len(server.requests) == 3
        assert describe(tmp_path / "bare", tmp_path / "anew", source, instructions=True).new == 3
    told = {pair.key: pair for pair in PairStore(tmp_path / "told")}
    assert (told["a"].original_prompt, told["a"].edited_prompt, told["a"].edit_prompt) == ("red", "redder", "edit")
    assert told["b"].original_prompt == "b"
    assert {pair.edit_prompt for pair in PairStore(tmp_path / "anew")} == {"paint it"}
