"""From a call's arguments to a run that can take its next step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from ..errors import CheckpointError, ConfigError
from ..files import digest_of_text, disk_errors, link_or_copy, public_name
from ..hooks import Hooks
from ..images import save_image
from ..networks.compiled import check_compiler
from ..networks.digest import digest_of_weights
from ..networks.model import Model, load_model
from . import hub
from .adapters import begin_from
from .batches import Batch, PictureReader, Reader, Share, batches
from .checkpoints import State, keep_last, latest, step_of
from .config import TrainConfig
from .distill import Distillation, frozen_copy
from .distributed import log_picture, refusals
from .encoding import CacheReader, Encoder, build_cache, cache_key
from .networks import make_trainable, move_frozen, needs_masks, trained_of, trained_texts
from .objective import Objective
from .optimizers import Average, PowerAverage, check_packages, make_optimizers
from .order import make_order
from .planning import Plan, plan_of, seconds_of_a_micro_batch
from .progress import TrainResult
from .results import export
from .run_folder import RunFolder
from .snapshots import write_snapshot
from .sources import licences_of, measured_rows, name_of, names_of, open_source, refuse_without_masks
from .validation import ValidationSet

__all__ = ["Data", "Run", "begin", "planned"]


class Examples(Protocol):
    """Anything with a length that gives examples by number: a list, a torch Dataset, a Dataset of the hub's library."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


