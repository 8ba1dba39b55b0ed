"""Hugging Face ids: the right files of a repository, through the real client against a local cache."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import fsspec
import huggingface_hub
import pytest
import torch

from ip2p_engine import cli
from ip2p_engine.checkpoint import source
from ip2p_engine.checkpoint.download import fetched
from ip2p_engine.checkpoint.published import PUBLISHED, published
from ip2p_engine.checkpoint.recognise import choose_files
from ip2p_engine.checkpoint.report import report_card
from ip2p_engine.errors import CheckpointError
from ip2p_engine.networks.model import load_model

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
def repository(tmp_path):
    """The folder that stands for a repository."""
    (tmp_path / "repository").mkdir()
    return tmp_path / "repository"


@pytest.fixture
def hub(monkeypatch, repository, tmp_path):
    """A hub whose one repository is a local folder."""
    asked = []

    def info(_, repo_id, timeout):
        names = [p.relative_to(repository).as_posix() for p in repository.rglob("*") if p.is_file()]
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])

    def snapshot(repo_id, allow_patterns):
        target = tmp_path / "cache" / repo_id
        for name in allow_patterns:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(repository / name, target / name)
        asked.append((repo_id, tuple(allow_patterns)))
        return str(target)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo_id, file: str(repository / file))
    return asked


def test_a_pipeline(hub, repository, sd1, sd1_folder, sd1_file, same_model):
    shutil.copytree(sd1_folder, repository, dirs_exist_ok=True)
    shutil.copy(sd1_file, repository / "edit.safetensors")
    same_model(load_model("owner/instruct-pix2pix"), sd1)
    ((asked, names),) = hub
    assert asked == "owner/instruct-pix2pix"
    assert not any(name.startswith(("tokenizer", "edit")) and not name.endswith(".json") for name in names)


def test_one_file_of_a_repository(hub, repository, sd1_file):
    shutil.copy(sd1_file, repository / "edit.safetensors")
    assert report_card("hf://owner/name/edit.safetensors").base == "SD1.5"
    assert hub == []


def test_a_repository_of_one_file_needs_no_name(hub, repository, sd1_file):
    """As MagicBrush and many more are published."""
    (repository / "README.md").touch()
    shutil.copy(sd1_file, repository / "edit.safetensors")
    assert report_card("owner/name").base == "SD1.5"
    shutil.copy(sd1_file, repository / "later.safetensors")
    with pytest.raises(CheckpointError, match="no pipeline and the files edit.*; name one, e.g. hf://owner/name/edit"):
        report_card("owner/name")


def test_a_repository_without_weights(hub, repository):
    (repository / "README.md").touch()
    with pytest.raises(CheckpointError, match="owner/name has no pipeline and no weights; give another"):
        report_card("owner/name")


class Unreachable(Exception):
    """Neither OSError nor the hub's own: what httpx raises."""


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """The real client on a cache folder of its own, without a network."""

    def unreachable(*_, **__):
        raise Unreachable("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))


def snapshot_folder(tmp_path, name="owner/name"):
    cache, revision = tmp_path / f"models--{name.replace('/', '--')}", "0123456789012345678901234567890123456789"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text(revision)
    (cache / "snapshots").mkdir()
    return cache / "snapshots" / revision


@pytest.mark.parametrize("source", ["owner/name", "hf://owner/name/edit.ckpt"])
def test_a_repository_that_cannot_be_reached(source, offline):
    with pytest.raises(CheckpointError, match="owner/name is no local path and the hub .*; check the spelling"):
        report_card(source)


def test_offline_a_cached_pipeline_is_enough(offline, sd1, sd1_folder, same_model, tmp_path):
    shutil.copytree(sd1_folder, snapshot_folder(tmp_path))
    same_model(load_model("owner/name"), sd1)


def test_offline_a_cached_file_is_enough(offline, sd1_file, tmp_path):
    folder = snapshot_folder(tmp_path)
    folder.mkdir()
    shutil.copy(sd1_file, folder)
    assert report_card("owner/name").base == "SD1.5"


def test_published_checkpoints_go_by_name(monkeypatch, tmp_path, capsys):
    asked = []
    monkeypatch.setattr(
        source, "_download", lambda repository, file, weights: asked.append((repository, file)) or tmp_path
    )
    assert cli.main(["fetch", "Instruct-Pix2Pix"]) == 0 and capsys.readouterr().out.strip() == str(tmp_path)
    for name in ("stabilityai/cosxl", "InstructPix2Pix-MagicBrush", "hive-magicbrush"):
        assert cli.main(["fetch", name]) == 0
    assert asked == [
        ("timbrooks/instruct-pix2pix", ""),
        ("stabilityai/cosxl", "cosxl_edit.safetensors"),
        ("osunlp/InstructPix2Pix-MagicBrush", "MagicBrush-epoch-52-step-4999.ckpt"),
        ("osunlp/HIVE-MagicBrush", "MagicBrush-epoch-000130.ckpt"),
    ]
    source.local_copy("instruct-pix2pix", "ema")  # what --checkpoint NAME opens
    assert asked[-1] == asked[0]
    capsys.readouterr()
    assert cli.main(["fetch"]) == 0
    table = capsys.readouterr().out
    assert all(f"{one.name}  ({one.page})" in table and one.licence in table for one in PUBLISHED)
    assert cli.main(["fetch", "nonesuch"]) == 2
    assert "choose one of instruct-pix2pix, magicbrush" in capsys.readouterr().err
    assert published("a.safetensors") is None and published("") is None

    def refuse(*_):
        raise CheckpointError("the hub does not give it")

    monkeypatch.setattr(source, "_download", refuse)
    assert cli.main(["fetch", "cosxl"]) == 2
    assert "has to be accepted at https://huggingface.co/stabilityai/cosxl" in capsys.readouterr().err


def test_every_name_is_one_checkpoint():
    names = [one.name for one in PUBLISHED]
    assert len(set(names)) == len(names)
    for one in PUBLISHED:
        assert published(one.name) is one and bool(one.repository) != bool(one.addresses)
    assert published("osunlp/HIVE-MagicBrush") is published("hive-magicbrush")


@pytest.fixture
def pieces(sd1, ldm_tensors, tmp_path, monkeypatch):
    """A checkpoint of the authors' in three pieces in storage, under HIVE's name; its bytes."""
    monkeypatch.setenv("IP2P_CACHE", str(tmp_path / "cache"))
    torch.save({"state_dict": ldm_tensors(sd1)}, tmp_path / "whole.ckpt")
    whole = (tmp_path / "whole.ckpt").read_bytes()
    storage = fsspec.filesystem("memory")
    third = len(whole) // 3
    for number, part in enumerate((whole[:third], whole[third : 2 * third], whole[2 * third :])):
        storage.pipe(f"/hive_a{number}", part)
    addresses = tuple(f"memory://hive_a{number}" for number in range(3))
    hive = replace(published("hive-rw-condition"), addresses=addresses)
    table = tuple(hive if one.name == hive.name else one for one in PUBLISHED)
    monkeypatch.setattr("ip2p_engine.checkpoint.published.PUBLISHED", table)
    yield whole
    storage.rm("/", recursive=True)


def test_a_checkpoint_in_pieces_is_put_together_and_asks_for_its_suffix(pieces, same_model, sd1, tmp_path, monkeypatch):
    assert cli.main(["fetch", "hive-rw-condition"]) == 0
    file = tmp_path / "cache" / "checkpoints" / "hive-rw-condition.ckpt"
    assert file.read_bytes() == pieces
    fsspec.filesystem("memory").rm("/", recursive=True)  # nothing is fetched twice
    model = load_model("hive-rw-condition", text_heads=4)
    same_model(model, sd1)
    assert model.spec.suffix == ", image quality is five out of five"
    assert load_model(file, text_heads=4).spec.suffix == ""


def test_hives_files_on_sd2_know_their_prediction_and_size(make_model, ldm_tensors, tmp_path, monkeypatch):
    monkeypatch.setenv("IP2P_CACHE", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    model = make_model("sd2")
    torch.save({"state_dict": ldm_tensors(model)}, tmp_path / "checkpoints" / "hive-v2-rw-condition.ckpt")
    spec = load_model("hive-v2-rw-condition", text_heads=4).spec
    assert (spec.family, spec.prediction, spec.resolution) == ("sd2", "eps", 512)
    assert spec.suffix == ", image quality is five out of five"
    plain = load_model(tmp_path / "checkpoints" / "hive-v2-rw-condition.ckpt", text_heads=4).spec
    assert (plain.resolution, plain.suffix) == (768, "")


@pytest.mark.parametrize("broken_at", [0.0, 0.2, 0.5, 0.99])
def test_a_fetch_that_broke_off_goes_on(pieces, broken_at, tmp_path):
    part = tmp_path / "cache" / "checkpoints" / "hive-rw-condition.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(pieces[: int(broken_at * len(pieces))])
    read = []
    storage = fsspec.filesystem("memory")
    with pytest.MonkeyPatch.context() as patched:
        opened = storage.open
        patched.setattr(storage, "open", lambda path, *args, **how: read.append(path) or opened(path, *args, **how))
        assert cli.main(["fetch", "hive-rw-condition"]) == 0
    assert part.with_suffix(".ckpt").read_bytes() == pieces and not part.exists()
    assert len(read) == 3 - int(broken_at * 3)


def test_what_is_left_of_a_longer_file_is_not_gone_on_with(pieces, tmp_path):
    part = tmp_path / "cache" / "checkpoints" / "hive-rw-condition.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * (len(pieces) + 1))
    assert cli.main(["fetch", "hive-rw-condition"]) == 0
    assert part.with_suffix(".ckpt").read_bytes() == pieces


def test_an_address_that_does_not_answer(pieces, capsys):
    fsspec.filesystem("memory").rm("/hive_a1")
    assert cli.main(["fetch", "hive-rw-condition"]) == 2
    assert "https://github.com/salesforce/HIVE cannot be read" in capsys.readouterr().err


def test_a_fetched_pipeline_is_whole_or_not_here(offline, sd1_folder, tmp_path):
    known = published("instruct-pix2pix")
    assert fetched(known) is None
    folder = shutil.copytree(sd1_folder, snapshot_folder(tmp_path, "timbrooks/instruct-pix2pix"))
    assert fetched(known) == Path(folder)
    next(Path(folder, "vae").glob("*.safetensors")).unlink()
    assert fetched(known) is None
