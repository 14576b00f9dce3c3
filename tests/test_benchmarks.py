"""The benchmark: its plain ways are the fast ones in value; the command measures every work."""

import json
from functools import partial

import pytest
import torch

from benchmarks import plain as ways
from benchmarks import run, works
from benchmarks.plain import SWITCHES, Parts, plain
from benchmarks.run import FAST, PLAIN
from models.config import TokenBridgeConfig, preset
from models.masking import random_orders
from models.quantizer import GaussianQuantizer
from models.sampler import sample_latents
from models.tokenbridge import TokenBridge
from models.tokenizers.kl16 import AutoencoderKL
from tests.conftest import tiny_model
from tests.runs import call, refused
from util.optim import EMA, build_optimizer, guarded_step

CPU = torch.device("cpu")


def loss_and_gradients(model: TokenBridge, inputs: tuple) -> tuple[torch.Tensor, list]:
    loss = model(*inputs)
    parameters = list(model.parameters())
    return loss.detach(), list(torch.autograd.grad(loss, parameters, materialize_grads=True))


@pytest.mark.parametrize("names", [("chunks",), ("head",), ("backbone",), ("head", "backbone")])
def test_plain_training_has_the_loss_and_gradients_of_the_fast_one(names):
    model = tiny_model(decoder_depth=2, channel_depth=2)
    model.head.chunk = 5
    mask = random_orders(2, model.config.seq_len, "cpu") < 11
    inputs = torch.randn(2, *model.config.latent_shape), torch.tensor([0, 2]), mask
    loss, gradients = loss_and_gradients(model, inputs)
    with plain(Parts(model=model), *names):
        other, plain_gradients = loss_and_gradients(model, inputs)
    torch.testing.assert_close(loss, other)
    torch.testing.assert_close(gradients, plain_gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("names", [(), ("sampling",), ("backbone",), ("sampling", "backbone")])
@pytest.mark.parametrize("changes", [{}, dict(head_input="published"), dict(patch_size=2)])
def test_the_published_loop_draws_the_same(names, changes):
    model = tiny_model(decoder_depth=2, **changes)
    labels, options = torch.tensor([0, 1]), dict(num_iter=4, cfg=2.0, seed=3)
    drawn = sample_latents(model, labels, **options)
    with plain(Parts(model=model), *names):
        assert torch.equal(drawn, sample_latents(model, labels, **options))
        assert torch.equal(drawn, ways.sample_latents(model.eval(), labels, **options))


def test_plain_quantizer_finds_the_same_levels():
    quantizer, x = GaussianQuantizer(64), torch.randn(4, 16, 16, 16) * 2
    found, other = quantizer.encode(x), ways.nearest_levels(quantizer, x)
    differ = found != other  # on a border between two levels, rounding decides
    values = quantizer.decode(found), quantizer.decode(other)
    distances = [(value - x.clamp(-5, 5)).abs()[differ] for value in values]
    assert differ.float().mean() < 1e-3
    torch.testing.assert_close(*distances, rtol=0, atol=1e-5)


def test_plain_optimizer_and_average_end_at_the_same_weights():
    found = []
    for names in ((), ("ema", "optimizer")):
        model = tiny_model()
        named = list(model.published_parameters())
        adamw, average = build_optimizer(named, 1e-2, 0.02), EMA(named, 0.9)
        with plain(Parts(optimizer=adamw, ema=average), *names):
            for skipped in (0.0, 1.0, 0.0):
                torch.manual_seed(1)
                for parameter in model.parameters():
                    parameter.grad = torch.randn_like(parameter)
                guarded_step(adamw, torch.tensor(skipped))
                average.update(torch.tensor(skipped))
        assert all(group["fused"] for group in adamw.param_groups)
        found.append([*model.parameters(), *average.averages])
    torch.testing.assert_close(*found)


def test_plain_vae_makes_the_same_images():
    network = AutoencoderKL(embed_dim=4, ch_mult=(1, 2), ch=32, num_res_blocks=1).eval()
    images = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        latents = network.encode(images).mean
        with plain(Parts(), "channels_last"):
            torch.testing.assert_close(network.encode(images).mean, latents, rtol=1e-4, atol=1e-5)


def test_switches_leave_nothing_behind():
    model = tiny_model()
    named = list(model.published_parameters())
    sampler = Parts(sample=sample_latents)
    parts = Parts(model=model, optimizer=build_optimizer(named, 1e-2, 0.02))
    parts.ema, parts.sampler = EMA(named, 0.9), sampler
    changed = {name: switch(parts) for name, switch in SWITCHES.items()}
    before = {name: getattr(owner, key) for name, (owner, key, _) in changed.items()}
    with plain(parts, *SWITCHES):
        for name, (owner, key, _) in changed.items():
            assert getattr(owner, key) != before[name], name
    assert before == {name: getattr(owner, key) for name, (owner, key, _) in changed.items()}
    assert "loss" not in vars(model.head) and "update" not in vars(parts.ema)


def test_variants_run_in_turn_beside_products(monkeypatch):
    order = []
    monkeypatch.setattr(run, "MATRIX", {"cpu": 8})
    clock = iter(range(10**6))
    monkeypatch.setattr(run.time, "perf_counter", lambda: next(clock))  # a second each
    work = works.Work("w", 1, "images", order.append, Parts(), (), (), 8.0)
    rows = run.measure(work, run.Machine(CPU), ("fp32", "bf16"), repeats=3)
    assert [row["variant"] for row in rows] == [FAST, FAST, PLAIN, PLAIN]
    assert order == ["fp32", "bf16"] * 8  # a run of each to warm up, and three in turn
    assert all(row["seconds"] == [1.0] * 3 for row in rows)
    assert all(row["product_rates"] == [2 * 8**3] * 3 for row in rows)
    rows[2]["seconds"] = [1.0, 3.0, 2.0]
    assert run.cells(rows[2], rows)[3:] == ["2 (1 to 3)", "0.5 images", "0%", "", "2.00 x"]


def test_the_whole_command_measures_every_work_with_its_switches(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(works, "AutoencoderKL", partial(AutoencoderKL, ch=32, num_res_blocks=1))
    monkeypatch.setattr(run, "MATRIX", {"cpu": 64})
    monkeypatch.setattr(run, "SHORTEST", 0.0)
    flags = ["--device", "cpu", "--model", "tokenbridge_tiny", "--img_size", "32", "--repeats", "1"]
    path = tmp_path / "tiny.json"
    call(run.main, *flags, "--precision", "fp32", "bf16", "--json", str(path))
    result = json.loads(path.read_text())
    assert {row["work"] for row in result["rows"]} == set(works.WORKS)
    assert all(len(row["seconds"]) == len(row["product_rates"]) == 1 for row in result["rows"])
    shown = {row["variant"] for row in result["rows"]}
    alone = SWITCHES.keys() - {"head", "channels_last"}
    assert shown == {FAST, PLAIN, *(f"{PLAIN}: {name}" for name in alone)}
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(table) == 2 + len(result["rows"]) and result["torch"] == torch.__version__[:6]


def test_wrong_sizes_are_refused(capsys):
    assert "img_size 250" in refused(capsys, run.main, "--device", "cpu", "--img_size", "250")


def test_masks_of_a_benchmark_are_the_mean_of_training():
    config = TokenBridgeConfig(**preset("tokenbridge_tiny"))
    settings = works.Settings(config, 2, 8, CPU)
    assert settings.masked == 222 and settings.random_mask().sum(dim=1).tolist() == [222, 222]
