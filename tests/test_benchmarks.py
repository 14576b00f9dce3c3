"""The benchmark: its plain ways are the fast ones in value, its file and page hang together."""

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import engine_tokenbridge
from benchmarks import loaders, pipelines, render, run, variants, works
from benchmarks.kept import kept_for_backward
from benchmarks.machine import Machine
from benchmarks.plain import SWITCHES, Parts, plain
from benchmarks.tables import share, times
from benchmarks.targets import PUBLISHED_RATES, comparisons
from benchmarks.work import FAST, PLAIN, Settings, Timing, Variant, Work, measure
from models import sampler
from models.heads import channel as channel_head
from models.masking import Mask, random_orders
from models.quantizer import GaussianQuantizer
from models.sampler import sample_latents
from models.tokenbridge import TokenBridge
from models.tokenizers import kl16 as vae
from models.tokenizers.kl16 import AutoencoderKL
from tests.conftest import ROOT, tiny_model
from tests.runs import call
from util.ema import EMA
from util.optim import build_optimizer
from util.page import END, begin

CPU = torch.device("cpu")


def batch(model: TokenBridge) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    latents = torch.randn(2, *model.config.latent_shape)
    mask = random_orders(2, model.config.seq_len, "cpu") < 11
    return latents, torch.tensor([0, 2]), mask


def loss_and_gradients(model: TokenBridge, inputs: tuple) -> tuple[torch.Tensor, list]:
    loss = model(*inputs)
    parameters = list(model.parameters())
    return loss.detach(), list(torch.autograd.grad(loss, parameters, materialize_grads=True))


@pytest.mark.parametrize(
    "names", [*((n,) for n in ("chunks", "modulations", "head", "backbone")), ("head", "backbone")]
)
def test_plain_training_has_the_loss_and_gradients_of_the_fast_one(names):
    model = tiny_model(decoder_depth=2, channel_depth=2)
    model.head.chunk = 5
    inputs = batch(model)
    loss, gradients = loss_and_gradients(model, inputs)
    with plain(Parts(model), *names):
        other, plain_gradients = loss_and_gradients(model, inputs)
    torch.testing.assert_close(loss, other)
    torch.testing.assert_close(gradients, plain_gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["sampling", "guidance", "backbone"])
@pytest.mark.parametrize("head_input", ["trained", "published"])
def test_plain_sampling_draws_the_same(name, head_input):
    model = tiny_model(decoder_depth=2)
    flags = dict(num_iter=4, cfg=2.0, seed=3, head_input=head_input)
    found = sample_latents(model, torch.tensor([0, 1]), **flags)
    with plain(Parts(model), name):
        assert torch.equal(found, sample_latents(model, torch.tensor([0, 1]), **flags))


def test_compiled_blocks_come_and_go(monkeypatch):
    compiled = []

    def compile_model(model: TokenBridge, device: torch.device) -> None:
        compiled.append(model)
        model.compile_blocks(backend="eager")

    monkeypatch.setattr(variants, "compile_model", compile_model)
    model = tiny_model()
    blocks = [*model.backbone.encoder_blocks, *model.head.channel_blocks]
    around = variants.Compiled(model, CPU)
    for _ in range(2):
        with around():
            assert all(block._compiled_call_impl is not None for block in blocks)
        assert all(block._compiled_call_impl is None for block in model.modules())
    assert compiled == [model]


def test_plain_quantizer_finds_the_same_levels():
    quantizer = GaussianQuantizer(64)
    x = torch.randn(4, 16, 16, 16) * 2
    found = quantizer.encode(x)
    with plain(Parts(works.WithQuantizer(quantizer)), "quantizer"):
        other = quantizer.encode(x)
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
                engine_tokenbridge.guarded_step(adamw, torch.tensor(skipped))
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
    parts = Parts(model, build_optimizer(named, 1e-2, 0.02), EMA(named, 0.9))
    owners = [model.quantizer, model.head, model.backbone, parts.ema]
    owners += [engine_tokenbridge, channel_head, sampler, vae]
    before = [dict(vars(owner)) for owner in owners]
    with plain(parts, *SWITCHES):
        assert [dict(vars(owner)) for owner in owners] != before
    assert [dict(vars(owner)) for owner in owners] == before


