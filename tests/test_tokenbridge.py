"""The whole model against the golden data, and its invariants."""

import re

import pytest
import torch
from torch import Tensor, nn

from benchmarks import correctness
from models.backbone import patchify
from models.config import TokenBridgeConfig, preset
from models.layers import take
from models.sampler import sample_latents
from models.tokenbridge import TokenBridge
from models.tokenizers import detok, vq
from models.tokenizers.kl16 import AutoencoderKL
from tests.conftest import golden_json, tiny_model


def test_every_stage_and_twelve_training_steps_match_golden():
    assert correctness.stages(torch.device("cpu")) < 1e-5
    assert correctness.training(torch.device("cpu")) < 1e-5


def test_load_published_names_what_does_not_match():
    for change, said in (
        ({"z_proj.gain": torch.zeros(1)}, "unexpected .first: z_proj.gain"),
        ({"z_proj.weight": torch.zeros(1, 2)}, "z_proj.weight is .1, 2."),
        ({"reconstruction_values": torch.zeros(8)}, "differs .* 'reconstruction_values'"),
        ({"reconstruction_values": torch.zeros(6, 8)}, "reconstruction_values is .6, 8."),
    ):
        model = tiny_model()
        with pytest.raises(ValueError, match=said):
            model.load_published(model.published_state_dict() | change)
    with pytest.raises(ValueError, match="101 missing .first: channel_blocks"):
        model.load_published({})


def test_z_ignores_what_is_under_the_mask_and_which_other_positions_are_computed():
    model = tiny_model()
    masked, visible = torch.rand(2, 16).argsort(dim=1).split([10, 6], dim=1)
    values = torch.randn(2, 16, 6)
    classes = model.backbone.class_embedding(torch.tensor([0, 1]), 2)
    z = model.backbone(values, classes, visible, masked)
    changed = values.scatter(1, masked[..., None].expand(-1, -1, 6), 9.0)
    assert torch.equal(z, model.backbone(changed, classes, visible, masked))
    seen = values.scatter(1, visible[..., None].expand(-1, -1, 6), 9.0)
    assert not torch.equal(z, model.backbone(seen, classes, visible, masked))
    whole = model.backbone(values, classes, visible, torch.arange(16).expand(2, -1))
    assert torch.allclose(z, take(whole, masked), atol=1e-6)


def test_grad_checkpointing_recomputes_every_block():
    """And changes no bit of a training with dropout: test_main_tokenbridge.py."""
    for recompute in (False, True):
        model, calls = tiny_model(grad_checkpointing=recompute).train(), []
        parts = (model.backbone.encoder_blocks, model.backbone.decoder_blocks)
        blocks = [block for part in (*parts, model.head.channel_blocks) for block in part]
        for block in blocks:
            block.register_forward_pre_hook(lambda block, _, calls=calls: calls.append(block))
        model(torch.randn(2, 6, 4, 4), torch.tensor([0, 2])).backward()
        assert [calls.count(block) for block in blocks] == [1 + recompute] * len(blocks)


def test_label_dropout_replaces_the_class_and_the_initialisation_is_the_published_one():
    model = tiny_model(label_drop_prob=1.0).train()
    dropped = model.backbone.class_embedding(torch.tensor([0, 1]), 2)
    assert torch.equal(dropped, model.backbone.fake_latent.expand(2, -1))
    kept = model.eval().backbone.class_embedding(torch.tensor([0, 1]), 2)
    assert torch.equal(kept, model.backbone.class_emb.weight[:2])
    model = TokenBridge(**golden_json("config")["config"])
    state = model.published_state_dict()
    assert all(not state[n].any() for n in state if "adaLN" in n)
    zero_biases = [n for n in state if n.endswith(".bias") and "norm" not in n]
    assert all(not state[n].any() for n in zero_biases)
    assert state["class_emb.weight"].std() == pytest.approx(0.02, rel=0.1)
    assert state["decoder_pos_embed_learned"].std() == pytest.approx(0.02, rel=0.1)
    assert state["token_embeddings.0.weight"].std() == pytest.approx(1.0, rel=0.1)
    weight = state["encoder_blocks.0.mlp.fc1.weight"]
    assert weight.abs().max() <= (6 / sum(weight.shape)) ** 0.5
    assert weight.std() == pytest.approx((2 / sum(weight.shape)) ** 0.5, rel=0.05)


