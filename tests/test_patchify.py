"""Tokens are row-major, and channel-major inside a token."""

import pytest
import torch

from models.backbone import patchify, unpatchify


def test_token_holds_its_patch_channel_by_channel():
    latents = torch.arange(2 * 3 * 4 * 4).reshape(2, 3, 4, 4)
    tokens = patchify(latents, 2)
    assert tokens.shape == (2, 4, 12)
    for row in range(2):
        for column in range(2):
            patch = latents[1, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            assert torch.equal(tokens[1, 2 * row + column], patch.flatten())


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_unpatchify_is_the_inverse(patch_size):
    latents = torch.randn(2, 5, 8, 8)
    tokens = patchify(latents, patch_size)
    assert torch.equal(unpatchify(tokens, patch_size, 8 // patch_size), latents)
