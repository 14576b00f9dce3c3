"""An evaluation that was killed goes on, on another number of processes too, to the same end."""

import json
from pathlib import Path

import pytest

from tests import runs
from tests.conftest import complaint
from tests.measures import PIXELS, save_model
from util.evaluation.evaluator import Evaluator

IMAGES, BATCH = 84, 4  # of three classes
SETTINGS = dict(num_images=IMAGES, eval_bsz=BATCH, feature_extractor=PIXELS, keep_images=True)
SETTINGS |= dict(num_workers=0, save_npz=True, num_iter=8)


def settings_of(inputs: Path, **changes) -> dict:
    return SETTINGS | {"fid_reference": inputs / "data"} | changes


def run_here(inputs: Path, output: Path, **changes) -> Path:
    """Evaluate in this process; the folder of the evaluation."""
    runs.evaluate(inputs, output, inputs / "model", **settings_of(inputs, **changes))
    (folder,) = output.glob("ariter*")
    return folder


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory) -> Path:
    """The folder of one process that nothing has disturbed."""
    return run_here(inputs, tmp_path_factory.mktemp("whole"))


def content(folder: Path) -> dict[str, bytes]:
    """All files but the one that tells of the run: its time and its versions."""
    return runs.contents(folder, but=("metrics.json",))


def figures(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def test_killed_run_ends_as_an_undisturbed_one(inputs, whole, tmp_path):
    """Begun on two processes, ended on three."""
    settings = settings_of(inputs, output_dir=tmp_path, resume="model")
    asked = runs.command("evaluate", inputs, **settings)
    begun = [
        runs.start_fork(asked, tmp_path / str(i), **env) for i, env in enumerate(runs.ranks(2))
    ]
    runs.kill_when(lambda: len(list(tmp_path.glob("ariter*/features/*/batch-*.npz"))) >= 3, *begun)
    (folder,) = tmp_path.glob("ariter*")
    assert not (folder / "metrics.json").exists()
    done = {path: path.stat().st_mtime_ns for path in folder.rglob("batch-*.npz")}
    (folder / "images" / ".00000.png.abc.tmp").write_bytes(b"left behind")
    result = runs.on_processes(3, *asked)
    assert f"{len(done)} of {IMAGES // BATCH} batches are there already" in result.stdout
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert content(folder) == content(whole)
    found, expected = figures(folder), figures(whole)
    for name in ("metrics", "replicates", "warnings", "measured", "weights_sha256"):
        assert found[name] == expected[name]
    assert (found["processes"], expected["processes"]) == (3, 1)


def test_a_finished_run_stays_and_another_is_refused(inputs, whole, tmp_path, monkeypatch):
    before = content(whole), figures(whole)
    monkeypatch.setattr(Evaluator, "_draw", lambda *_: pytest.fail("drawn again"))
    run_here(inputs, whole.parent)
    assert (content(whole), figures(whole)) == before
    for changes, fragment in (
        (dict(eval_bsz=5), "settings.eval_bsz 4 (now 5)"),
        (dict(precision="bf16"), "precision fp32 (now bf16)"),
        (dict(head_input="published"), "model.head_input trained (now published)"),
        (None, "weights_sha256 "),
    ):
        model = inputs / "model" if changes else save_model(tmp_path / "model", seed=1)
        settings = settings_of(inputs, **changes or {})
        line = complaint(runs.evaluate, inputs, whole.parent, model, **settings)
        assert fragment in line and str(whole) in line and "--output_dir" in line
        assert (content(whole), figures(whole)) == before


def test_measured_images_are_removed_and_measured_again_without_them(inputs, whole, tmp_path):
    """The features stay: another reference needs no image."""
    asked = dict(keep_images=None, save_npz=None)
    folder = run_here(inputs, tmp_path, **asked)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["features", "grid.png", "metrics.json", "settings.json", "statistics.npz"]
    assert figures(folder)["images"] == "removed"
    stats = whole / "statistics.npz"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluator, "generate", lambda *_: pytest.fail("drawn again"))
        run_here(inputs, tmp_path, fid_reference=None, fid_stats=stats, **asked)
    assert figures(folder)["metrics"]["frechet_distance"] == pytest.approx(0, abs=1e-6)
    assert not (folder / "images").exists()
    run_here(inputs, tmp_path)  # images and array are asked for after all
    assert content(folder) == content(whole)


def test_images_that_nothing_measured_are_kept(inputs, whole, tmp_path, monkeypatch):
    folder = run_here(inputs, tmp_path, no_metrics=True, keep_images=None)
    kept = content(folder)
    assert len(list((folder / "images").iterdir())) == IMAGES
    run_here(inputs, tmp_path, keep_images=None)  # measured from the files; still kept
    assert figures(folder)["metrics"] == figures(whole)["metrics"]
    assert kept.items() <= content(folder).items() == content(whole).items()

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("util.evaluation.evaluator.write_json", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_here(inputs, tmp_path / "stopped", keep_images=None)
    (folder,) = (tmp_path / "stopped").glob("ariter*")
    assert len(list((folder / "images").glob("*.png"))) == IMAGES  # removed after the figures
