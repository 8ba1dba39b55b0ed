"""InstructPix2Pix for ComfyUI: the node pack's door. Nothing is imported before ComfyUI asks for the nodes."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """The extension; the error of an unsuitable ComfyUI says what to do."""
    import logging

    try:
        from .nodes import InstructPix2PixExtension
    except ImportError as error:
        if "comfy_api" in str(error):
            raise ImportError("InstructPix2Pix needs ComfyUI 0.3.75 or newer; update ComfyUI") from error
        logging.getLogger(__name__).exception("InstructPix2Pix cannot be loaded; pip install -r its requirements.txt")
        raise
    return InstructPix2PixExtension()
