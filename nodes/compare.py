"""Sheets of pictures to compare by: before and after, labelled grids, and sweeps of the two guidances."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from ..ip2p_engine.errors import ConfigError
from ..ip2p_engine.strips import strip
from ._api import io, schema, ui
from ._host import to_image, to_pictures


class BeforeAfter(io.ComfyNode):
    """The picture and its edit, beside each other."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IP2P_BeforeAfter",
            display_name="IP2P Before and After",
            group="sampling",
            description=(
                "Shows the picture before and the picture after beside each other, in the node and as one picture to "
                "save. Lists and batches become rows; one picture before stands beside every picture after."
            ),
            search_aliases=["before after", "compare", "side by side", "comparison", "image compare"],
            is_input_list=True,
            is_output_node=True,
            inputs=[
                io.Image.Input("before", tooltip="The picture before the edit, or several."),
                io.Image.Input("after", tooltip="The picture after it, as many; sizes may differ."),
                io.String.Input(
                    "labels",
                    default="before, after",
                    tooltip="What stands below the two, divided by a comma. Empty leaves them bare.",
                ),
                io.Int.Input(
                    "height",
                    default=384,
                    min=32,
                    max=2048,
                    step=8,
                    tooltip="Height of each picture on the sheet, in pixels. Raise it to see details.",
                ),
                io.Int.Input("columns", default=1, min=1, max=100, tooltip="Pairs in a row; raise it for many."),
            ],
            outputs=[io.Image.Output(display_name="comparison", tooltip="The sheet, as one picture, to save it.")],
        )

    @classmethod
    def execute(
        cls,
        before: list[Tensor],
        after: list[Tensor],
        labels: list[str] = ["before, after"],  # noqa: B006
        height: list[int] = [384],  # noqa: B006
        columns: list[int] = [1],  # noqa: B006
    ) -> io.NodeOutput:
        first, second = ([one for batch in batches for one in to_pictures(batch)] for batches in (before, after))
        sheet = to_image([side_by_side(first, second, labels[0], height[0], columns[0])])
        return io.NodeOutput(sheet, ui=ui.PreviewImage(sheet, cls=cls))


def side_by_side(
    before: Sequence[Image.Image], after: Sequence[Image.Image], labels: str, height: int, columns: int
) -> Image.Image:
    """Pairs of pictures on one sheet; raises ConfigError for pictures that do not pair, and for odd labels."""
    if len(before) not in (1, len(after)):
        raise ConfigError(
            f"there are {len(before)} pictures before and {len(after)} after; give as many, or one before"
        )
    words = [word.strip() for word in labels.split(",")] if labels.strip() else []
    if len(words) not in (0, 2):
        raise ConfigError(f"labels is {labels!r}; give two, such as before, after, or none")
    pairs = zip(before if len(before) > 1 else [before[0]] * len(after), after, strict=True)
    return grid([one for pair in pairs for one in pair], words * len(after), 2 * columns, height)


class SweepGuidance(io.ComfyNode):
    """Every combination of two lists of scales."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IP2P_SweepGuidance",
            display_name="IP2P Sweep Guidance",
            group="sampling",
            description="Every combination of the two guidances, as lists: what they are wired to runs once for each.",
            search_aliases=["xy plot", "parameter sweep", "xyz plot", "cfg sweep"],
            inputs=[
                io.String.Input(
                    "text_cfgs",
                    default="3, 5, 7.5, 10",
                    tooltip="Values of text_cfg, divided by commas; the rows of the grid.",
                ),
                io.String.Input(
                    "image_cfgs",
                    default="1, 1.25, 1.5, 2",
                    tooltip="Values of image_cfg, divided by commas; the columns of the grid.",
                ),
            ],
            outputs=[
                io.Float.Output(display_name="text_cfg", is_output_list=True, tooltip="For a text_cfg input."),
                io.Float.Output(display_name="image_cfg", is_output_list=True, tooltip="For an image_cfg input."),
                io.String.Output(display_name="label", is_output_list=True, tooltip="For IP2P Labelled Grid."),
                io.Int.Output(display_name="columns", tooltip="How many image_cfgs there are, for IP2P Labelled Grid."),
            ],
        )

    @classmethod
    def execute(cls, text_cfgs: str, image_cfgs: str) -> io.NodeOutput:
        texts, images = numbers("text_cfgs", text_cfgs), numbers("image_cfgs", image_cfgs)
        pairs = [(text, image) for text in texts for image in images]
        labels = [f"text {text:g}, image {image:g}" for text, image in pairs]
        return io.NodeOutput([t for t, _ in pairs], [i for _, i in pairs], labels, len(images))


class LabelledGrid(io.ComfyNode):
    """Pictures and what they are, on one sheet."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IP2P_LabelledGrid",
            display_name="IP2P Labelled Grid",
            group="sampling",
            description="Lays pictures out on white with a label below each: for sweeps, and to compare.",
            search_aliases=["image grid", "contact sheet", "xy plot grid", "labels", "montage"],
            is_input_list=True,
            inputs=[
                io.Image.Input("images", tooltip="Pictures, as a list, as a batch, or both; sizes may differ."),
                io.String.Input(
                    "labels",
                    default="",
                    multiline=True,
                    tooltip="Texts below the pictures: one line each, or a list. Empty leaves all of them bare.",
                ),
                io.Int.Input(
                    "columns",
                    default=4,
                    min=1,
                    max=100,
                    tooltip="Pictures in a row, 1 to 100; wire it from IP2P Sweep Guidance.",
                ),
                io.Int.Input(
                    "height",
                    default=192,
                    min=32,
                    max=2048,
                    step=8,
                    tooltip="Height of each picture on the sheet, in pixels. Raise it to see details.",
                ),
            ],
            outputs=[io.Image.Output(display_name="grid", tooltip="The sheet, as one picture.")],
        )

    @classmethod
    def execute(cls, images: list[Tensor], labels: list[str], columns: list[int], height: list[int]) -> io.NodeOutput:
        pictures = [picture for batch in images for picture in to_pictures(batch)]
        lines = [line for text in labels for line in text.splitlines()]
        return io.NodeOutput(to_image([grid(pictures, lines, columns[0], height[0])]))


def numbers(name: str, text: str) -> list[float]:
    """Numbers divided by commas or spaces; raises ConfigError."""
    try:
        values = [float(word) for word in text.replace(",", " ").split()]
    except ValueError:
        values = []
    if not values:
        raise ConfigError(f"{name} is {text!r}; give numbers divided by commas, such as 3, 5, 7.5")
    return values


def grid(pictures: Sequence[Image.Image], labels: Sequence[str], columns: int, height: int) -> Image.Image:
    """Strips of ``columns`` pictures below each other; raises ConfigError if labels and pictures do not pair."""
    texts = list(labels) or [""] * len(pictures)
    if len(texts) != len(pictures):
        raise ConfigError(
            f"the grid got {len(pictures)} pictures and {len(texts)} labels; give one line a picture, or none"
        )
    rows = [
        strip(pictures[start : start + columns], texts[start : start + columns], height=height)
        for start in range(0, len(pictures), columns)
    ]
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    return sheet
