"""Run inside ComfyUI's folder: a step of a narrow SDXL or CosXL edit model by ComfyUI's classes, and our nodes' edit.

usage: python narrow_step.py CHECKPOINT INPUTS.safetensors OUTPUTS.safetensors
"""

import importlib.util
import sys
from pathlib import Path

sys.path.insert(0, str(Path.cwd()))
checkpoint, inputs, outputs = sys.argv[1:4]
sys.argv = sys.argv[:1]

import comfy.cli_args  # noqa: E402

comfy.cli_args.args.cpu = True

import comfy.model_patcher  # noqa: E402
import torch  # noqa: E402
from comfy import model_detection, supported_models, utils  # noqa: E402
from comfy.ldm.modules.diffusionmodules.openaimodel import Timestep  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

PREFIX, SIZE_ID_WIDTH, ROOT = "model.diffusion_model.", 8, Path(__file__).parents[2]


class Texts:
    """Stands for a CLIP: the instruction and the empty text, encoded."""

    def tokenize(self, text):
        return text

    def encode_from_tokens_scheduled(self, text):
        kind = "" if text else "null_"
        return [[given[f"{kind}text"], {"pooled_output": given[f"{kind}pooled"]}]]


def edited(model):
    """As IP2P_Sample edits."""
    place = importlib.util.spec_from_file_location("pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    sys.modules["pack"] = importlib.util.module_from_spec(place)
    from pack.nodes._editor import NativeEditor

    cpu = torch.device("cpu")
    patcher = comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)
    editor = NativeEditor(model=patcher, clip=Texts(), text_cfg=5.0, image_cfg=1.5, steps=4)
    return editor.latents(given["latent"], ["turn him into a cyborg"], [7])


given = load_file(inputs)
state = utils.load_torch_file(checkpoint)
config = supported_models.SDXL_instructpix2pix(model_detection.detect_unet_config(state, PREFIX))
config.set_inference_dtype(torch.float32, None)
with torch.inference_mode():
    model = config.get_model(state, PREFIX, device="cpu")
    model.load_model_weights(state, PREFIX)
    model.embedder = Timestep(SIZE_ID_WIDTH)
    height, width = (8 * side for side in given["x"].shape[-2:])
    conditions = model.extra_conds(
        noise=given["x"],
        device=torch.device("cpu"),
        cross_attn=given["text"],
        pooled_output=given["pooled"],
        concat_latent_image=given["latent"],
        width=width,
        height=height,
    )
    processed = {name: value.process_cond(1, area=None).cond for name, value in conditions.items()}
    denoised = model.apply_model(given["x"], given["sigma"], **processed)
    results = {"denoised": denoised.contiguous(), "edited": edited(model).contiguous()}
    save_file(results, outputs, metadata={"type": model.model_type.name})
