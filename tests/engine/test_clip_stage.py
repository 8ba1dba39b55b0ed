"""The second stage of the embedded CLIP: what a caption means, and a shorter text tower that is the same one."""

from __future__ import annotations

import pytest
import torch

from ip2p_engine.scenes.grammar import captions_of, scenes_of
from ip2p_engine.scenes.recipe.clip_stage import _meant_scenes, _text_tower, make_clip, with_text_tower
from ip2p_engine.scenes.recipe.tables import caption_rows

LENGTH = 12


@pytest.fixture(scope="module")
def tokens():
    """Texts that end at different places, the largest id being the end."""
    rows = torch.zeros(3, 77, dtype=torch.int64)
    for row, end in zip(rows, (3, 7, LENGTH - 1), strict=True):
        row[:end] = torch.arange(1, end + 1)
        row[end] = 63
    return rows


@pytest.fixture
def network():
    torch.manual_seed(0)
    return make_clip(64).eval()


@pytest.mark.slow
def test_a_caption_without_a_place_means_every_place():
    captions, rows = caption_rows()
    meant = _meant_scenes(rows, len(captions))
    scenes = scenes_of(held_out=False)
    for scene in (0, 4321):
        open_place, *placed = [meant[row][meant[row] >= 0].tolist() for row in rows[scene]]
        assert placed == [[scene], [scene]]
        text = captions_of(scenes[scene])[0]
        assert scene in open_place
        assert all(captions_of(scenes[n])[0] == text for n in open_place)
        assert len(open_place) == sum(captions_of(other)[0] == text for other in scenes)


def test_a_shorter_text_tower_reads_the_same(network, tokens):
    with torch.inference_mode():
        whole = network.encode_text(tokens)
        short = _text_tower(network, LENGTH).encode_text(tokens[:, :LENGTH])
    assert torch.allclose(short, whole, atol=1e-5)


def test_the_text_tower_goes_back_into_the_whole(network, tokens):
    before = {name: value.clone() for name, value in network.state_dict().items()}
    tower = _text_tower(network, LENGTH)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(0.01)
    merged = with_text_tower(before, tower.state_dict())
    whole = make_clip(64).eval()
    whole.load_state_dict(merged)
    assert torch.equal(merged["positional_embedding"][LENGTH:], before["positional_embedding"][LENGTH:])
    assert torch.equal(merged["visual.proj"], before["visual.proj"])
    with torch.inference_mode():
        assert torch.allclose(whole.encode_text(tokens), tower.encode_text(tokens[:, :LENGTH]), atol=1e-5)
