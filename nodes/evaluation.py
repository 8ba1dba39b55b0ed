"""IP2P Evaluate: how a checkpoint trades keeping the picture against following the instruction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..ip2p_engine.errors import ConfigError
from ..ip2p_engine.hooks import Hooks
from ..ip2p_engine.images import open_image
from . import _host
from ._api import Pairs, advanced, io, schema
from ._editor import NativeEditor, literal
from ._models import require_edit, spec_of
from .compare import numbers
from .conditioning import mask_latent
from .filtering import CLIPS, scorer
from .pairs import require_pairs


class Evaluate(io.ComfyNode):
    """The paper's figure 8 for one checkpoint."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IP2P_Evaluate",
            display_name="IP2P Evaluate",
            group="training",
            description=(
                "Edits pairs' pictures at several image_cfgs and measures each result by CLIP: the change that was "
                "asked for against what is kept (the paper's figure 8). Up and to the right is better."
            ),
            search_aliases=["benchmark", "trade-off curve", "measure model", "clip metrics", "test checkpoint"],
            inputs=_inputs(),
            outputs=[
                io.Image.Output(display_name="plot", tooltip="The trade-off curve with 95 % intervals."),
                io.String.Output(display_name="table", tooltip="The numbers of each point. Show it with Preview Any."),
            ],
        )

    @classmethod
    def execute(cls, model: Any, clip: Any, vae: Any, pairs: Sequence[Any], **settings: Any) -> io.NodeOutput:
        require_edit(model)
        require_pairs(pairs)
        plot, table = evaluate(model, clip, vae, pairs, **settings)
        return io.NodeOutput(_host.to_image([plot]), _host.preformatted(table))


def evaluate(
    model: Any,
    clip: Any,
    vae: Any,
    pairs: Sequence[Any],
    *,
    text_cfg: float,
    image_cfgs: str,
    steps: int,
    count: int,
    seed: int,
    clip_model: str,
    label: str,
    references: bool,
) -> tuple[Any, str]:
    """(plot, table) of the first ``count`` pairs."""
    from ..ip2p_engine.evaluate.curve import curve_points, trade_off_plot
    from ..ip2p_engine.evaluate.measure import measure
    from ..ip2p_engine.evaluate.methods import CopyInput, Target
    from ..ip2p_engine.evaluate.run_folder import text_of
    from ..ip2p_engine.evaluate.trade_off import points_table

    samples = [_sample(pair, seed + number) for number, pair in enumerate(pairs[:count])]
    sweep = numbers("image_cfgs", image_cfgs)
    mine = NativeMethod(model, clip, vae, label=label, text_cfg=text_cfg, image_cfgs=sweep, steps=steps)
    mine.edits = len(samples) * len(sweep)
    others = [CopyInput(), Target("the pairs' own edits")] if references else []
    if label in [setting.curve for one in others for setting in one.settings]:
        raise ConfigError(f"the label {label!r} is a reference's name; choose another")
    with scorer(clip_model) as similarity:
        rows = measure(
            samples,
            [mine, *others],
            similarity,
            resolution=spec_of(model).resolution,
            batch=8,
            hooks=Hooks(on_progress=lambda *_: _host.check_interrupted()),
        )
    points = curve_points(rows)
    return trade_off_plot(points, title=label), text_of(points_table(points))


class NativeMethod:
    """A native MODEL as a method of the engine's evaluation; its progress bar counts to ``edits``."""

    def __init__(
        self, model: Any, clip: Any, vae: Any, *, label: str, text_cfg: float, image_cfgs: Sequence[float], steps: int
    ) -> None:
        from ..ip2p_engine.evaluate.methods import Setting

        self._model, self._clip, self._vae, self._steps = model, clip, vae, steps
        self.settings = [Setting(curve=label, values={"text_cfg": text_cfg, "image_cfg": s_i}) for s_i in image_cfgs]
        self.edits, self._done = len(self.settings), 0

    def describe(self, setting: Any) -> dict[str, Any]:
        """What a row says of the setting."""
        return {"method": "instruct-pix2pix", **setting.values, "steps": self._steps}

    def prepare(self, samples: Sequence[Any]) -> Any:
        """The pictures, encoded once for all settings, and the white mask that some networks are told."""
        pictures = self._vae.encode(_host.to_image([one.source for one in samples]))
        return pictures, mask_latent(self._vae, [], pictures) if spec_of(self._model).takes_mask else None

    def make(self, samples: Sequence[Any], prepared: Any, setting: Any) -> Any:
        """The edited pictures of one setting."""
        from ..ip2p_engine.evaluate.methods import Made

        values: dict[str, Any] = {**setting.values, "done": self._done, "of": self.edits}
        editor = NativeEditor(model=self._model, clip=self._clip, steps=self._steps, **values)
        texts = [literal(one.instruction) for one in samples]
        pictures, told = prepared
        latents = editor.latents(pictures, texts, [one.seed for one in samples], told=told)
        self._done += len(samples)
        return Made(edited=_host.to_pictures(self._vae.decode(latents)))


def _sample(pair: Any, seed: int) -> Any:
    from ..ip2p_engine.evaluate.samples import Sample

    return Sample(
        key=pair.key,
        source=open_image(pair.original_image),
        target=open_image(pair.edited_image),
        instruction=pair.edit_prompt,
        caption=pair.original_prompt,
        edited_caption=pair.edited_prompt,
        seed=seed,
    )


def _inputs() -> list[io.Input]:
    return [
        io.Model.Input("model", tooltip="The InstructPix2Pix to measure, with LoRAs if you like."),
        io.Clip.Input("clip", tooltip="Its text encoder."),
        io.Vae.Input("vae", tooltip="Its autoencoder."),
        Pairs.Input("pairs", tooltip="Pictures with instruction and both captions; not those it was trained on."),
        io.Float.Input(
            "text_cfg",
            default=7.5,
            min=0.0,
            max=30.0,
            step=0.1,
            tooltip=(
                "s_T of the whole curve, usually 3 to 12; 7.5 is the paper's. Take the value you edit with: 4 for the "
                "embedded model."
            ),
        ),
        io.String.Input(
            "image_cfgs",
            default="1, 1.2, 1.4, 1.6, 1.8, 2, 2.2",
            tooltip="s_I of each point, divided by commas, usually 1 to 3. These are the paper's; fewer are quicker.",
        ),
        io.Int.Input(
            "steps", default=20, min=1, max=1000, tooltip="Sampling steps of each edit. 20 is quick, 100 the paper's."
        ),
        io.Int.Input(
            "count",
            default=16,
            min=1,
            max=100_000,
            tooltip="How many pairs to measure, from the first on. Raise it to narrow the intervals; 100 is a start.",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=2**48,
            tooltip="Noise of the first pair; the others follow it. Keep it to compare checkpoints.",
        ),
        io.Combo.Input(
            "clip_model",
            options=CLIPS,
            default="embedded",
            tooltip="embedded knows scenes only. ViT-L-14/openai is the paper's. Compare numbers of one CLIP only.",
        ),
        io.String.Input("label", default="my checkpoint", tooltip="The curve's name in the plot and in the table."),
        advanced(
            io.Boolean.Input(
                "references",
                default=True,
                tooltip="Also show the untouched pictures and the pairs' own edits, between which curves lie.",
            )
        ),
    ]