def test_kept_bytes_are_those_of_the_tensors_that_backward_reads():
    x, weight = torch.randn(8, 4), nn.Parameter(torch.randn(4, 4))

    def forward() -> torch.Tensor:
        return F.linear(x, weight).exp().square().sum()

    found = kept_for_backward(forward, [weight])
    # x for the weight's gradient, exp's result for exp and once more for square: two storages.
    assert found.hooks == 2 * 8 * 4 * 4
    assert found.alive == 8 * 4 * 4 + 4  # exp's result and the loss; x was there before


def test_kept_bytes_of_a_recomputed_block_are_its_input():
    x, weight = torch.randn(8, 4), nn.Parameter(torch.randn(4, 4))

    def block(y: torch.Tensor) -> torch.Tensor:
        for _ in range(5):
            y = F.linear(y, weight).exp().neg().exp()
        return y

    def forward(recompute: bool) -> torch.Tensor:
        y = F.linear(x, weight)
        return (checkpoint(block, y, use_reentrant=False) if recompute else block(y)).sum()

    kept, recomputed = (kept_for_backward(lambda r=r: forward(r), [weight]) for r in (False, True))
    assert recomputed.alive == 8 * 4 * 4 + 4 < kept.alive  # y, which no hook sees, and the loss


def fake_row(work: str, variant: str, precision: str, seconds: list[float], rate: float) -> dict:
    rates = {"fp32": [rate] * len(seconds), "bf16": [4 * rate] * len(seconds)}
    row = {"work": work, "title": work, "variant": variant, "precision": precision}
    row |= {"seconds": seconds, "matrix_rates": rates, "items": 2, "unit": "images"}
    return row | {"flops": 10.0 * rate, "memory_before": 2**20, "memory_peak": 2**21}


def test_speed_is_compared_in_units_of_the_matrix_product():
    rate = PUBLISHED_RATES["fp32"]
    slow, fast = (
        fake_row("train", *a)
        for a in ((PLAIN, "fp32", [20.0], 2 * rate), (FAST, "fp32", [10.0, 10.0, 30.0], rate))
    )
    assert times(slow, fast) == 4.0  # twice the seconds at twice the machine's rate
    assert share(fast) == 1.0 and share(fast | {"precision": "bf16"}) == 0.25
    (found,) = comparisons([slow, fast])
    assert found.speedup == pytest.approx(2.72) and found.plain_speedup == 4.0
    assert found.seconds == 10.0 and found.published == 27.2 and found.target == 1.7
    (half,) = comparisons([fake_row("train", FAST, "bf16", [10.0], rate)])
    assert half.speedup == pytest.approx(2.72)
    assert half.own_rate == pytest.approx(2.72 * 624 / (4 * 181))
    assert comparisons([slow]) == []


def test_variants_run_in_turn_until_their_time_is_up():
    order = []
    machine = Machine(CPU, matrix=8)
    shown = [
        Variant(name, "fp32", lambda n=name, s=seconds: order.append(n) or s)
        for name, seconds in (("short", 1.0), ("long", 9.0))
    ]
    work = Work("w", "w", 1, "images", shown)
    rows = list(measure(work, machine, repeats=3, limit=60.0))
    assert order == ["short", "long"] * 4  # a run of each to warm up; nothing reached the limit
    assert [row["seconds"] for row in rows] == [[1.0] * 3, [9.0] * 3]
    assert [len(row["matrix_rates"]["bf16"]) for row in rows] == [3, 3]
    timing = Timing(replace(shown[0], run=lambda: None), machine)
    timing.warm_up()
    assert timing.calls > 1 and timing.seconds == []  # it was over too soon to be timed once