def test_settings_that_do_not_fit_are_refused_by_value():
    wrong = dict(img_size=250, encoder_num_heads=3, channel_order=(0, 0), quant_min=6.0)
    wrong |= dict(head_input="other", label_drop_prob=1.5, quant_levels=1024)
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=re.escape(str(value))):
            TokenBridge(**preset("tokenbridge_tiny") | {name: value})
    config = TokenBridgeConfig(**preset("tokenbridge_tiny"), channel_order=tuple(range(16)))
    assert TokenBridgeConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="unknown"):
        TokenBridgeConfig.from_dict({"wings": 2})
    with pytest.raises(ValueError, match="expected"):
        tiny_model()(torch.randn(1, 6, 8, 8), torch.tensor([0]))


def test_losses_of_the_channels_are_the_cross_entropies_and_have_the_loss_as_their_mean():
    """Of each of the p*p scalars of a channel; without patches: test_heads.py."""
    model = tiny_model(patch_size=2)
    latents, labels = torch.randn(2, 6, 4, 4), torch.tensor([0, 2])
    mask = torch.ones(2, model.config.seq_len)
    losses = model.channel_losses(latents, labels, mask)
    torch.testing.assert_close(losses.mean(), model(latents, labels, mask))
    logits = model.logits(latents, labels, mask).log_softmax(-1)  # [M, C*p*p, K]
    indices = patchify(model.quantizer.encode(latents), 2).flatten(0, 1)
    torch.testing.assert_close(losses, -logits.gather(-1, indices[..., None])[..., 0].mean(dim=0))
    assert model.head.order[:4].tolist() == [12, 13, 14, 15]  # all of channel 3, which comes first


def test_calibrated_levels_are_the_file_s_or_were_set_before():
    """They travel with the weights: test_hub.py."""
    model = tiny_model(quantizer="calibrated")
    values = torch.randn(6, 8).sort(dim=1).values  # other levels for each channel
    inner = (values[:, 1:] + values[:, :-1]) / 2
    model.quantizer.set_levels(torch.cat([inner[:, :1] - 9, inner, inner[:, -1:] + 9], 1), values)
    state = model.published_state_dict()
    assert list(state) == list(tiny_model().published_state_dict())  # the layout's names and order
    samples = sample_latents(model, torch.tensor([0, 1]), num_iter=2)
    for channel in range(6):
        assert torch.isin(samples[:, channel], model.quantizer.reconstruction_values[channel]).all()
    parameters = {name: p.detach() for name, p in model.published_parameters()}
    with pytest.raises(ValueError, match="holds no levels"):
        tiny_model(quantizer="calibrated").load_published(parameters)
    parameters["z_proj.bias"] = parameters["z_proj.bias"] + 1
    model.load_published(parameters)
    assert torch.equal(model.backbone.z_proj.bias, parameters["z_proj.bias"])
    state["boundaries"] = state["boundaries"] + 1
    with pytest.raises(ValueError, match="differs from this one in 'boundaries'"):
        model.load_published(state)


# --- names, shapes, count and order, which numbers an optimizer's state, of the published files

FILES = ("state_dict_layouts", "mar_layouts", "tokenizer_layouts")
LAYOUTS = {name: layout for file in FILES for name, layout in golden_json(file).items()}


def built(name: str, tensors: dict[str, Tensor]) -> nn.Module:
    """The published model, or a tokenizer with the settings that its tensors tell."""
    if name == "kl16":
        return AutoencoderKL()
    if name.startswith("vq"):
        return vq.VQModel(**vq.VQModel.settings_of(tensors))
    if name.startswith("detok"):
        return detok.DeTok(**detok.DeTok.settings_of(tensors))
    return TokenBridge(**preset(name))


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_and_count_are_the_published_ones(name):
    layout = LAYOUTS[name]
    shapes = layout["shapes"] if "shapes" in layout else layout["tensors"]
    with torch.device("meta"):
        model = built(name, {n: torch.empty(shape) for n, shape in shapes.items()})
    state = getattr(model, "published_state_dict", model.state_dict)()
    assert {n: list(t.shape) for n, t in state.items()} == shapes
    assert list(state) == list(shapes) or name.startswith("detok")  # which is never trained
    assert sum(p.numel() for p in model.parameters()) == layout["parameters"]
    if "buffers" in layout:
        named = getattr(model, "published_parameters", model.named_parameters)()
        assert sorted(set(state) - {n for n, _ in named}) == layout["buffers"]
    if name == "vq16":
        assert model.config == vq.VQ16 and (model.channels, model.stride) == (8, 16)
    elif name == "kl16":
        assert model.stride == 16 and model.is_kl16
