"""The calculator: hours are the counts over the rate, and what cannot be is refused."""

import json

import pytest

from benchmarks import cost
from models import flops
from models.config import TokenBridgeConfig, preset
from models.sampler import SamplingOptions
from tests.conftest import ROOT
from tests.runs import call, refused


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
