"""Run inside ComfyUI's folder: load a checkpoint as IP2P_LoadCheckpoint does and edit as IP2P_Sample does, one step.

usage: python loaded_edit.py CHECKPOINT INPUTS.safetensors OUTPUTS.safetensors
"""

import importlib.util
import sys
from pathlib import Path

sys.path.insert(0, str(Path.cwd()))
checkpoint, inputs, outputs = sys.argv[1:4]
sys.argv = sys.argv[:1]

import comfy.cli_args  # noqa: E402

comfy.cli_args.args.cpu = True

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

ROOT = Path(__file__).parents[2]
place = importlib.util.spec_from_file_location("pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
sys.modules["pack"] = importlib.util.module_from_spec(place)
from pack.nodes._editor import NativeEditor  # noqa: E402
from pack.nodes._models import load_native  # noqa: E402

given = load_file(inputs)
with torch.inference_mode():
    native = load_native(Path(checkpoint))
    editor = NativeEditor(
        model=native.model, clip=native.clip, text_cfg=7.5, image_cfg=1.5, steps=1, sampler="euler", schedule="model"
    )
    latent = editor.latents(given["image"], ["make it snow"], [7], told=given.get("told"))
    save_file({"latent": latent.float().contiguous()}, outputs, metadata={"config": type(native.model.model).__name__})