def test_both_caches_hold_the_same_posteriors_of_the_published_size(tmp_path):
    npy, npz = (loaders.make_cache(tmp_path / form, form, 6) for form in ("npy", "npz"))
    assert npy.latent_shape == npz.latent_shape == (16, 16, 16)
    for key in ((0, False), (5, True)):
        assert npy[key][0].dtype == torch.float16 and npz[key][0].dtype == torch.float32
        assert torch.equal(npy[key][0], npz[key][0].half())


TINY = dict(head_tokens=4, quantized=(2, 4, 4), cached=2, evaluated=2)
TINY |= dict(read=64, photos=8)


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> Path:
    """The file of the whole command at the smallest sizes."""
    path = tmp_path_factory.mktemp("bench") / "tiny.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(run.SIZES, "cpu", run.SIZES["cpu"] | TINY)
        patch.setattr(loaders, "BATCHES", 2)
        patch.setattr(loaders, "WARM_UP", 1)
        for module in (works, pipelines):
            patch.setattr(module, "AutoencoderKL", partial(AutoencoderKL, ch=32, num_res_blocks=1))
        patch.setattr("benchmarks.machine.MATRIX", {"cpu": 64})
        patch.setattr("benchmarks.machine.COPY_BYTES", 2**16)
        patch.setattr("benchmarks.work.SHORTEST", 0.0)
        flags = ["--device", "cpu", "--model", "tokenbridge_tiny", "--img_size", "32"]
        call(run.main, *flags, "--repeats", "1", "--json", str(path))
    return path


def test_the_whole_command_measures_every_work_with_its_switches(result):
    found = json.loads(result.read_text())
    assert {row["work"] for row in found["rows"]} == set(run.WORKS)
    for row in found["rows"]:
        assert len(row["seconds"]) == 1 and row["seconds"][0] > 0
        assert all(len(rates) == 1 and rates[0] > 0 for rates in row["matrix_rates"].values())
    seen = {row["variant"] for row in found["rows"]}
    assert {FAST, PLAIN} < seen
    assert {SWITCHES[n].text for n in ("chunks", "modulations", "sampling", "guidance")} < seen
    train = {r["precision"] for r in found["rows"] if (r["work"], r["variant"]) == ("train", FAST)}
    assert train == {"fp32", "bf16"}
    assert torch.__version__.startswith(found["versions"]["torch"])
    assert found["machine"]["cores"] >= 1
    kept = {(row["variant"], row["precision"]): row for row in found["kept"]}
    fast, slow = kept[FAST, "fp32"], kept[PLAIN, "fp32"]
    assert fast["hooks"][0] < slow["hooks"][0] and slow["alive"][1] < slow["alive"][0]


def test_a_table_and_a_figure_are_made_of_the_file(result, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{begin(render.MARK)}\n{END}\nafter\n")
    figure = tmp_path / "figure.png"
    call(render.main, *map(str, ("--results", result, "--page", page, "--figure", figure)))
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    assert len(re.findall(r"^\| training step", text, flags=re.MULTILINE)) == 8
    assert "faster than by a distance to each level" in text and "not measured" in text
    assert "published code" not in text  # whose sizes these are not
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_the_pages_figures_are_those_of_the_committed_files():
    text = (ROOT / "docs" / "performance.md").read_text()
    shown = text.split(begin(render.MARK))[1].split(END)[0]
    names = re.findall(r"^`benchmarks/results/(.+?)`", shown, flags=re.MULTILINE)
    results = {name: render.read(run.RESULTS / name) for name in names}
    assert names and shown.strip() == "\n".join(render.page_lines(results)).strip()


def test_a_file_of_something_else_is_refused(tmp_path, capsys):
    other = tmp_path / "other.json"
    other.write_text("[]")
    with pytest.raises(ValueError, match="other.json: not a file of this version"):
        render.read(other)


def test_masks_of_a_benchmark_have_the_ratio_asked_for():
    settings = Settings("tokenbridge_tiny", "tokenbridge_tiny", 2, 256, CPU, ("fp32",), 0.85)
    assert settings.masked == 218
    with works.fixed_mask(settings):
        model = works.build_model(settings)
        mask: Mask = model._mask(torch.zeros(2, *model.config.latent_shape), None)
    assert mask.masked.shape == (2, 218)
