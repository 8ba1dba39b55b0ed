"""Digests stand in runs, caches and rows of 0.1, so their values are held here as that version computed them."""

from __future__ import annotations

import torch
from torch import nn

from ip2p_engine.files import digest_of_files, digest_of_text, sha256_of
from ip2p_engine.networks.digest import digest_of_network, digest_of_weights, fingerprint
from ip2p_engine.networks.model import Model
from ip2p_engine.photos.recipe import PHOTOS_SPEC


def network() -> nn.Module:
    layers, start = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 150)), 0
    for parameter in layers.parameters():
        values = torch.arange(start, start + parameter.numel(), dtype=torch.float32) / 7
        parameter.data, start = values.reshape(parameter.shape), start + parameter.numel()
    return layers


def test_networks_have_the_digests_of_0_1():
    unet, autoencoder, text = network(), network().half(), network().bfloat16()
    model = Model(spec=PHOTOS_SPEC, unet=unet, autoencoder=autoencoder, text_encoders=(text,))
    assert fingerprint(unet, autoencoder) == "80ba906fa85e268b"
    assert digest_of_network(unet) == "11059cf38e33db1464bb1511ae0bb518"
    assert digest_of_weights(model) == "9a90dd87ecf2dddc35d48f08522bef79"


def test_files_and_texts_have_the_digests_of_0_1(tmp_path):
    (tmp_path / "one").write_bytes(bytes(range(256)) * 600)
    (tmp_path / "two").write_bytes(b"two")
    assert digest_of_files(tmp_path, ["one", "two", "missing"]) == "32b724a8291fae7c437708f8c09d6507"
    assert digest_of_text("12 pairs of a run") == "81cbeca6d92e203183b53e5555dfb4bb"
    assert sha256_of(tmp_path / "two") == "3fc4ccfe745870e2c0d99f71f30ff0656c8dedd41cc1d7d3d376b0dbe685e2f3"
