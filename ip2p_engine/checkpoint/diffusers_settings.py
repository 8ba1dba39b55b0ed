"""The small files of a diffusers folder: pipeline, scheduler and tokenizers, so that it loads without the hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..tokenizer import MAX_TOKENS, clip_tokenizer, merges
from .spec import ModelSpec

__all__ = ["TOKENIZER_FILES", "model_index", "scheduler_config", "write_json", "write_tokenizers"]

TOKENIZER_FILES = ("merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json")
DIFFUSERS, TRANSFORMERS = "diffusers", "transformers"
START, END = "<|startoftext|>", "<|endoftext|>"


def model_index(spec: ModelSpec) -> dict[str, Any]:
    """model_index.json: the pipeline's class and its parts."""
    double = spec.family in ("sdxl", "cosxl")
    task = "InstructPix2PixPipeline" if spec.in_channels == 8 else "Pipeline"
    index: dict[str, Any] = {
        "_class_name": f"StableDiffusion{'XL' if double else ''}{task}",
        "unet": [DIFFUSERS, "UNet2DConditionModel"],
        "vae": [DIFFUSERS, "AutoencoderKL"],
        "text_encoder": [TRANSFORMERS, "CLIPTextModel"],
        "tokenizer": [TRANSFORMERS, "CLIPTokenizer"],
        "scheduler": [DIFFUSERS, scheduler_config(spec)["_class_name"]],
    }
    if not double:
        absent = {"safety_checker": [None, None], "feature_extractor": [None, None], "image_encoder": [None, None]}
        return {**index, **absent, "requires_safety_checker": False}
    index["text_encoder_2"] = [TRANSFORMERS, "CLIPTextModelWithProjection"]
    index["tokenizer_2"] = [TRANSFORMERS, "CLIPTokenizer"]
    index["force_zeros_for_empty_prompt"] = spec.in_channels == 4
    if spec.in_channels == 8:
        index["is_cosxl_edit"] = spec.scaled_condition
    return index


def scheduler_config(spec: ModelSpec) -> dict[str, Any]:
    """scheduler_config.json; "linspace" is the only spacing that equals the paper's code."""
    prediction = "v_prediction" if spec.prediction == "v" else "epsilon"
    if spec.schedule == "edm":
        return {
            "_class_name": "EDMEulerScheduler",
            "num_train_timesteps": 1000,
            "prediction_type": prediction,
            "sigma_data": 1.0,
            "sigma_max": spec.sigma_max,
            "sigma_min": spec.sigma_min,
            "sigma_schedule": "exponential",
        }
    return {
        "_class_name": "EulerAncestralDiscreteScheduler",
        "beta_end": spec.beta_end,
        "beta_schedule": "scaled_linear",
        "beta_start": spec.beta_start,
        "num_train_timesteps": 1000,
        "prediction_type": prediction,
        "timestep_spacing": "linspace",
    }


def write_tokenizers(folder: Path, family: str, encoders: int) -> None:
    """CLIP's vocabulary and merges beside each text encoder; open_clip's encoders pad with token 0."""
    for suffix in ("", "_2")[:encoders]:
        open_clip = family == "sd2" or bool(suffix)
        target = folder / f"tokenizer{suffix}"
        target.mkdir()
        for name, text in _vocabulary_files().items():
            (target / name).write_text(text, encoding="utf-8")
        tokens = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": "!" if open_clip else END}
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_TOKENS, **tokens}
        write_json(target / "tokenizer_config.json", config)
        write_json(target / "special_tokens_map.json", tokens)


@lru_cache(maxsize=1)
def _vocabulary_files() -> dict[str, str]:
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges())]
    vocabulary = json.dumps(clip_tokenizer().get_vocab(), ensure_ascii=False)
    return {"vocab.json": f"{vocabulary}\n", "merges.txt": "\n".join(lines) + "\n"}


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """A JSON file; parents are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
