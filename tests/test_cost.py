"""The calculator: totals are the counts, bounds change where they should, the page is not old."""

import json
from dataclasses import fields, replace

import pytest

from benchmarks import cost as calculator
from benchmarks import cost_page
from benchmarks.cost import make_parser
from benchmarks.estimate import BOUNDS, Setup, cost, peak, rates_of
from benchmarks.roofline import Rates, Roofline, Seconds
from benchmarks.run import FORMAT
from models.config import TokenBridgeConfig, preset
from models.tokenizers.kl16 import KL16
from tests.conftest import ROOT
from tests.runs import call, refused
from util import flops
from util.page import END, begin

LARGE = TokenBridgeConfig(**preset("tokenbridge_large"))
PLAIN = Rates(matrix=1e12, convolution=1e12, memory=1e12)
SMALL = Setup(model="tokenbridge_tiny", num_iter=8)


def whole(parts: dict[str, Seconds]) -> Seconds:
    return sum(parts.values(), Seconds())


@pytest.mark.parametrize("grad_checkpointing", [False, True])
@pytest.mark.parametrize("masked", [None, 200])
def test_arithmetic_of_a_step_is_the_count(masked, grad_checkpointing):
    found = whole(Roofline(LARGE, "bf16", PLAIN, KL16).micro_batch(3, grad_checkpointing, masked))
    expected = 3 * flops.training_step(LARGE, masked, grad_checkpointing).total
    assert found.matrix * PLAIN.matrix == pytest.approx(expected)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("num_iter", [1, 8, 300])
def test_arithmetic_of_sampling_is_the_count(num_iter, guided):
    found = whole(Roofline(LARGE, "bf16", PLAIN, KL16).sampling(2, num_iter, guided))
    expected = 2 * flops.sampling(LARGE, num_iter, guided).total
    expected += 2 * flops.vae_decode(KL16, LARGE.img_size)
    assert found.matrix * PLAIN.matrix == pytest.approx(expected)


