"""Checkpoints in shared storage: the right files, once for each version, whole or not at all."""

from __future__ import annotations

import io

import fsspec
import pytest

from ip2p_engine.checkpoint.source import CACHE_VARIABLE
from ip2p_engine.errors import CheckpointError
from ip2p_engine.files import public_name
from ip2p_engine.networks.model import load_model


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """A storage in memory, and an empty cache."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    storage = fsspec.filesystem("memory")
    storage.rm("/", recursive=True)
    yield storage
    storage.rm("/", recursive=True)


def copies(tmp_path):
    return [path for path in (tmp_path / "cache" / "checkpoints").iterdir() if path.suffix != ".lock"]


def test_a_file_is_copied_once_and_again_when_it_has_changed(bucket, sd1, sd1_file, same_model, tmp_path, monkeypatch):
    bucket.put_file(str(sd1_file), "/models/edit.safetensors")
    same_model(load_model("memory://models/edit.safetensors"), sd1)
    with monkeypatch.context() as patched:
        patched.setattr(bucket, "open", None)
        same_model(load_model("memory://models/edit.safetensors"), sd1)
    assert len(copies(tmp_path)) == 1
    bucket.put_file(str(sd1_file), "/models/edit.safetensors")
    load_model("memory://models/edit.safetensors")
    assert len(copies(tmp_path)) == 2


def test_of_a_folder_what_loading_needs(bucket, sd1, sd1_folder, same_model, tmp_path):
    bucket.put(str(sd1_folder), "/edit", recursive=True)
    bucket.pipe("/edit/unet/diffusion_pytorch_model.non_ema.safetensors", b"not asked for")
    bucket.pipe("/edit/samples/1.png", b"nor this")
    same_model(load_model("memory://edit"), sd1)
    names = {path.name for path in copies(tmp_path)[0].rglob("*")}
    assert "model_index.json" in names
    assert not names & {"diffusion_pytorch_model.non_ema.safetensors", "1.png"}


def test_a_copy_that_breaks_off_leaves_nothing(bucket, sd1_file, tmp_path, monkeypatch):
    bucket.put_file(str(sd1_file), "/edit.safetensors")

    class Lost(io.BytesIO):
        def read(self, size=-1):
            if data := super().read(min(size, 100)):
                return data
            raise ConnectionError("connection lost")

    with monkeypatch.context() as patched:
        patched.setattr(bucket, "open", lambda *_, **__: Lost(bytes(1000)))
        with pytest.raises(CheckpointError, match=r"edit.safetensors cannot be read \(connection lost\); check the"):
            load_model("memory://edit.safetensors")
    assert copies(tmp_path) == []
    load_model("memory://edit.safetensors")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://nowhere.safetensors", "nowhere.safetensors is not there or holds no checkpoint"),
        ("nonsense://bucket/x.safetensors", "Protocol not known"),
        ("memory://text.ckpt", "text.ckpt"),
    ],
)
def test_an_address_without_a_checkpoint_is_one_sentence(bucket, url, message):
    bucket.pipe("/text.ckpt", b"no checkpoint")
    with pytest.raises(CheckpointError, match=message):
        load_model(url)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("s3://bucket/edit.safetensors", "s3://bucket/edit.safetensors"),
        ("https://me:secret@host:8/a/b.ckpt?signature=secret#top", "https://host:8/a/b.ckpt"),
        ("models/what?.ckpt", "models/what?.ckpt"),
        ("hf://owner/name", "hf://owner/name"),
    ],
)
def test_what_files_say_of_an_address_holds_no_secret(source, name):
    assert public_name(source) == name
