"""Nodes for tests only: they look at what a MODEL is asked for, and make ComfyUI evaluate conditions one by one."""

import json
import logging
import sys

SEEN = {}


class Watch:
    """A clone of a MODEL that notes the rows and the condition indices of every evaluation."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "name": ("STRING", {}), "apart": ("BOOLEAN", {"default": False})}}

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "watch", "tests"

    def watch(self, model, name, apart):
        seen = SEEN[name] = []
        clone = model.clone()

        def note(evaluate, given):
            seen.append([len(given["input"]), given["cond_or_uncond"]])
            return evaluate(given["input"], given["timestep"], **given["c"])

        clone.set_model_unet_function_wrapper(note)
        if apart:
            clone.add_object_patch("memory_required", lambda *args, **kwargs: 1e30)
        return (clone,)


class Count:
    """A clone of a MODEL that notes each call of its network, without being a patch that could look at indices."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "name": ("STRING", {})}}

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "count", "tests"

    def count(self, model, name):
        seen = SEEN[name] = []
        clone = model.clone()
        plain = clone.get_model_object("apply_model")

        def note(x, *args, **kwargs):
            seen.append([len(x), kwargs["transformer_options"]["cond_or_uncond"]])
            return plain(x, *args, **kwargs)

        clone.add_object_patch("apply_model", note)
        return (clone,)


class Seen:
    """What a Watch of that name noted, once ``after`` is there."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"name": ("STRING", {}), "after": ("IMAGE",)}}

    RETURN_TYPES, FUNCTION, CATEGORY = ("STRING",), "tell", "tests"

    def tell(self, name, after):
        return (json.dumps(SEEN[name]),)


class Hook:
    """A clone of a MODEL with a patch on its guidance, as other packs set them."""

    KINDS = ("none", "pre: nothing", "pre: text like no text", "post: nothing", "post: zero")

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "change": (cls.KINDS,)}}

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "hook", "tests"

    def hook(self, model, change):
        clone, (when, _, what) = model.clone(), change.partition(": ")
        if when == "pre":
            new = (lambda out: out) if what == "nothing" else (lambda out: [out[1], out[1]])
            clone.set_model_sampler_pre_cfg_function(lambda given: new(given["conds_out"]))
        if when == "post":
            factor = 1.0 if what == "nothing" else 0.0
            clone.set_model_sampler_post_cfg_function(lambda given: given["denoised"] * factor)
        return (clone,)


class Sampler:
    """The pack's own walk as a SAMPLER: core's starts a little louder, at noise * sqrt(1 + sigma^2) + latent."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"name": ("STRING", {}), "sigmas": ("SIGMAS",)}}

    RETURN_TYPES, FUNCTION, CATEGORY = ("SAMPLER",), "sampler", "tests"

    def sampler(self, name, sigmas):
        guiders = next(module for place, module in sys.modules.items() if place.endswith(".nodes._guiders"))
        return (guiders.EngineSampler(name, sigmas.double(), lambda x: x * 0),)


NODE_CLASS_MAPPINGS = {
    "Test_Watch": Watch,
    "Test_Count": Count,
    "Test_Seen": Seen,
    "Test_Hook": Hook,
    "Test_Sampler": Sampler,
}

# ComfyUI loads packs in the order of their names, so ours is loaded when this runs.
HEAVY = ("diffusers", "open_clip", "pyarrow", "matplotlib", "accelerate", "peft", "datasets", "ray", "tqdm.notebook")
logging.info("heavy modules: %s", ", ".join(name for name in HEAVY if name in sys.modules) or "none")