def test_totals_follow_from_parts_and_counts():
    found = cost(SMALL)
    trained, sampled = found["training"], found["sampling"]
    step, batch = (sum(part["total"] for part in x["parts"].values()) for x in (trained, sampled))
    steps = 400 * (1_281_167 // 2048)
    assert trained["steps"] == steps and trained["hours"] == pytest.approx(steps * step / 3600)
    assert trained["device_hours"] == 8 * trained["hours"]
    assert sampled["hours"] == pytest.approx(25 * batch / 3600)  # 196 batches, 8 at once
    work = flops.training_step(SMALL.config)
    assert trained["flops_per_image"] == work.total
    assert trained["shares"]["head"] == work.head.total / work.total
    floor = steps * 2048 * work.total / 989.4e12 / 3600
    assert trained["floor_device_hours"] == pytest.approx(floor)
    assert trained["share_of_peak"] == pytest.approx(floor / trained["device_hours"])
    for part in (*trained["parts"].values(), *sampled["parts"].values()):
        assert part["total"] == pytest.approx(sum(part[kind] for kind in BOUNDS))


@pytest.mark.parametrize("nodes", [1, 2])
def test_twice_the_nodes_halve_the_time_of_the_arithmetic(nodes):
    few, many = (cost(replace(SMALL, nodes=n))["training"] for n in (nodes, 2 * nodes))
    for part in ("backbone", "head"):
        halved = {kind: 2 * many["parts"][part][kind] for kind in BOUNDS}
        assert halved == pytest.approx({kind: few["parts"][part][kind] for kind in BOUNDS})
    assert many["floor_device_hours"] == few["floor_device_hours"]
    assert many["device_hours"] >= few["device_hours"]  # every device makes every update


def test_nothing_is_faster_than_the_peak():
    for changes in cost_page.VARIANTS.values():
        found = cost(replace(Setup(), **changes | {"num_iter": 8}))
        for work in ("training", "sampling"):
            assert found[work]["floor_device_hours"] < found[work]["device_hours"]
            assert 0 < found[work]["share_of_peak"] < 1


@pytest.mark.parametrize(
    ("changes", "work", "bound"),
    [
        ({"fusion": 0.5}, "training", "matrix arithmetic"),
        ({"matrix_share": 1.0}, "training", "memory bandwidth"),
        ({"nodes": 4, "network": 1.0}, "training", "gradient exchange"),
        ({"num_iter": 8}, "sampling", "matrix arithmetic"),
        ({"num_iter": 8, "eval_bsz": 1}, "sampling", "launch latency"),
        ({"num_iter": 8, "memory_share": 0.1}, "sampling", "memory bandwidth"),
    ],
)
def test_what_bounds_changes_where_it_should(changes, work, bound):
    assert cost(Setup(**changes))[work]["bound"] == bound


def test_the_heads_short_steps_wait_for_launches_until_there_are_many_positions():
    """One row a weight is read for costs the reading of the weights; many are arithmetic."""
    launching = Roofline(LARGE, "bf16", replace(PLAIN, matrix=1e15, launch=5e-6), KL16)
    assert launching.head(1).bound == "launch"
    assert launching.head(4096).launch == 0
    reading = Roofline(LARGE, "bf16", replace(PLAIN, matrix=1e15), KL16)
    assert reading.head(1).bound == "memory"
    assert reading.head(1).memory == pytest.approx(reading.head(8).memory, rel=0.2)
    assert Roofline(LARGE, "bf16", PLAIN, KL16).head(4096).bound == "matrix"


def test_gradients_are_summed_behind_the_backward_pass():
    """A ring sends 2 (n - 1) / n of 4 bytes a parameter over the slowest link."""
    roofline = Roofline(LARGE, "bf16", replace(PLAIN, link=1e11, network=1e10), KL16)
    assert roofline.exchange(1, 1, Seconds()).total == 0
    for devices, nodes, rate in ((8, 1, 1e11), (8, 2, 1e10), (1, 2, 1e10)):
        n = devices * nodes
        taken = 2 * (n - 1) / n * 4 * roofline.parameters.total / rate
        assert roofline.exchange(devices, nodes, Seconds()).exchange == pytest.approx(taken)
        hidden = roofline.exchange(devices, nodes, Seconds(matrix=0.75 * taken))
        assert hidden.exchange == pytest.approx(taken / 2)
        assert roofline.exchange(devices, nodes, Seconds(matrix=2 * taken)).total == 0


def test_a_vae_of_diffusers_decides_stride_and_channels(tmp_path, capsys):
    vae = dict(_class_name="AutoencoderKL", block_out_channels=[32, 64, 64, 64], latent_channels=4)
    vae |= dict(layers_per_block=2, norm_num_groups=32)
    vae |= dict(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4
    )
    (tmp_path / "config.json").write_text(json.dumps(vae))
    (tmp_path / "diffusion_pytorch_model.safetensors").touch()  # only the settings are read
    found = cost(replace(SMALL, vae_path=tmp_path))
    assert (found["setup"]["vae_stride"], found["setup"]["vae_embed_dim"]) == (8, 4)
    config = replace(SMALL, vae_stride=8, vae_embed_dim=4).config
    assert found["training"]["flops_per_image"] == flops.training_step(config).total
    decode = found["sampling"]["parts"]["VAE"]["total"] * found["rates"]["convolution"]["value"]
    assert decode == pytest.approx(SMALL.eval_bsz * flops.vae_decode(vae, 256))
    flags = ("--model", "tokenbridge_tiny", "--num_iter", "8", "--vae_path", str(tmp_path))
    call(calculator.main, *flags)
    assert "256 px, 6 bits, 4 channels" in capsys.readouterr().out
    vae["down_block_types"][0] = "AttnDownEncoderBlock2D"
    (tmp_path / "config.json").write_text(json.dumps(vae))
    assert "AttnDownEncoderBlock2D" in refused(capsys, calculator.main, *flags)


def test_larger_problems_take_smaller_batches():
    large, wide = (cost(replace(SMALL, model=m, img_size=s))["training"] for m, s in SIZES)
    assert large["batch_size"] == 64 > wide["batch_size"]
    assert wide["bytes_per_device"] < 0.9 * 80e9


SIZES = (("tokenbridge_large", 256), ("tokenbridge_huge", 512))


def save_rates(path, gpu: str | None, precision: str = "bf16"):
    row = {"matrix_rates": {precision: [6e14, 5e14, 7e14]}}
    machine = {"gpu": gpu} if gpu else {}
    path.write_text(
        json.dumps({"format": FORMAT, "machine": machine, "rows": [row], "copy_rates": [2e12]})
    )
    return path


def test_measured_rates_take_the_place_of_the_data_sheets(tmp_path):
    path = save_rates(tmp_path / "h100.json", "NVIDIA H100 80GB HBM3")
    rates, origins = rates_of(replace(SMALL, rates=path))
    assert (rates.matrix, rates.memory) == (6e14, 2e12)
    assert origins["matrix"] == "measured: 1 of h100.json's 600 TFLOP/s"
    assert origins["link"].startswith("assumed")
    _, origins = rates_of(SMALL)
    assert all(text.startswith("assumed") for text in origins.values())
    assert peak(SMALL) == 989.4e12


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--nodes", "8", "--batch_size", "64"], "cannot be shared by 64 devices"),
        (["--batch_size", "96"], "cannot be shared by 8 devices in micro-batches of 96"),
        (["--batch_size", "256"], "lower --batch_size"),
        (["--hardware", "V100"], "has no bf16"),
        (["--matrix_share", "1.5"], "1.5 is more than 1"),
        (["--img_size", "250"], "250"),
        (
            ["--vae_stride", "12", "--img_size", "240"],
            "error: --vae_stride 12 is not a power of two",
        ),
        (["--vae_path", "/"], "error: --vae_path /"),
        (["--num_iter", "100000000"], "is more than"),
        (["--images", "9" * 400], "is more than"),
        (["--cfg", "9" * 400], "is not a number"),
        (["--vae_path", "nowhere"], "--vae_path nowhere"),
        (["--images", "10"], "do not make one step"),
        (["--rates", "nowhere.json"], "--rates nowhere.json"),
        (["--table", "--page", "nowhere.md"], "nowhere.md"),
    ],
)
def test_wrong_calls_are_refused_in_one_line(capsys, flags, line):
    assert line in refused(capsys, calculator.main, *flags)


