"""The benchmark measures every work, each in turn, beside products."""

import json
from functools import partial
from unittest import mock

import pytest
import torch

from benchmarks import run, works
from models.config import TokenBridgeConfig, preset
from models.tokenizers.kl16 import AutoencoderKL
from tests.runs import call, refused

CPU = torch.device("cpu")


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
    rows[1] |= {"group": "parts", "name": "w"}
    assert run.cells(rows[1])[3:] == ["2 (1 to 3)", "0.5 images", "0%", ""]
    config = TokenBridgeConfig(**preset("tokenbridge_tiny"))
    assert works.Settings(config, 2, 8, CPU).masked == 222  # the mean of training


def test_every_row_is_measured_once_and_what_fails_is_named(tmp_path, monkeypatch, capsys):
    """All but those that a compiler takes minutes for, or that other tests have, too."""
    others = {name: run.CHECKS[name] for name in run.CHECKS if "golden" not in name}
    monkeypatch.setattr(run, "CHECKS", others)
    monkeypatch.setattr(works, "AutoencoderKL", partial(AutoencoderKL, ch=32, num_res_blocks=1))
    monkeypatch.setattr(run, "MATRIX", {"cpu": 64})
    monkeypatch.setattr(run, "SHORTEST", 0.0)
    monkeypatch.setattr(run, "PROFILED", 1)
    path = tmp_path / "cpu.json"
    flags = ["--device", "cpu", "--models", "tokenbridge_tiny", "--img_size", "32", "--json"]
    flags += [str(path), "--num_iter", "2", "4", "--repeats", "1"]
    with pytest.raises(SystemExit, match="0"):
        call(run.main, *flags, "--minutes", "1e-9")
    assert "0 rows, 19 left" in capsys.readouterr().out
    failing = mock.patch.dict(works.WORKS, features=lambda settings: 1 / 0)
    with failing, pytest.raises(SystemExit, match="1"):
        call(run.main, *flags)
    record = json.loads(path.read_text())
    rows = {(row["group"], row["name"]): row for row in record["rows"]}
    checks = [row for (group, _), row in rows.items() if group == "correctness"]
    assert len(rows) == 19 and len(checks) == 2 and all(row["holds"] for row in checks)
    assert all(len(rows["profile", kind]["kernels"]) == 10 for kind in ("train", "sample"))
    assert rows["parts", "features"]["failed"] == "ZeroDivisionError: division by zero"
    timed = [row for row in record["rows"] if "seconds" in row]
    assert all(len(row["seconds"]) == len(row["product_rates"]) == 1 for row in timed)
    assert record["torch"] == torch.__version__[:6]
    assert "does not hold: features" in capsys.readouterr().out
    table = path.with_suffix(".md").read_text()
    assert "replaced by nothing" in table and "token_cache 4" in table and "| yes |" in table
    monkeypatch.setattr(run, "attempt", lambda row: [{"failed": "OutOfMemoryError: 1 GiB"}])
    for again in (True, False):  # what failed is tried again, and no row else
        with pytest.raises(SystemExit, match="1"):
            call(run.main, *flags)
        assert ("| parts | features | OutOf" in capsys.readouterr().out) == again
    with pytest.raises(SystemExit, match="1"):
        call(run.main, *flags, "--repeats", "2", "--only", "features")
    assert "it is" in capsys.readouterr().out
    before = json.loads(path.with_suffix(".before.json").read_text())
    assert len(before["rows"]) == len(record["rows"])
    assert "--only absent" in refused(capsys, run.main, *flags, "--only", "absent")
    assert "img_size 250" in refused(capsys, run.main, "--device", "cpu", "--img_size", "250")
