"""The figures of docs/method.md show what models/ computes, as the committed script draws it."""

import numpy as np
import pytest
import torch
from PIL import Image

from models.quantizer import GaussianQuantizer
from tests.conftest import ROOT, golden, tiny_model
from tests.runs import call
from tools import figures


@pytest.mark.parametrize("bits", figures.BITS)
def test_levels_and_edges_are_where_encode_changes(bits):
    levels, edges = figures.levels_and_edges(bits)
    quantizer = GaussianQuantizer(2**bits, -5.0, 5.0)
    assert quantizer.encode(torch.tensor(levels)).tolist() == list(range(2**bits))
    before, after = (quantizer.encode(torch.tensor(edges) + shift) for shift in (-1e-3, 1e-3))
    assert before.tolist() == list(range(2**bits - 1))
    assert after.tolist() == list(range(1, 2**bits))


def test_drawn_dots_are_the_published_levels_and_the_head_s_channels_in_its_order():
    dots = [line.get_xdata() for line in figures.quantizer_figure().axes[1].lines]
    assert [len(x) for x in dots] == [2**bits for bits in figures.BITS]
    published = (golden("quantizer")["b6_-5_5_reconstruction_values"] + 3) / 6 * 10 - 5
    assert np.allclose(dots[-1], published, atol=1e-5)

    order = tiny_model(vae_embed_dim=16, channel_order=None).head.order.tolist()
    words = [text.get_text() for text in figures.head_figure().axes[0].texts]
    predicted = [int(word.split("\n")[1]) for word in words if word.startswith("channel\n")]
    read = [int(word.split("\n")[1]) for word in words if word.startswith("level of\n")]
    assert predicted == order[:5] + order[-2:] and read == order[:4] + order[-3:-1]


def test_committed_pictures_are_what_the_script_draws(tmp_path):
    call(figures.main, "--output", str(tmp_path))
    for name in figures.FIGURES:
        committed, drawn = (
            np.asarray(Image.open(folder / name).convert("RGB"), dtype=float)
            for folder in (ROOT / "docs" / "images", tmp_path)
        )
        assert committed.shape == drawn.shape
        assert np.abs(committed - drawn).mean() < 2  # of 255; fonts differ by a little
        assert (committed[0, 0] == 255).all(), "white behind it, also on a dark page"
