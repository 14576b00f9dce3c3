"""MAR's diffusion head against the golden data: net, process, loss, gradients, sampling."""

import numpy as np
import pytest
import torch

from models.heads.diffusion import respaced_betas, respaced_timesteps
from models.masking import mask_schedule, split_mask
from models.sampler import sample_latents
from models.tokenbridge import TokenBridge
from tests.conftest import formula_weight, golden, golden_json, relative_error

SETTINGS, DATA = golden_json("mar_config"), golden("mar")


@pytest.fixture(scope="module")
def model() -> TokenBridge:
    model = TokenBridge(head="diffusion", **SETTINGS["config"])
    named = model.published_parameters()
    model.load_published({name: formula_weight(name, tuple(p.shape)) for name, p in named})
    return model.eval()


@torch.no_grad()
def test_encoder_and_conditions_match_golden(model):
    visible, _ = split_mask(DATA["mask"])
    tokens = DATA["latents"].flatten(2).mT
    classes = model.backbone.class_embedding(DATA["labels"], len(tokens))
    encoded = model.backbone.encode(tokens, classes, visible)
    assert relative_error(encoded, DATA["encoder_out"]) < 1e-5
    everywhere = torch.arange(tokens.shape[1]).expand(len(tokens), -1)
    assert relative_error(model.backbone.decode(encoded, visible, everywhere), DATA["z"]) < 1e-5


def test_process_matches_golden():
    betas = respaced_betas(np.arange(1000))
    assert relative_error(torch.from_numpy(betas), DATA["betas"]) < 1e-12
    assert relative_error(torch.from_numpy(1 - betas).cumprod(0), DATA["alphas_cumprod"]) < 1e-12
    for name in DATA:
        if name.startswith("respaced_timesteps_"):
            steps = int(name.rpartition("_")[2])
            timesteps = respaced_timesteps(steps)
            assert timesteps.tolist() == DATA[name].tolist()
            found, expected = respaced_betas(timesteps), DATA[f"respaced_betas_{steps}"]
            assert relative_error(torch.from_numpy(found), expected) < 1e-10


@torch.no_grad()
def test_net_and_each_part_of_the_loss_match_golden(model):
    out = model.head.net(*(DATA[f"net_{name}"] for name in "xtz"))
    assert relative_error(out, DATA["net_out"]) < 1e-5
    z, targets = DATA["z"].flatten(0, 1), DATA["latents"].flatten(2).mT.flatten(0, 1)
    t, noise = DATA["loss_t"].flatten(1).T, DATA["loss_noise"].flatten(1, 2).transpose(0, 1)
    parts = [
        x.mean(dim=-1).T.reshape(DATA["loss_t"].shape)
        for x in model.head.parts(z, targets, t, noise)
    ]
    for name, part in zip(("mse", "vb"), parts, strict=True):
        assert relative_error(part, DATA[f"{name}_each"]) < 1e-4, name
    assert relative_error(sum(parts), DATA["loss_each"]) < 1e-4


@pytest.mark.parametrize("chunk", [0, 7, None])
def test_loss_and_gradients_match_golden(model, monkeypatch, chunk):
    """The masked mean, with the given timesteps and noise."""
    z, targets = model.conditions(DATA["latents"], DATA["labels"], DATA["mask"])
    masked = DATA["mask"].bool()
    assert relative_error(z.detach(), DATA["z"][masked]) < 1e-5
    given = (DATA["loss_t"][:, masked].T, DATA["loss_noise"][:, masked].transpose(0, 1))
    monkeypatch.setattr(model.head, "noise", lambda _: given)
    monkeypatch.setattr(model.head, "chunk", chunk)
    model.zero_grad()
    loss = model.head.loss(z, targets)
    loss.backward()
    assert loss.item() == pytest.approx(DATA["loss"].item(), rel=1e-5)
    for name, parameter in model.published_parameters():
        expected = DATA[f"gradnorm:{name}"].item()
        found = 0.0 if parameter.grad is None else parameter.grad.norm().item()
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-7), name


def uniforms_of(noise: torch.Tensor) -> torch.Tensor:
    """What the head draws such noise from."""
    return torch.special.ndtr(noise.double())


@pytest.mark.parametrize(("number", "run"), [*enumerate(SETTINGS["head_runs"])])
def test_head_samples_match_golden(model, number, run):
    z, start, steps, out = (DATA[f"head{number}_{n}"] for n in ("z", "start", "steps", "out"))
    count, how = len(start), {}
    if run["cfg"] != 1:
        z, how = torch.stack(z.chunk(2), dim=1), {"guidance": run["cfg"]}
    noise = torch.cat([start[None], steps[:, :count]]).transpose(0, 1).flatten(1)
    found, _ = model.head.sample(z, uniforms_of(noise), run["temperature"], **how)
    assert relative_error(found, out[:count]) < 1e-4


@pytest.mark.parametrize(("number", "run"), [*enumerate(SETTINGS["sampling_runs"])])
def test_whole_sampling_runs_match_golden(model, number, run):
    orders, length = DATA["orders"], model.config.seq_len
    noise = torch.zeros(*orders.shape, model.head.draws)
    for i, (before, after, _) in enumerate(mask_schedule(length, run["num_iter"])):
        positions = orders[:, after:before].sort(dim=1).values  # row by row, ascending
        start, steps = (DATA[f"sample{number}_it{i}_{name}"] for name in ("start", "steps"))
        of_each = torch.cat([start[None], steps[:, : len(start)]]).transpose(0, 1).flatten(1)
        of_each = of_each.view(*positions.shape, -1)
        noise.scatter_(1, positions[..., None].expand_as(of_each), of_each)
    how = {"orders": orders, "uniforms": uniforms_of(noise)}
    found = sample_latents(model, DATA["labels"], **how, **run)
    assert relative_error(found, DATA[f"sample{number}_latents"]) < 1e-4
