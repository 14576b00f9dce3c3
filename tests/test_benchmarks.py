"""The benchmark measures every work, each in turn, beside products."""

import json
from functools import partial
from unittest import mock

import torch

from benchmarks import gpu, run, works
from models.config import TokenBridgeConfig, preset
from models.tokenizers.kl16 import AutoencoderKL
from tests.runs import call, refused

CPU = torch.device("cpu")
CHECKS = ["golden", "fp32", "waits", "error of"]
KIT = [*CHECKS, "plain", "grad_", "head_", "nothing", "cfg", "token_"]


def test_precisions_run_in_turn_beside_products(monkeypatch):
    order = []
    monkeypatch.setattr(run, "MATRIX", {"cpu": 8})
    clock = iter(range(10**6))
    monkeypatch.setattr(run.time, "perf_counter", lambda: next(clock))  # a second each
    work = works.Work("w", 1, "images", order.append, 8.0)
    rows = run.measure(work, run.Machine(CPU), ("fp32", "bf16"), repeats=3)
    assert order == ["fp32", "bf16"] * 4  # a run of each to warm up, and three in turn
    assert all(row["seconds"] == [1.0] * 3 for row in rows)
    assert all(row["product_rates"] == [2 * 8**3] * 3 for row in rows)
    rows[1]["seconds"] = [1.0, 3.0, 2.0]
    assert run.cells(rows[1])[2:] == ["2 (1 to 3)", "0.5 images", "0%", ""]


def test_the_whole_command_measures_every_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(works, "AutoencoderKL", partial(AutoencoderKL, ch=32, num_res_blocks=1))
    monkeypatch.setattr(run, "MATRIX", {"cpu": 64})
    monkeypatch.setattr(run, "SHORTEST", 0.0)
    flags = ["--device", "cpu", "--model", "tokenbridge_tiny", "--img_size", "32", "--repeats", "1"]
    path = tmp_path / "tiny.json"
    call(run.main, *flags, "--precision", "fp32", "bf16", "--json", str(path))
    result = json.loads(path.read_text())
    assert {row["work"] for row in result["rows"]} == set(works.WORKS)
    assert all(len(row["seconds"]) == len(row["product_rates"]) == 1 for row in result["rows"])
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(table) == 2 + len(result["rows"]) and result["torch"] == torch.__version__[:6]


def test_the_kit_measures_everything_once_and_names_what_fails(tmp_path, monkeypatch, capsys):
    """All but the compiled rows, which a compiler takes minutes for."""
    vae = partial(AutoencoderKL, ch=32, num_res_blocks=1)
    monkeypatch.setattr(works, "AutoencoderKL", vae)
    path, groups = tmp_path / "kit.json", [*KIT, "profile", "parts"]
    flags = ["--small", "--device", "cpu", "--json", str(path), "--only"]
    call(gpu.main, *flags, *groups, "--minutes", "1e-9")
    assert "0 rows, 23 left" in capsys.readouterr().out
    features = mock.patch.dict(works.WORKS, features=lambda settings: 1 / 0)
    with features:
        call(gpu.main, *flags, *groups)
    rows = {(row["group"], row["name"]): row for row in json.loads(path.read_text())["rows"]}
    checks = [row for (group, _), row in rows.items() if group == "correctness"]
    assert len(rows) == 23 and len(checks) == 7 and all(row["holds"] for row in checks)
    assert all(len(rows["profile", kind]["kernels"]) == 10 for kind in ("train", "sample"))
    assert rows["parts", "features"]["failed"] == "ZeroDivisionError: division by zero"
    assert "does not hold: features" in capsys.readouterr().out
    table = path.with_suffix(".md").read_text()
    assert "replaced by nothing" in table and "token_cache 4" in table and "| yes |" in table
    monkeypatch.setattr(gpu, "attempt", None)  # nothing is measured again
    call(gpu.main, *flags, *groups)


def test_masks_are_the_mean_of_training_and_wrong_sizes_refused(capsys):
    config = TokenBridgeConfig(**preset("tokenbridge_tiny"))
    assert works.Settings(config, 2, 8, CPU).masked == 222
    assert "img_size 250" in refused(capsys, run.main, "--device", "cpu", "--img_size", "250")
