"""Hugging Face ids: the right files of a repository, through the real client against a local cache."""

from __future__ import annotations

import shutil

import huggingface_hub
import pytest

from ip2p_engine.checkpoint.export import save_diffusers, save_ldm
from ip2p_engine.checkpoint.folder import choose_files
from ip2p_engine.errors import CheckpointError
from ip2p_engine.model import load_model

PIPELINE = [
    "README.md",
    "model_index.json",
    "instruct-pix2pix-00-22000.ckpt",
    "instruct-pix2pix-00-22000.safetensors",
    "safety_checker/model.safetensors",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "text_encoder/pytorch_model.bin",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.bin",
]


def weights_of(names):
    return [name for name in names if not name.endswith(".json")]


def test_one_set_of_weights_a_network_is_chosen():
    assert weights_of(choose_files(PIPELINE)) == [
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.bin",
    ]
    assert "unet/diffusion_pytorch_model.non_ema.safetensors" in choose_files(PIPELINE, weights="raw")
    settings = {"model_index.json", "scheduler/scheduler_config.json", "unet/config.json"}
    assert settings <= set(choose_files(PIPELINE))


def test_a_variant_alone_is_taken():
    names = ["unet/config.json", "unet/diffusion_pytorch_model.fp16.safetensors"]
    assert weights_of(choose_files(names)) == names[1:]


def test_all_shards_are_chosen():
    shards = [f"unet/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = "unet/diffusion_pytorch_model.safetensors.index.json"
    assert choose_files([*shards, index]) == sorted([*shards, index])


@pytest.fixture
def hub(monkeypatch, sd1, tmp_path):
    """A hub whose one repository is a local folder."""
    repository = save_diffusers(sd1, tmp_path / "repository")
    save_ldm(sd1, repository / "edit.safetensors")
    asked = []

    def files(_, repo_id):
        return [p.relative_to(repository).as_posix() for p in repository.rglob("*") if p.is_file()]

    def snapshot(repo_id, allow_patterns):
        target = tmp_path / "cache" / repo_id
        for name in allow_patterns:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(repository / name, target / name)
        asked.append((repo_id, tuple(allow_patterns)))
        return str(target)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", files)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo_id, file: str(repository / file))
    return asked


def test_a_repository(hub, sd1, same_model):
    same_model(load_model("owner/instruct-pix2pix"), sd1)
    ((repository, names),) = hub
    assert repository == "owner/instruct-pix2pix"
    assert not any(name.startswith(("tokenizer", "edit")) and not name.endswith(".json") for name in names)


def test_one_file_of_a_repository(hub, sd1, same_model):
    same_model(load_model("hf://owner/name/edit.safetensors"), sd1)
    assert hub == []


def test_a_repository_that_cannot_be_reached(monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", unreachable)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(CheckpointError, match="the hub does not give it .no route.; check the spelling"):
        load_model("owner/name")


def test_offline_the_cache_is_enough(monkeypatch, sd1, same_model, tmp_path):
    """The real client on a real cache layout, without a network."""
    cache = tmp_path / "models--owner--name"
    save_diffusers(sd1, cache / "snapshots" / "0123456789012345678901234567890123456789")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0123456789012345678901234567890123456789")
    real = huggingface_hub.snapshot_download

    def unreachable(*_, **__):
        raise ConnectionError("no route")

    def cached(repository, **options):
        return real(repository, cache_dir=tmp_path, **options)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", unreachable)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached)
    same_model(load_model("owner/name"), sd1)
