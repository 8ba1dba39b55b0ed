"""Edits from a causal language model on this machine: fine-tuned on triplets that people wrote, then sampled.

The paper fine-tunes GPT-3 on 700 triplets for one epoch and samples at temperature 0.7 (section 3.1.1). The texts are
laid out as in the authors' released code: caption, prompt end, instruction, separator, edited caption, stop.
"""

from __future__ import annotations

import json
import logging
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, LogitsProcessorList

from ..config import from_mapping
from ..errors import CaptionError, CheckpointError, ConfigError
from ..files import read_json, write_json
from ..hooks import Hooks
from .edits import CaptionEdit, Rejected, Request

__all__ = ["Delimiters", "FineTuneConfig", "LanguageModelSource", "SampleConfig", "fine_tune"]

SETTINGS = "ip2p_captions.json"
IGNORED = -100

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Delimiters:
    """What stands between the texts; saved with a fine-tuned model, which only understands its own."""

    prompt_end: str = "\n##\n"
    separator: str = "\n%%\n"
    stop: str = "\nEND"

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value.strip():
                raise ConfigError(f"{name} is {value!r}; give a text that captions do not contain")
        if len({self.prompt_end, self.separator, self.stop}) < 3:
            raise ConfigError(f"two of the delimiters {asdict(self)} are equal; give three different ones")

    def prompt(self, caption: str) -> str:
        return caption + self.prompt_end

    def completion(self, edit: CaptionEdit) -> str:
        return edit.instruction + self.separator + edit.edited_caption + self.stop

    def parse(self, caption: str, text: str) -> CaptionEdit | Rejected:
        """The edit in what a model wrote; malformed without its stop, its one separator, or one of its texts."""
        body, stopped, _ = text.partition(self.stop)
        parts = [" ".join(part.split()) for part in body.split(self.separator)]
        if not stopped or len(parts) != 2 or not all(parts) or self.prompt_end in body:
            return Rejected(reason="malformed", text=text)
        return CaptionEdit(caption=caption, instruction=parts[0], edited_caption=parts[1])


