"""Run inside ComfyUI's folder: what a step of an edit and of pairs waits for, on a device that is not there.

usage: python waiting.py PACK OUTPUT.json ({"waits": ..., "doubles": ...})

PACK is the checkout whose nodes are counted, so that an older one can be counted by the same detector. For each walk
the waits of 4 steps less those of 2, over 2, by (operation, the innermost place in the code); progress, Cancel and the
preview are connected. Beside it, where the device was given float64, which many devices have not.
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path.cwd()))
root, output = Path(sys.argv[1]), Path(sys.argv[2])
sys.argv = sys.argv[:1]

import comfy.cli_args  # noqa: E402

comfy.cli_args.args.cpu = True
comfy.cli_args.args.preview_method = comfy.cli_args.LatentPreviewMethod.Latent2RGB

import comfy.latent_formats  # noqa: E402
import torch  # noqa: E402

STEPS = (2, 4)
CAPTIONS = {"caption": "a red heart on a sky background", "edited_caption": "a blue heart on a sky background"}
EDITS = {
    "edit": {},
    "heun": {"sampler": "heun"},
    "one branch": {"text_cfg": 1.0, "image_cfg": 1.0},
    "inside a mask": {"mask": True},
    "guided at some levels": {"guidance": {"interval": (1.0, 5.0)}},
    "under core's preview": {"preview": True},
}
PAIRS = {
    "pairs": {},
    "pairs that share nothing": {"p2p_range": (0.0, 0.0)},
    "pairs that start later": {"edited_prompt_start": 0.5},
    "refine with a local blend": {"mode": "refine", "local_blend": True},
}


def module(name, path, **place):
    """A module or a package by its path."""
    spec = importlib.util.spec_from_file_location(name, path, **place)
    found = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


waits = module("waits", Path(__file__).parents[1] / "waits.py")
module("pack", root / "__init__.py", submodule_search_locations=[str(root)])


def own(*names):
    """The first of the pack's modules that is there: rooms have moved."""
    for name in names:
        with contextlib.suppress(ModuleNotFoundError):
            return importlib.import_module(f"pack.{name}")
    raise ModuleNotFoundError(names)


editor, maker, models = own("nodes._editor"), own("nodes._pair_maker"), own("nodes._models")
generator = own("ip2p_engine.p2p.generator", "ip2p_engine.pairs")
KNOWN = {"mask", "preview"} | {
    field.name for kind in (editor.NativeEditor, generator.PairConfig) for field in dataclasses.fields(kind)
}


def there(source):
    """A MODEL whose weights claim to be on the device, and its CLIP, which stays here."""
    native = models.load_native(source)
    waits.on_device(native.model.model.diffusion_model)
    native.model.load_device = waits.DEVICE
    return native


def a_step(walk):
    """What a step waits for."""
    counts = []
    for steps in STEPS:
        with device() as gpu:
            walk(steps)
        counts.append(Counter(gpu.waits))
        doubles.update(gpu.doubles)
    found = counts[1] - counts[0]
    return [[*what, number / (STEPS[1] - STEPS[0])] for what, number in sorted(found.items())]


@contextlib.contextmanager
def device():
    """The device, as ComfyUI's memory management asks for it."""
    nothing = {"active_bytes.all.current": 0, "reserved_bytes.all.current": 0}
    with (
        waits.fake_device(innermost=True) as gpu,
        patch.object(torch.cuda, "memory_stats", lambda device=None: nothing),
    ):
        yield gpu


def edit(native, settings):
    source, settings = torch.zeros(1, 4, 8, 8), {"text_cfg": 7.5, "image_cfg": 1.5, **settings}
    mask = (torch.rand(1, 1, 64, 64) > 0.5).float() if settings.pop("mask", False) else None
    if settings.pop("preview", False):
        native.model.model.latent_format = comfy.latent_formats.SD15()

    def walk(steps):
        made = editor.NativeEditor(model=native.model, clip=native.clip, steps=steps, **settings)
        made.latents(source, ["make it snow"], [1], mask)

    return walk


def pairs(native, settings):
    def walk(steps):
        config = generator.PairConfig(steps=steps, size=(64, 64), **settings)
        jobs = [generator.PairJob(**CAPTIONS, seed=seed) for seed in (1, 2)]
        drawn = [generator.draw_settings(job.seed, config.p2p_range, config.cfg_range) for job in jobs]
        maker.NativePairs(model=native.model, clip=native.clip, vae=native.vae, config=config)._walk(jobs, drawn, 0, 1)

    return walk


found, doubles = {}, Counter()
for source, kinds, made in (("embedded", EDITS, edit), ("embedded-sd", PAIRS, pairs)):
    with torch.inference_mode():
        native = there(source)
        a_step(made(native, {}))  # makes what is made once
        for name, settings in kinds.items():
            if settings.keys() <= KNOWN:  # 0.1 had fewer options
                found[name] = a_step(made(native, settings))
output.write_text(json.dumps({"waits": found, "doubles": sorted(map(list, doubles))}))
