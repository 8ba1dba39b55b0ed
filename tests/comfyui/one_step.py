"""Run inside ComfyUI's folder: load a checkpoint as CheckpointLoaderSimple does and take one denoising step.

usage: python one_step.py CHECKPOINT INPUTS.safetensors OUTPUTS.safetensors
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path.cwd()))
checkpoint, inputs, outputs = sys.argv[1:4]
sys.argv = sys.argv[:1]

import comfy.cli_args  # noqa: E402

comfy.cli_args.args.cpu = True

import comfy.model_management  # noqa: E402
import comfy.sd  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

given = load_file(inputs)
with torch.inference_mode():
    model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(checkpoint, output_vae=True, output_clip=True)
    comfy.model_management.load_models_gpu([model])
    tokens = clip.tokenize("turn him into a cyborg")
    text = clip.encode_from_tokens(tokens)
    pixels = (given["pixels"].movedim(1, -1) + 1) / 2
    denoised = model.model.apply_model(
        given["x"], given["sigma"], c_concat=given["image"], c_crossattn=given["text"].to(torch.float32)
    )
    save_file(
        {
            "denoised": denoised.contiguous(),
            "text": text.float().contiguous(),
            "image": vae.encode(pixels).contiguous(),
        },
        outputs,
        metadata={"config": type(model.model.model_config).__name__},
    )
