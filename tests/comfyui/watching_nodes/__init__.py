"""Nodes for tests only: they look at what a MODEL is asked for, and make ComfyUI evaluate conditions one by one."""

import json

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


class Seen:
    """What a Watch of that name noted, once ``after`` is there."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"name": ("STRING", {}), "after": ("IMAGE",)}}

    RETURN_TYPES, FUNCTION, CATEGORY = ("STRING",), "tell", "tests"

    def tell(self, name, after):
        return (json.dumps(SEEN[name]),)


NODE_CLASS_MAPPINGS = {"Test_Watch": Watch, "Test_Seen": Seen}
