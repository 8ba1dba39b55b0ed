"""Run inside ComfyUI's folder: does ComfyUI know files of these names and shapes, and do its networks have them?

usage: python names.py SHAPES.json ANSWER.json

SHAPES.json is {case: {tensor: shape}}; ANSWER.json {case: {"config": class, "faults": [what differs]}}.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path.cwd()))
given, answer = sys.argv[1:3]
sys.argv = sys.argv[:1]

import comfy.cli_args  # noqa: E402

comfy.cli_args.args.cpu = True

import torch  # noqa: E402
from comfy import model_detection, utils  # noqa: E402
from comfy.ldm.models.autoencoder import AutoencoderKL  # noqa: E402

PREFIX = "model.diffusion_model."
VAE = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [],
    "dropout": 0.0,
}
# ComfyUI fills these in where a file lacks them, and has no use for the others
FILLED, UNUSED = (".logit_scale", ".text_projection.weight"), (".position_ids",)


def shapes(module):
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def faults(part, theirs, ours):
    """What ComfyUI's network has and the file has not, or the other way round, or in another shape."""
    ours = {name: tuple(value.shape) for name, value in ours.items() if not name.endswith(UNUSED)}
    wanted = {name: shape for name, shape in theirs.items() if name in ours or not name.endswith(FILLED)}
    return sorted(f"{part}: {name} {shape}" for name, shape in wanted.items() ^ ours.items())


def judge(tensors):
    state = {name: torch.empty(shape, device="meta") for name, shape in tensors.items()}
    state.update({name: torch.tensor(1.0) for name in state if name.startswith("edm_vpred.")})
    config = model_detection.model_config_from_unet(state, PREFIX)
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model(state, PREFIX, device="meta")
    unet = utils.state_dict_prefix_replace(dict(state), {PREFIX: ""}, filter_keys=True)
    autoencoder = utils.state_dict_prefix_replace(dict(state), {"first_stage_model.": ""}, filter_keys=True)
    text = config.process_clip_state_dict(dict(state))
    clip = config.clip_target(state_dict=state).clip(device="meta", dtype=torch.float32, model_options={})
    with torch.device("meta"):
        vae = AutoencoderKL(ddconfig=VAE, embed_dim=4)
    found = [
        *faults("UNet", shapes(model.diffusion_model), unet),
        *faults("autoencoder", shapes(vae), autoencoder),
        *faults("text encoder", shapes(clip), text),
    ]
    return {"config": type(config).__name__, "type": model.model_type.name, "faults": found}


cases = json.loads(Path(given).read_text())
Path(answer).write_text(json.dumps({name: judge(tensors) for name, tensors in cases.items()}))
