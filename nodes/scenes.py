"""IP2P Render Scene and IP2P Example Photo: pictures for the embedded models, so that workflows run without a file."""

from __future__ import annotations

from ..ip2p_engine.images import open_image
from ..ip2p_engine.photos.pictures import catalogue, demo_picture
from ..ip2p_engine.scenes.grammar import caption_of
from ..ip2p_engine.scenes.world import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIZES, STYLES, Scene, render
from ._api import io, schema
from ._host import to_image

PHOTOS = {"moose": "moose", "cat": "chelsea-the-cat", "coffee": "coffee", "dandelions": "seeding"}


class RenderScene(io.ComfyNode):
    """One picture of the embedded world."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IP2P_RenderScene",
            display_name="IP2P Render Scene",
            group="loading",
            description=(
                "Draws a scene, which is what the embedded model was trained on: one shape on a plain ground, 64 x 64. "
                "Replace it by Load Image once you use a full checkpoint."
            ),
            search_aliases=["test image", "sample image", "example picture", "demo picture"],
            inputs=[
                io.Combo.Input("shape", options=list(SHAPES), default="heart", tooltip="What is in the picture."),
                io.Combo.Input("colour", options=list(COLOURS), default="red", tooltip="The shape's colour."),
                io.Combo.Input("background", options=list(BACKGROUNDS), default="sky", tooltip="The ground's colour."),
                io.Combo.Input("size", options=list(SIZES), default="large", tooltip="How large the shape is."),
                io.Combo.Input(
                    "style", options=list(STYLES), default="plain", tooltip="By day, or one of three styles."
                ),
                io.Combo.Input("place", options=list(PLACES), default="centre", tooltip="Where the shape is."),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The scene, 64 x 64."),
                io.String.Output(display_name="caption", tooltip="What it shows, in the words of the embedded model."),
            ],
        )

    @classmethod
    def execute(cls, shape: str, colour: str, background: str, size: str, style: str, place: str) -> io.NodeOutput:
        scene = Scene(shape=shape, colour=colour, background=background, size=size, style=style, place=place)
        return io.NodeOutput(to_image([render(scene)]), caption_of(scene))


class ExamplePhoto(io.ComfyNode):
    """One of the photographs that come with the pack."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="IP2P_ExamplePhoto",
            display_name="IP2P Example Photo",
            group="loading",
            description=(
                "One of four free photographs, which embedded-photos has never seen. "
                "Replace it by Load Image to edit your own."
            ),
            search_aliases=["test image", "sample image", "example picture", "stock photo", "demo picture"],
            inputs=[io.Combo.Input("photo", options=list(PHOTOS), default="moose", tooltip="Which photograph.")],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The photograph."),
                io.String.Output(display_name="credit", tooltip="Its title, author and licence."),
            ],
        )

    @classmethod
    def execute(cls, photo: str) -> io.NodeOutput:
        key = PHOTOS[photo]
        about = next(one for one in catalogue() if one.key == key)
        credit = f"{about.title} by {about.author} ({about.licence})"
        return io.NodeOutput(to_image([open_image(demo_picture(key))]), credit)
