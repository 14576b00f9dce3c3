"""Operations are those of torch's counter on the modules; hours the counts over the rate."""

import json
import math
from collections import Counter

import pytest
import torch

from benchmarks import cost
from benchmarks.works import vae_operations
from models import flops
from models.config import TokenBridgeConfig, preset
from models.flops import count
from models.sampler import SamplingOptions, sample_latents
from models.tokenbridge import TokenBridge
from models.tokenizers.kl16 import KL16, AutoencoderKL
from tests.conftest import ROOT, tiny_model
from tests.runs import call, refused

VARIANTS = {
    "patches": dict(img_size=32, vae_embed_dim=2, patch_size=2, channel_order=(1, 0)),
    "other sizes": {
        **dict(decoder_embed_dim=24, channel_embed_dim=8, encoder_depth=2, mlp_ratio=3.0),
        **dict(decoder_depth=3, channel_depth=1, quant_levels=16, buffer_size=5, img_size=24),
    },
}


@pytest.fixture(params=VARIANTS)
def model(request) -> TokenBridge:
    return tiny_model(**VARIANTS[request.param])


def test_backbone_head_and_sampling(model):
    config, batch, masked, predicted = model.config, 2, 11, 5
    values = torch.randn(batch, config.seq_len, config.token_dim)
    classes = model.backbone.class_embedding(torch.zeros(batch, dtype=torch.long), batch)
    orders = torch.rand(batch, config.seq_len).argsort(dim=1)
    inputs = values, classes, orders[:, masked:], orders[:, :predicted]
    found = count(lambda: model.backbone(*inputs))
    assert found == batch * flops.backbone(config, config.seq_len - masked, predicted)
    z = torch.randn(masked, config.decoder_embed_dim)
    uniforms = torch.rand(masked, config.token_dim)
    found = count(lambda: model.head.sample(z, uniforms))
    assert found == masked * flops.head(config, sampled=True)
    labels = torch.tensor([0, 1])
    for num_iter, cfg in ((1, 1.0), (40, 2.0)):  # and over iterations without positions
        found = count(lambda n=num_iter, w=cfg: sample_latents(model, labels, num_iter=n, cfg=w))
        assert found == 2 * flops.sampling(config, SamplingOptions(num_iter, cfg))


@pytest.mark.parametrize("head_chunk", [0, 7])
def test_training_step(model, head_chunk):
    config = dict(model.config.to_dict(), attn_dropout=0.0)  # a CPU then attends a second time
    model = TokenBridge(**config, head_chunk=head_chunk)
    batch, length = 3, model.config.seq_len
    mask = (torch.arange(length) < 12).expand(batch, -1)
    latents, labels = torch.randn(batch, *model.config.latent_shape), torch.zeros(batch).long()
    found = count(lambda: model(latents, labels, mask).backward())
    assert found == batch * flops.training_step(model.config, 12)


def test_vae_without_memory_is_counted_as_a_real_one():
    vae = KL16 | {"ch": 32}
    model, expected = AutoencoderKL(**vae).eval(), vae_operations(32, **vae)
    with torch.no_grad():
        latents = model.encode(torch.randn(2, 3, 32, 32)).mean
        assert count(lambda: model.decode(latents)) == 2 * expected["decode"]
        assert count(lambda: model.encode(torch.randn(2, 3, 32, 32))) == 2 * expected["encode"]


def test_mean_step_is_the_mean_over_the_draws_of_the_mask():
    config, draws = tiny_model().config, 20_000
    length, ratios = config.seq_len, config.mask_ratios
    counts = ratios.counts(length)
    drawn = Counter(math.ceil(length * ratios.draw()) for _ in range(draws))
    assert set(drawn) == {m for m, _ in counts} and sum(p for _, p in counts) == pytest.approx(1)
    for m, p in counts:
        assert drawn[m] / draws == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / draws))
    mean = sum(p * flops.training_step(config, m) for m, p in counts)
    assert flops.training_step(config) == pytest.approx(mean)
    large = TokenBridgeConfig(**preset("tokenbridge_large"))
    state = torch.get_rng_state()
    assert flops.training_step(large) == pytest.approx(2183265669243.0432, rel=1e-12)
    whole, half = (SamplingOptions(256, 3.1, cfg_interval=(low, 1)) for low in (0, 0.5))
    assert flops.sampling(large, whole) == 107508182024192
    assert 0.5 < flops.sampling(large, half) / 107508182024192 < 1
    assert torch.equal(torch.get_rng_state(), state)  # which counting leaves as it is


# --- the calculator of hours


def figures(capsys, *flags: str) -> dict:
    call(cost.main, *flags)
    return json.loads(capsys.readouterr().out)


def test_hours_are_the_operations_over_a_share_of_the_peak(capsys):
    large = TokenBridgeConfig(**preset("tokenbridge_large"))
    found = figures(capsys, "--share", "0.5")
    rate = 0.5 * 989.4e12 * 3600
    step, sample = flops.training_step(large), flops.sampling(large, SamplingOptions(256, 3.1))
    assert found["training_device_hours"] == pytest.approx(400 * 1_281_167 * step / rate)
    assert found["sampling_device_hours"] == pytest.approx(50_000 * sample / rate)
    assert found["training_hours"] == found["training_device_hours"] / 8
    more = figures(capsys, "--share", "0.5", "--cfg", "1", "--epochs", "4")
    assert more["training_device_hours"] == pytest.approx(found["training_device_hours"] / 100)
    assert more["sampling_device_hours"] < 0.6 * found["sampling_device_hours"]
    assert "img_size 250 is not a multiple" in refused(capsys, cost.main, "--img_size", "250")


def test_the_page_says_what_the_command_does(capsys):
    page = (ROOT / "docs" / "performance.md").read_text()
    for model, epochs in (("tokenbridge_large", 400), ("tokenbridge_huge", 800)):
        found = figures(capsys, "--model", model)
        assert found["epochs"] == epochs
        training, sampling = found["training_device_hours"], found["sampling_device_hours"]
        row = f"| `{model}`, {epochs} epochs | {training:,.0f} | {training / 8 / 24:.1f} "
        assert f"{row}| {sampling:.1f} |" in page