Data = str | Path | Examples
"""What ``train/sources.open_source`` opens."""
MAX_NAMED = 100
MEASURED_ROWS = (
    "%s: %d of %d pairs are of the test split, on which ip2p evaluate measures, and are trained on; to measure on what "
    "the model has not seen, start a new run with `hold_out_test`"
)

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Run:
    """Everything that a step needs."""

    config: TrainConfig
    accelerator: Any
    model: Model
    unet: Any
    """The model's UNet as Accelerate wraps it."""
    encoder: Encoder
    objective: Objective | Distillation
    state: State
    folder: RunFolder
    stream: Iterator[Batch]
    share: Share
    validation: ValidationSet | None
    base: str | Path
    about: dict[str, Any]
    first: int
    """Steps that were done before."""
    broken: dict[str, None]

    def leave_out(self, broken: Sequence[str]) -> None:
        """Count rows that others stand in for, and name each once, the first hundred, by the first process."""
        for sentence in broken:
            if sentence in self.broken:
                continue
            self.broken[sentence] = None
            if self.accelerator.is_main_process and len(self.broken) <= MAX_NAMED:
                log.warning("left out: %s", sentence)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients stay in each process until the block ends."""
        with ExitStack() as held:
            for network in (self.unet, *self.encoder.trained_texts):
                held.enter_context(self.accelerator.no_sync(network))
            yield

    def snapshot(self, step: int) -> None:
        """The two averages of which others are made after the run, by the first process."""
        values = self.state.of_lengths()
        if self.accelerator.is_main_process:
            write_snapshot(self.folder.averages, step, values)

    def save(self, step: int) -> None:
        """A checkpoint after ``step`` steps, by the first process."""
        self.folder.save(step, self.state, self.config.keep, list(self.broken))
        self.accelerator.wait_for_everyone()

    def push(self, step: int, *, last: bool = False) -> None:
        """To the hub, by the first process; a push that fails on the way is said, the last one raises ConfigError."""
        if not self.accelerator.is_main_process or self.config.push_to_hub is None:
            return
        try:
            hub.push(self.folder.path, self.config.push_to_hub, step)
        except ConfigError as error:
            if last:
                raise
            log.warning("%s", error)

    def keeps(self, step: int) -> bool:
        """Whether anything is kept of a step, but for its loss."""
        config = self.config
        every = (config.posthoc_every, config.save_every, config.export_every, config.validate_every, config.push_every)
        return step == config.steps or any(_due(step, one) for one in every)

    def keep(self, step: int, *, stopped: bool) -> None:
        """What is due after a step."""
        config, last = self.config, step == self.config.steps
        if config.posthoc_every and (last or _due(step, config.posthoc_every)):
            self.snapshot(step)  # before its checkpoint, from which a killed run goes on
        if stopped or last or _due(step, config.save_every):
            self.save(step)
        if not last and _due(step, config.export_every):
            self.export(step)
        if _due(step, config.validate_every):
            self.validate(step)
        if not last and _due(step, config.push_every):
            self.push(step)

    def validate(self, step: int) -> None:
        """A strip of edits by the averaged weights, and the loss on pairs that stay the same."""
        if self.validation is None:
            return
        move_frozen(self.model, self.accelerator.device)
        losses = self.validation.losses(self.model, self.state.average, self.encoder, self.share.micro)
        rows = self.validation.edit(self.model, self.state.average)
        if self.config.cache:
            move_frozen(self.model, "cpu")
        if not self.accelerator.is_main_process:
            return
        scores = self.validation.scores(rows)
        if losses or scores:
            self.folder.append_validation({"step": step, **losses, "held_out": self.validation.held_out, **scores})
            told = {f"validation_loss_{kind}": value for kind, value in losses.items()}
            self.accelerator.log(told | {f"validation_{name}": value for name, value in scores.items()}, step=step)
        sheet = self.validation.sheet(rows)
        log_picture(self.accelerator, "validation", sheet, step)
        save_image(sheet, self.folder.validation_picture(step))  # last: a step that has its picture lacks nothing

    def catch_up(self) -> None:
        """Make what a kill after the last checkpoint took: its step's validation and exported models."""
        step, config = self.first, self.config
        if _due(step, config.validate_every) and not self.folder.validation_picture(step).exists():
            self.validate(step)
        lacking = not all(path.exists() for path in self._exported(step))
        if _due(step, config.export_every) and step < config.steps and lacking:
            self.export(step)

    def _exported(self, step: int) -> list[Path]:
        names = {"ema": "ema.safetensors", "raw": "raw.safetensors", "lora": "lora.safetensors"}
        return [self.folder.export_folder(step) / names.get(kind, kind) for kind in self.config.outputs or ()]

    def export(self, step: int, folder: Path | None = None) -> dict[str, Path]:
        """The models of ``step``, in exports/ or another folder; every process calls this."""
        training = {"config": asdict(self.config), **self.about, "step": step}
        writes = self.accelerator.is_main_process
        target = folder or self.folder.export_folder(step)
        return export(self.model, self.state.average, self.config, target, training, base=self.base, writes=writes)

    def _leave_outputs(self, step: int) -> dict[str, Path]:
        """What a finished run leaves: what was exported after this step already gets a second name."""
        done, out = self.folder.export_folder(step), self.folder.path
        if self.config.export_every == 0 or step % self.config.export_every:
            return self.export(step, out)
        files = {name: out / path.relative_to(done) for name, path in self.export(step).items()}
        if self.accelerator.is_main_process:
            with disk_errors(out, "written", CheckpointError):
                for path in files.values():
                    link_or_copy(done / path.relative_to(out), path)
        return files

    def result(self, step: int) -> TrainResult:
        """What is left after the last step; a finished run's files are written, and one checkpoint stays."""
        files: dict[str, Path] = {}
        finished = step >= self.config.steps
        if finished:
            files = self._leave_outputs(step)
            if self.accelerator.is_main_process:
                keep_last(self.folder.checkpoints, min(1, self.config.keep))
            self.push(step, last=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        return TrainResult(
            step=step,
            finished=finished,
            loss=self.folder.recent_loss(),
            checkpoint=latest(self.folder.checkpoints),
            curve=self.folder.curve,
            files=files,
            broken=tuple(self.broken)[:MAX_NAMED],
            broken_count=len(self.broken),
        )


def begin(
    config: TrainConfig,
    accelerator: Any,
    data: Data,
    base: str | Path,
    out: Path,
    hooks: Hooks,
    on_cache: Callable[[int, int], None],
    on_plan: Callable[[Plan], None],
    held: ExitStack,
) -> Run:
    """Open the data and the base, cache what is to be cached, take up the last checkpoint of ``out`` if there is one.

    ``held`` keeps the folder from other runs until it closes. Raises Interrupted if it is to stop while it caches.
    """
    folder = RunFolder(out, writes=accelerator.is_main_process)
    _meet_hub(config, folder, accelerator)
    share, config, source, model, origin = _opened(config, accelerator, folder, data, base)
    teacher = None if config.distill is None else frozen_copy(model.unet)  # before the run's weights are taken up
    test = _measured(source, data, folder)
    held.enter_context(folder.taken())
    unet, texts, state = _state(model, config, accelerator)
    encoder = Encoder(model, texts)
    first, broken = folder.take_up(state)
    on_plan(_plan(config, model, out, source, test, first))
    with refusals():
        accelerator.init_trackers("ip2p", config={name: str(value) for name, value in asdict(config).items()})
    masks = needs_masks(model, config)
    reader: Reader = PictureReader(source, config, masks=masks)
    broken_rows: Collection[int] = ()
    if config.cache:
        reader, broken_rows = _cached(config, accelerator, source, encoder, model, share, folder, hooks, on_cache)
    order = make_order(source, config, broken_rows, hooks)
    about: dict[str, Any] = {"data": name_of(data), "base": public_name(base)[:500], "spec": asdict(model.spec)}
    about |= _of_data(source) | {"processes": share.world, "test_pairs": test, **origin}
    about |= folder.adjusted(config, first)
    folder.begin(config, about, first)
    held.callback(folder.draw_curve)  # however the run ends
    return Run(
        config=config,
        accelerator=accelerator,
        model=model,
        unet=unet,
        encoder=encoder,
        objective=_objective(model, encoder.null_text, config, teacher),
        state=state,
        folder=folder,
        stream=batches(reader, order, config, share, first),
        share=share,
        validation=ValidationSet(source, config, masks=masks, scores=folder.writes) if config.validate_every else None,
        base=base,
        about=about,
        first=first,
        broken=broken,
    )


def _objective(model: Model, null_text: Any, config: TrainConfig, teacher: Any) -> Any:
    if teacher is None:
        return Objective(model, null_text, config)
    return Distillation(model, null_text, config, teacher)


def _meet_hub(config: TrainConfig, folder: RunFolder, accelerator: Any) -> None:
    """Bring a run that is to go on from the hub, and see that this one can be pushed; by the first process."""
    if folder.writes and config.resume_from_hub:
        hub.pull(config.resume_from_hub, folder.path)
    if folder.writes and config.push_to_hub:
        hub.ready(config.push_to_hub)
    accelerator.wait_for_everyone()


def _due(step: int, every: int) -> bool:
    return bool(step and every) and step % every == 0


def _of_data(source: Any) -> dict[str, Any]:
    """What the checkpoint's header says of licences, and of what was held out and by which rule."""
    held_out = {"held_out": source.held_out, "split_rule": source.split_rule} if getattr(source, "held_out", 0) else {}
    licences = licences_of(source)
    return {"data_sets": names_of(source), **held_out, **({"licences": licences} if licences else {})}


def planned(config: TrainConfig, accelerator: Any, data: Data, base: str | Path, out: Path) -> Plan:
    """What the same arguments would train, with a micro-batch timed; nothing is written."""
    folder = RunFolder(out, writes=False)
    share, config, source, model, _ = _opened(config, accelerator, folder, data, base)
    first = step_of(latest(folder.checkpoints))
    null = Encoder(model).null_text
    unet = accelerator.prepare(model.unet)
    objective = _objective(model, null, config, None if config.distill is None else frozen_copy(model.unet))
    seconds = seconds_of_a_micro_batch(model, unet, objective, null, share.micro, config)
    seconds *= -(-config.batch_size // share.world // share.micro) * max(0, config.steps - first)
    return _plan(config, model, out, source, len(measured_rows(source)), first, seconds)


def _opened(
    config: TrainConfig, accelerator: Any, folder: RunFolder, data: Data, base: str | Path
) -> tuple[Share, TrainConfig, Any, Model, dict[str, str]]:
    """(share, the whole config, data, model, digests of both); refuses what can be refused so early."""
    check_packages(config)
    share = Share.of(config, accelerator.process_index, accelerator.num_processes)
    folder.refuse_other(config)
    config = folder.outputs(config)
    source = open_source(data, config)
    if config.unmasked_weight < 1 or config.mask_channels:
        refuse_without_masks(source, data)
    model, base_digest = _model(base, config, accelerator.device)
    if config.lora_from and latest(folder.checkpoints) is None:
        begin_from(model, Path(config.lora_from))
    origin = {"data_digest": digest_of_text(source.identity), "base_digest": base_digest}
    folder.refuse_other_origin(model.spec, **origin)
    return share, config, source, model, origin


def _cached(
    config: TrainConfig,
    accelerator: Any,
    source: Any,
    encoder: Encoder,
    model: Model,
    share: Share,
    folder: RunFolder,
    hooks: Hooks,
    on_cache: Callable[[int, int], None],
) -> tuple[Reader, Collection[int]]:
    """(what reads the cache, which is made first, rows that it has not); the frozen networks then leave the device."""
    key = cache_key(source, model, config, masks=needs_masks(model, config))
    build_cache(source, encoder, key, config, share, folder.cache, on_cache, hooks)
    accelerator.wait_for_everyone()
    reader = CacheReader(folder.cache, key, config)
    move_frozen(model, "cpu")
    return reader, reader.broken() if config.buckets else ()


def _plan(
    config: TrainConfig, model: Model, out: Path, source: Any, test: int, first: int, seconds: float | None = None
) -> Plan:
    pairs = len(source) if hasattr(source, "__len__") else None
    held_out = getattr(source, "held_out", 0)
    return plan_of(config, model, out, pairs=pairs, test_pairs=test, held_out=held_out, first=first, seconds=seconds)


def _measured(source: Any, data: Data, folder: RunFolder) -> int:
    """How many pairs are of the test split; says so."""
    test = len(measured_rows(source))
    if test and folder.writes:
        log.warning(MEASURED_ROWS, name_of(data), test, len(source))
    return test


def _model(base: str | Path, config: TrainConfig, device: torch.device) -> tuple[Model, str]:
    """(what is trained, the digest of what it was made from)."""
    _compiles(config, device)
    loaded = load_model(base, device="cpu", dtype="file")
    digest = digest_of_weights(loaded)
    model = make_trainable(loaded, config).to(device)
    if device.type == "cuda":
        for network in (model.unet, model.autoencoder):
            network.to(memory_format=torch.channels_last)
    return model, digest


def _compiles(config: TrainConfig, device: torch.device) -> bool:
    """Whether the UNet is compiled. Raises ConfigError where it is asked for and cannot be."""
    if config.compile is None:
        from torch.utils._triton import has_triton

        return device.type == "cuda" and has_triton()
    if config.compile:
        check_compiler(device.type)
    return config.compile


def _state(model: Model, config: TrainConfig, accelerator: Any) -> tuple[Any, list[Any], State]:
    """(the UNet as Accelerate wraps it, the text encoders where they are trained, what the steps change)."""
    needs_whole = config.lora_rank or config.optimizer in ("muon", "adafactor") or config.train_text_encoder
    if accelerator.distributed_type == "FSDP" and needs_whole:
        named = "LoRA, muon, adafactor and training text encoders"
        raise ConfigError(f"{named} need whole tensors; start several GPUs without FSDP")
    optimizers, texts = make_optimizers(trained_of(model), config), trained_texts(model)
    with refusals():
        unet, *rest = accelerator.prepare(model.unet, *texts, *optimizers)
    texts, optimizers = rest[: len(texts)], rest[len(texts) :]
    if _compiles(config, accelerator.device):
        model.unet.compile()
    parameters = trained_of(model)
    average = Average(parameters, config.ema_decay)
    lengths = [PowerAverage(parameters, one) for one in config.posthoc_lengths if config.posthoc_every]
    kept: dict[str, Any] = {"average": average, "lengths": lengths}
    return unet, texts, State(parameters=parameters, optimizers=optimizers, scaler=accelerator.scaler, **kept)
