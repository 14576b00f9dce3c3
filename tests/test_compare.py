"""The comparison of heads: killed and started again it goes on; the page is its results' page."""

import importlib
import json
import shutil
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from PIL import Image

from demo import compare, compare_page
from main_tokenbridge import make_parser
from models.config import preset
from tests.conftest import ROOT
from tests.runs import call, kill_when, start_fork
from util.errors import UserError
from util.evaluation.folder import read_json
from util.files import only_job_in

QUICK = compare.DATA["digits"]._replace(**compare.QUICK)
RESULTS = ROOT / "benchmarks" / "results" / "heads.json"


def run_here(words: list[str], **_) -> subprocess.CompletedProcess:
    """In the place of subprocess.run, without the seconds in which torch is imported."""
    words = words[2:] if words[1] == "-m" else [words[1].removesuffix(".py"), *words[2:]]
    call(importlib.import_module(words[0]).main, *words[1:])
    return subprocess.CompletedProcess(words, 0)


def wait_for_the_end_of_the_job_in(folder: Path) -> None:
    """A zombie holds its lock for as long as one of its other threads is still ending."""
    for _ in range(400):
        with suppress(UserError), only_job_in(folder, "--output_dir"):
            return
        time.sleep(0.05)
    raise AssertionError(f"the job in {folder} goes on")


def test_a_killed_comparison_goes_on_with_the_stage_it_was_in(tmp_path, monkeypatch, capsys):
    """What is killed, and the training that dies with it, are processes; all else is done here."""
    monkeypatch.chdir(ROOT)
    here = SimpleNamespace(run=run_here, STDOUT=None)
    monkeypatch.setattr(compare, "subprocess", here)
    run = next(run for run in compare.all_runs(0, QUICK) if run.head == "mixture")
    comparison = compare.Comparison(tmp_path, QUICK, [run])
    comparison.stages = dict([*comparison.stages.items()][:5])
    comparison.run()
    argv = ["--quick", "--heads", "mixture", "--output_dir", str(tmp_path)]
    first = start_fork(["-m", "demo.compare", *argv], tmp_path / "first")
    log = tmp_path / "logs" / "heads-mixture-0-train.log"
    saved = "saved checkpoint-step00000011"  # one of two epochs
    kill_when(lambda: log.exists() and saved in log.read_text(), first)
    wait_for_the_end_of_the_job_in(tmp_path / "heads-mixture-0")
    assert "heads-mixture-0-train" in (tmp_path / "first.1").read_text()
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "results-quick").iterdir()}
    assert len(finished) == 5  # the digits, the cache, the judge, its statistics, real digits
    capsys.readouterr()
    call(compare.main, *argv)
    printed = capsys.readouterr().out
    assert printed.count("going on after step 11") == 1
    assert "1/2 heads-mixture-0-train" in printed and "2/2 heads-mixture-0-draw" in printed
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    (run,) = read_json(tmp_path / "results.json")["runs"]
    assert run["train"]["epochs"] == 2 and run["train"]["validation"][-1][0] == 22
    assert [point["num_iter"] for point in run["draw"]["points"]] == [2, 4]
    assert all(point["frechet_error"] > 0 for point in run["draw"]["points"])
    assert "| mixture | 35 K |" in printed
    assert Image.open(tmp_path / "heads.png").width > 500


def test_a_stage_that_fails_ends_it_with_the_command_and_the_log(tmp_path, monkeypatch, capsys):
    (tmp_path / "logs").mkdir()
    monkeypatch.setitem(compare.COMMANDS, "data", "-m demo.digits --size {judge}x")
    runs = compare.Comparison(tmp_path, QUICK, [])
    with pytest.raises(SystemExit) as stop:
        runs.run()
    assert stop.value.code == 1 and runs.result("data") is None
    error = capsys.readouterr().err
    assert "exit code 2" in error and "demo.digits --size 3x" in error
    assert "invalid int value: '3x'" in error


def test_a_run_at_equal_time_has_the_epochs_that_fit(tmp_path, monkeypatch):
    runs = {run.name: run for run in compare.all_runs(0, QUICK)}
    assert len(runs) == 54 and {run.group for run in runs.values()} == set(compare.GROUPS)
    for run in runs.values():
        make_parser().parse(["--head", run.head, *run.flags])
    comparison = compare.Comparison(tmp_path, compare.DATA["digits"], [])
    timed = {"speed/images_per_second": 64.0, "speed/memory_gib": 1.0}
    timed["speed/tflops_per_device"] = 0.5
    lines = [{"step": 22} | timed, {"step": 22, "validation/loss_ema": 2.0}, {"step": 44} | timed]
    (tmp_path / "time-mixture-0").mkdir()
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "time-mixture-0" / "metrics.jsonl").write_text(text)
    monkeypatch.setattr(comparison, "call", command := mock.Mock())
    monkeypatch.setattr(comparison, "levels", lambda run: {})  # of a checkpoint, which is not there
    (tmp_path / "results").mkdir()
    for name, seconds in (("heads-channel-0", 100.0), ("heads-mixture-0", 30.0)):
        path = tmp_path / "results" / f"{name}-train.json"
        path.write_text(json.dumps({"seconds": seconds}))
    found = comparison.train(runs["time-mixture-0"])
    asked = command.call_args.kwargs
    assert (asked["epochs"], asked["warmup"], asked["often"]) == (160, 13.33, 26)
    speed = {"epochs": 160, "seconds": 22.0, "step_seconds": 0.5, "memory_gib": 1.0, "tflop": 11.0}
    assert found == speed | {"validation": [[22, 2.0]]}
    with pytest.raises(UserError, match="comes after heads-channel-0 and heads-masked-0"):
        comparison.train(runs["time-masked-0"])


@pytest.mark.parametrize("head", compare.HEADS)
def test_operations_of_a_head_are_those_of_its_products(head):
    """The mixture and the codebook are one linear layer; diffusion samples in 100 steps."""
    sizes = dict(img_size=32, vae_stride=8, vae_embed_dim=8, quant_levels=16, head=head)
    settings = compare.TokenBridge(**preset("tokenbridge_tiny") | sizes).config.to_dict()
    found = compare.head_figures(settings)
    outputs = {"mixture": 16 * 17, "codebook": 16384}.get(head)
    if outputs is not None:
        assert found["parameters"] == 129 * outputs
        assert found["flops_training"] == 3 * 2 * 128 * outputs
    times = {"diffusion": 100, "masked": 4}.get(head, 1)
    assert 3 * found["flops_drawing"] == pytest.approx(times * found["flops_training"], rel=0.02)


def test_the_page_shows_the_committed_results(tmp_path):
    for name in compare_page.PAGES:
        shutil.copy(ROOT / "docs" / name, tmp_path)
    compare_page.render(read_json(RESULTS), tmp_path)
    for name in compare_page.PAGES:
        assert (tmp_path / name).read_text() == (ROOT / "docs" / name).read_text()
    for name in ("heads-training.svg", "heads-sampling.svg"):
        assert "<svg" in (tmp_path / "images" / name).read_text()
        assert (ROOT / "docs" / "images" / name).exists()
