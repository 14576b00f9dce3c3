"""--metrics_file: a line for every figure, each step once, whatever happens to the run."""

import json
import os

import pytest

import main_tokenbridge
from tests.runs import EVALUATE_FLAGS, TRAIN_FLAGS, call, flags, load, refused
from util.errors import UserError
from util.metrics_file import HEADER, MetricsFile


def read_tsv(path) -> list[tuple[str, ...]]:
    head, *lines = path.read_text().splitlines(keepends=True)
    assert head == HEADER
    return [tuple(line.rstrip("\n").split("\t")) for line in lines]


def read_jsonl(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def filled(path, first_step: int, *steps: int) -> None:
    file = MetricsFile(str(path), first_step)
    for step in steps:
        file.write({"train/loss": step + 0.5, "train/lr": 1e-5}, step)


def test_figures_are_a_line_each(tmp_path):
    filled(tmp_path / "new" / "m.tsv", 0, 10)
    assert read_tsv(tmp_path / "new" / "m.tsv") == [
        ("10", "train/loss", "10.5"),
        ("10", "train/lr", "1e-05"),
    ]
    filled(tmp_path / "m.jsonl", 0, 10, 20)
    expected = [{"step": s, "train/loss": s + 0.5, "train/lr": 1e-5} for s in (10, 20)]
    assert read_jsonl(tmp_path / "m.jsonl") == expected


@pytest.mark.parametrize("name", ["m.tsv", "m.jsonl"])
def test_resumed_run_goes_on_as_if_nothing_had_been(tmp_path, name):
    filled(tmp_path / name, 0, 10, 20, 30)
    with open(tmp_path / name, "a") as file:
        file.write('{"step": 40, "train/lo' if name.endswith("l") else "40\ttrain/lo")  # killed
    filled(tmp_path / name, 20, 30, 40)
    filled(tmp_path / f"whole-{name}", 0, 10, 20, 30, 40)
    assert (tmp_path / name).read_bytes() == (tmp_path / f"whole-{name}").read_bytes()


def test_run_from_scratch_sets_the_file_of_another_aside(tmp_path):
    filled(tmp_path / "m.jsonl", 0, 10, 20)
    before = (tmp_path / "m.jsonl").read_bytes()
    filled(tmp_path / "m.jsonl", 0, 5)
    assert [line["step"] for line in read_jsonl(tmp_path / "m.jsonl")] == [5]
    assert (tmp_path / "m.jsonl.old").read_bytes() == before


@pytest.mark.parametrize("name", ["m.tsv", "m.jsonl"])
def test_repeated_figures_are_replaced_and_others_stay(tmp_path, name):
    file = MetricsFile(str(tmp_path / name))
    file.write({"a/fid": 1.0}, None)
    file.write({"b/fid": 2.0}, None, replace=True)
    file.write({"a/fid": 3.0}, None, replace=True)
    file.write({"a/fid": 4.0}, 7, replace=True)
    if name == "m.tsv":
        found = read_tsv(tmp_path / name)
    else:
        lines = read_jsonl(tmp_path / name)
        found = [("" if s is None else str(s), n, repr(v)) for s, n, v in map(flat, lines)]
    assert found == [("", "b/fid", "2.0"), ("", "a/fid", "3.0"), ("7", "a/fid", "4.0")]


def flat(line: dict) -> tuple:
    (name,) = set(line) - {"step"}
    return line["step"], name, line[name]


def test_what_is_not_finite_is_null_in_json(tmp_path):
    MetricsFile(str(tmp_path / "m.jsonl")).write({"a": float("nan"), "b": float("inf")}, 1)
    assert read_jsonl(tmp_path / "m.jsonl") == [{"step": 1, "a": None, "b": None}]


@pytest.mark.parametrize("content", ["hello\n", "[1]\n", '{"loss": 1}\n', "\n"])
def test_file_of_something_else_is_left_alone(tmp_path, content):
    for name in ("m.tsv", "m.jsonl"):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match="line 1 is no line of figures"):
            MetricsFile(str(tmp_path / name), 0)
        assert (tmp_path / name).read_text() == content


def test_full_disk_loses_figures_and_not_the_run(tmp_path, capsys, monkeypatch):
    file = MetricsFile(str(tmp_path / "m.jsonl"), 0)
    file.write({"a": 1.0}, 1)
    (tmp_path / "m.jsonl").rename(tmp_path / "kept")
    os.symlink("/dev/full", tmp_path / "m.jsonl")
    file.write({"a": 2.0}, 2)
    assert "No space left on device" in capsys.readouterr().err
    (tmp_path / "m.jsonl").unlink()
    (tmp_path / "kept").rename(tmp_path / "m.jsonl")
    file.write({"a": 3.0}, 3)
    assert [line["step"] for line in read_jsonl(tmp_path / "m.jsonl")] == [1, 3]


def test_training_and_evaluation_write_into_one_file(inputs, tmp_path, capsys):
    """Six steps, the last two of them twice; then the figures of an evaluation, as JSON too."""
    figures, output = tmp_path / "figures.jsonl", tmp_path / "out"
    settings = flags(inputs, TRAIN_FLAGS, output_dir=output, metrics_file=figures, log_freq=2)
    call(main_tokenbridge.main, *settings, "--epochs", "1")
    whole = read_jsonl(figures)
    assert [line["step"] for line in whole] == [2, 3]
    assert set(whole[0]) > {"train/loss", "train/lr", "train/grad_norm"}
    with open(figures, "a") as file:
        file.write('{"step": 4, "train/loss": 9.0}\n')  # of a run that was killed
    call(main_tokenbridge.main, *settings, "--resume", "auto")
    assert [line["step"] for line in read_jsonl(figures)] == [2, 3, 4, 6]

    argv = flags(inputs, EVALUATE_FLAGS, output_dir=tmp_path / "ev", resume=output, num_images=3)
    argv += ["--cfg", "1", "2", "--metrics_file", str(figures), "--json", "--no_metrics"]
    capsys.readouterr()
    call(main_tokenbridge.main, *argv)
    found = json.loads(capsys.readouterr().out)
    assert [e["settings"]["cfg"] for e in found["evaluations"]] == [1.0, 2.0]
    assert found["checkpoint"] == str(output / "checkpoint-last.pth")
    assert load(output)["step"] == found["step"] == 6


def test_wrong_name_and_wrong_use_are_refused(inputs, tmp_path, capsys):
    argv = flags(inputs, TRAIN_FLAGS, output_dir=tmp_path / "out")
    line = refused(capsys, main_tokenbridge.main, *argv, "--metrics_file", "figures.csv")
    assert "figures.csv does not end in .jsonl or .tsv" in line
    (tmp_path / "m.tsv").write_text("mine\n")
    named = ["--metrics_file", str(tmp_path / "m.tsv")]
    assert "name a new file" in refused(capsys, main_tokenbridge.main, *argv, *named)
    assert "--json" in refused(capsys, main_tokenbridge.main, *argv, "--json")
    assert not (tmp_path / "out").exists()