def test_rates_of_another_device_are_refused(capsys, tmp_path):
    for gpu, said in (("NVIDIA H200", "NVIDIA H200"), (None, "a machine without a GPU")):
        path = save_rates(tmp_path / "rates.json", gpu)
        assert said in refused(capsys, calculator.main, "--rates", str(path))
    path = save_rates(tmp_path / "rates.json", "NVIDIA H100 80GB HBM3", "fp32")
    assert "no product" in refused(capsys, calculator.main, "--rates", str(path))


def test_every_setting_has_a_flag_and_its_default():
    args = make_parser().parse([])
    assert Setup(**{field.name: getattr(args, field.name) for field in fields(Setup)}) == Setup()


def test_the_command_prints_the_figures(capsys):
    flags = ("--model", "tokenbridge_tiny", "--num_iter", "8")
    call(calculator.main, *flags, "--json")
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(json.dumps(cost(SMALL)))
    call(calculator.main, *flags)
    text = capsys.readouterr().out
    assert f"{calculator.figure(found['training']['device_hours'])} GPU-hours" in text
    assert "assumed: 0.6 of the data sheet's 989 TFLOP/s" in text


def test_the_page_is_what_the_command_writes():
    text = (ROOT / "docs" / "performance.md").read_text()
    shown = text.split(begin(cost_page.MARK))[1].split(END)[0]
    assert shown.strip() == "\n".join(cost_page.page_lines()).strip(), (
        "run python -m benchmarks.cost --table"
    )