@dataclass(frozen=True, kw_only=True)
class FineTuneConfig:
    """How to fine-tune."""

    epochs: int = 1
    batch: int = 8
    learning_rate: float | None = None
    """None: 2e-5, and 2e-4 with LoRA."""
    warmup: float = 0.1
    """Fraction of the steps in which the rate rises; it falls to zero after them."""
    lora_rank: int = 0
    """0 trains every weight; above, adapters of this rank on all linear layers (peft), merged at the end."""
    max_tokens: int = 256
    """Longer triplets are left out, and counted in the log."""
    seed: int = 0
    delimiters: Delimiters = field(default_factory=Delimiters)

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch", 1), ("lora_rank", 0), ("max_tokens", 8)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; give a whole number of at least {least}")
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"warmup is {self.warmup}; give a fraction from 0 to below 1")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise ConfigError(f"learning_rate is {self.learning_rate}; give a number above 0, such as 2e-5")

    @property
    def rate(self) -> float:
        return self.learning_rate or (2e-4 if self.lora_rank else 2e-5)


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How to sample."""

    temperature: float = 0.7
    """As in the paper's code; 0 takes the most likely text."""
    max_tokens: int = 160
    batch: int = 16

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature is {self.temperature}; give 0 or more")
        for name in ("max_tokens", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; give a whole number of at least 1")


class LanguageModelSource:
    """A source of edits; an answer depends on its request's seed, not on the batch it is sampled in."""

    def __init__(
        self,
        folder: Path | str,
        *,
        config: SampleConfig | None = None,
        device: str | torch.device = "cpu",
        on_wait: Callable[[], None] | None = None,
    ) -> None:
        """``folder``: as ``fine_tune`` writes it, or any causal model that understands the delimiters.

        ``on_wait`` is called before each token; what it raises ends the sampling.
        Raises CheckpointError for one that cannot be loaded.
        """
        self.config = config or SampleConfig()
        self.name, self.batch, self._on_wait = str(folder), self.config.batch, on_wait
        self.delimiters = _saved_delimiters(Path(folder))
        self._tokenizer, model = _load(folder)
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        self._model = model.to(device, dtype).eval()

    def propose(self, requests: Sequence[Request]) -> list[CaptionEdit | Rejected]:
        """One answer a request, sampled in one batch; what the model's context does not hold is rejected."""
        fitting = [request for request in requests if self._fits(request)]
        written = dict(zip(fitting, self._sampled(fitting), strict=True))
        return [written.get(request) or Rejected(reason="too long", text=request.caption) for request in requests]

    def _fits(self, request: Request) -> bool:
        """Whether prompt and answer fit together; some models have no limit."""
        longest = getattr(self._model.config, "max_position_embeddings", None) or math.inf
        prompt = self._tokenizer(self.delimiters.prompt(request.caption))["input_ids"]
        return len(prompt) + self.config.max_tokens <= longest

    @torch.inference_mode()
    def _sampled(self, requests: Sequence[Request]) -> list[CaptionEdit | Rejected]:
        if not requests:
            return []
        texts = [self.delimiters.prompt(request.caption) for request in requests]
        prompts = self._tokenizer(texts, return_tensors="pt", padding=True).to(self._model.device)
        chooser = _SeededChoice([request.seed for request in requests], self.config.temperature, self._on_wait)
        tokens = self._model.generate(
            input_ids=prompts["input_ids"],
            attention_mask=prompts["attention_mask"],
            max_new_tokens=self.config.max_tokens,
            do_sample=False,
            logits_processor=LogitsProcessorList([chooser]),
            stop_strings=[self.delimiters.stop],
            tokenizer=self._tokenizer,
            pad_token_id=self._tokenizer.pad_token_id,
        )
        written = self._tokenizer.batch_decode(tokens[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
        pairs = zip(requests, written, strict=True)
        return [self.delimiters.parse(request.caption, text) for request, text in pairs]


class _SeededChoice(LogitsProcessor):
    """Sampling as the greatest of logits / temperature + Gumbel noise, with one generator a sample.

    transformers samples a batch from one generator, so that a text would depend on its neighbours.
    """

    def __init__(self, seeds: Sequence[int], temperature: float, on_token: Callable[[], None] | None) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._temperature, self._on_token = temperature, on_token

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._on_token is not None:
            self._on_token()
        if not self._temperature:
            return scores
        rows = [torch.empty(scores.shape[1]).exponential_(generator=generator) for generator in self._generators]
        return scores.float() / self._temperature - torch.stack(rows).log().to(scores.device)


def fine_tune(
    base: Path | str,
    edits: Sequence[CaptionEdit],
    out: Path | str,
    *,
    config: FineTuneConfig | None = None,
    device: str | torch.device = "cpu",
    hooks: Hooks | None = None,
) -> list[float]:
    """Train ``base`` to continue captions with edits, save it to ``out``, and return the loss of each step.

    The loss is the cross-entropy of the completions; the prompts are given. Raises CaptionError if there is nothing to
    train on, CheckpointError for a base that cannot be loaded, or Interrupted once ``hooks.should_stop()``, when
    nothing is saved.
    """
    config, hooks = config or FineTuneConfig(), hooks or Hooks()
    tokenizer, model = _load(base)
    model.to(device, torch.float32)
    if config.lora_rank:
        model = _with_adapters(model, config.lora_rank)
    examples = _examples(tokenizer, edits, config)
    batches = _shuffled(examples, config)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=config.rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _rate_shape(config.warmup, len(batches)))
    torch.manual_seed(config.seed)  # dropout has no other source
    losses = []
    model.train()
    for step, batch in enumerate(batches, start=1):
        hooks.check_stop(f"stopped at step {step} of {len(batches)}; nothing was saved")
        loss = model(**_collated(batch, tokenizer.pad_token_id, device)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        hooks.progress(step, len(batches))
    _save(model.merge_and_unload() if config.lora_rank else model, tokenizer, Path(out), config)
    return losses


def _load(folder: Path | str) -> tuple[Any, Any]:
    """A tokenizer that pads on the left, and a model; safetensors only, and no code of the checkpoint's."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"{folder} holds no causal language model ({reason}); give its folder or hub id"
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise CheckpointError(f"{folder} has a tokenizer without an end or padding token; give another model")
    return tokenizer, model


def _saved_delimiters(folder: Path) -> Delimiters:
    path = folder / SETTINGS
    if not path.exists():
        return Delimiters()
    saved = read_json(path, CheckpointError)
    if not isinstance(saved, dict) or "delimiters" not in saved:
        raise CheckpointError(f"{path} names no delimiters; restore it, or remove it to go by the default ones")
    return from_mapping(Delimiters, saved["delimiters"])


def _with_adapters(model: Any, rank: int) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ConfigError("LoRA needs peft, which is missing; pip install peft") from error
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


Example = tuple[list[int], list[int]]


def _examples(tokenizer: Any, edits: Sequence[CaptionEdit], config: FineTuneConfig) -> list[Example]:
    """(prompt, completion) as tokens; apart, so that the border is where it lies in generation."""
    examples = []
    for edit in edits:
        prompt = tokenizer(config.delimiters.prompt(edit.caption))["input_ids"]
        completion = tokenizer(config.delimiters.completion(edit), add_special_tokens=False)["input_ids"]
        completion += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        examples.append((prompt, completion))
    short = [example for example in examples if sum(map(len, example)) <= config.max_tokens]
    if len(short) < len(examples):
        log.warning("%d triplets are longer than %d tokens and left out", len(examples) - len(short), config.max_tokens)
    if not short:
        got = f"{len(examples)} triplets came and none has at most {config.max_tokens} tokens"
        raise CaptionError(f"{got}; give more triplets, or a larger max_tokens")
    return short


def _shuffled(examples: Sequence[Example], config: FineTuneConfig) -> list[list[Example]]:
    batches = []
    draw = random.Random(config.seed)
    for _ in range(config.epochs):
        order = draw.sample(examples, len(examples))
        batches += [order[start : start + config.batch] for start in range(0, len(order), config.batch)]
    return batches


def _rate_shape(warmup: float, steps: int) -> Callable[[int], float]:
    """Linear up, linear down."""
    rise = max(1, round(warmup * steps))
    return lambda step: min((step + 1) / rise, max(0.0, (steps - step) / max(1, steps - rise + 1)))


def _collated(batch: Sequence[Example], pad: int, device: Any) -> dict[str, Tensor]:
    """Padded on the right; prompts and padding carry no loss."""
    longest = max(len(prompt) + len(completion) for prompt, completion in batch)
    rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for prompt, completion in batch:
        length = len(prompt) + len(completion)
        rest = longest - length
        rows["input_ids"].append([*prompt, *completion, *[pad] * rest])
        rows["attention_mask"].append([1] * length + [0] * rest)
        rows["labels"].append([IGNORED] * len(prompt) + completion + [IGNORED] * rest)
    return {name: torch.tensor(values, device=device) for name, values in rows.items()}


def _save(model: Any, tokenizer: Any, out: Path, config: FineTuneConfig) -> None:
    try:
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
        write_json(out / SETTINGS, json.loads(json.dumps(asdict(config))))
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written ({error.strerror or error}); free some space") from error
