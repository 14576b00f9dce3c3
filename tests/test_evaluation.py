"""Generated images, and what an evaluation leaves behind."""

import csv
import json
import pickle
import random
import re
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from demo.classifier import generated_images
from main_tokenbridge import make_parser
from models.sampler import SamplingOptions, sample_latents
from models.tokenizers.kl16 import AutoencoderKL
from models.tokenizers.tokenizer import Tokenizer, to_uint8
from tests import runs
from tests.conftest import complaint, tiny_model
from tests.measures import PIXELS, save_model
from tests.runs import SIZE, evaluate, save_published, train
from util import setup
from util.device import resolve_precision
from util.errors import UserError
from util.evaluation import sweep
from util.evaluation.evaluator import Evaluator, shown_ids
from util.evaluation.extractor import Extractor
from util.evaluation.folder import read_png
from util.evaluation.metrics import Measure
from util.evaluation.settings import EvalSettings, eval_settings
from util.optim import EMA

CPU = torch.device("cpu")
FP32 = resolve_precision("fp32", CPU)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    torch.manual_seed(0)
    return Tokenizer(AutoencoderKL(6, (1, 1, 1), ch=32, num_res_blocks=1), latent_scale=0.5)


EVALUATION = EvalSettings(6, 4, SamplingOptions(num_iter=3, cfg=1.5, seed=5))
ENOUGH = replace(EVALUATION, num_images=12)  # for the ten splits of the score


def test_images_are_the_samplers_and_the_first_look_shows_each_class(tokenizer, tmp_path):
    model = tiny_model()
    labels = EVALUATION.labels(3)[1:5]
    assert labels.tolist() == [0, 1, 1, 2]  # two images of each of three classes
    evaluator = Evaluator(model, tokenizer, CPU, FP32)
    images = evaluator.generate(range(1, 5), labels, EVALUATION.sampling)
    chosen = dict(num_iter=3, cfg=1.5, seed=5, image_ids=[1, 2, 3, 4])
    latents = sample_latents(model, labels, **chosen)
    assert torch.equal(images, to_uint8(tokenizer.decode(latents)))
    found, samples = evaluator.evaluate(EVALUATION, tmp_path)
    assert found == {} and samples.shape == (3, 2 * 18 + 2, 3 * 18 + 2)
    assert shown_ids(torch.tensor([0, 0, 1, 1, 2, 2])) == [0, 2, 4, 1, 3, 5]
    assert shown_ids(torch.tensor([5, 5, 5, 2, 2])) == [0, 3, 1, 4]
    large = shown_ids(torch.arange(50000) // 50)
    assert len(large) == 80 and large[:3] == [0, 50, 100] and large[10] == 1


# --- which classes


TRAINED = ["red ant/é", "bee"]  # of a model that has room for three classes


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "model", classes=TRAINED)


def run(inputs: Path, output: Path, resume: Path, **changes) -> tuple[Path, dict]:
    """The folder of one evaluation and its metrics.json."""
    evaluate(inputs, output, resume, **dict(num_images=5, no_metrics=True) | changes)
    (folder,) = output.glob("ariter*")
    return folder, json.loads((folder / "metrics.json").read_text())


def test_images_are_of_the_classes_that_were_trained_as_evenly_as_it_goes(inputs, model, tmp_path):
    folder, found = run(inputs, tmp_path, model, save_npz=True, keep_images=True)
    names = [path.name for path in sorted((folder / "images").iterdir())]
    assert names[::3] == ["00000_red-ant-é.png", "00003_bee.png"] and len(names) == 5
    assert (found["classes"], found["labels"], found["counts"]) == (TRAINED, [0, 1], [3, 2])
    with np.load(folder / "samples.npz") as file:
        assert file["arr_1"].tolist() == [0, 0, 0, 1, 1]
        pixels = torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2)
    judged, labels = generated_images(folder)
    assert torch.equal(judged, pixels) and labels.tolist() == [0, 0, 0, 1, 1]


def test_chosen_classes_are_drawn_by_name_or_number_and_no_others(inputs, model, tmp_path):
    whole, _ = run(inputs, tmp_path / "whole", model, num_images=6, keep_images=True)
    settings = dict(no_metrics=None, feature_extractor=PIXELS, fid_reference=inputs / "data")
    folder, found = run(inputs, tmp_path, model, classes=["BEE"], keep_images=True, **settings)
    assert folder.name == "ariter4-temp1-linearcfg2-image5-seed1-class1-ema"
    assert (found["classes"], found["counts"]) == (["bee"], [5])
    assert "these figures are of 1 of 2 classes" in " ".join(found["warnings"])
    name = "images/00004_bee.png"  # the same noise and class, in another batch
    first, second = (read_png(place / name).int() for place in (whole, folder))
    assert (first - second).abs().max() <= 1
    again, found = run(inputs, tmp_path / "order", model, classes=["1", "red ant/é"])
    assert found["labels"] == [1, 0] and "class1+0" in again.name
    for changes, fragment in (
        ({"classes": ["bea"]}, "unknown: the model has 2.*did you mean bee?"),
        ({"classes": ["2"]}, "number from 0 to 1"),
        ({"classes": ["bee", "0"], "num_images": 1}, "--num_images 1 is less than one of each"),
    ):
        with pytest.raises(UserError, match=fragment):
            run(inputs, tmp_path / "none", model, **changes)
    assert not (tmp_path / "none").exists()


def test_number_of_classes_of_a_published_checkpoint_is_that_of_its_weights(
    inputs, trained, tmp_path
):
    settings = save_published(trained, tmp_path / "weights.pth") | dict(class_num=None)
    folder, found = run(inputs, tmp_path / "out", tmp_path / "weights.pth", **settings)
    assert (found["model"]["class_num"], found["classes"]) == (3, ["0", "1", "2"])
    assert min((folder / "images").iterdir()).name == "00000.png"


def test_training_evaluates_and_shows_the_classes_that_it_has(inputs, tmp_path, refusal):
    settings = dict(online_eval=True, eval_freq=2, vae_path="vae.ckpt", no_metrics=True)
    settings |= dict(num_images=3, num_iter=1, class_num=5, epochs=1)
    assert "class 'ante' is unknown" in refusal("train", inputs, **settings, classes="ante")
    train(inputs, tmp_path, **settings)
    found = json.loads((tmp_path / "eval-epoch1" / "metrics.json").read_text())
    assert found["classes"] == ["ant", "bee", "cat"]


def random_states() -> list:
    return [torch.get_rng_state().tolist(), pickle.dumps(np.random.get_state()), random.getstate()]


def test_training_goes_on_as_if_it_had_not_been_evaluated(tokenizer, tmp_path):
    """Weights, averages and every random generator, to the bit; the extractor draws from one."""
    model = tiny_model(proj_dropout=0.1).train()
    ema = EMA(model.published_parameters(), 0.5)
    for average in ema.averages:
        average.add_(torch.randn_like(average))
    kept = [tensor.clone() for tensor in (*model.state_dict().values(), *ema.averages)]
    before = random_states()
    evaluator = Evaluator(model, tokenizer, CPU, FP32, Measure(Extractor("pixels", None, CPU)))
    with ema.swapped_in():
        averaged, _ = evaluator.evaluate(ENOUGH, tmp_path / "a")
    raw, _ = evaluator.evaluate(ENOUGH, tmp_path / "b")
    assert averaged["score_mean"] != raw["score_mean"] and random_states() == before
    now = (*model.state_dict().values(), *ema.averages)
    assert all(map(torch.equal, kept, now)) and model.training and model.head.training


def test_evaluation_while_training_takes_another_folder(tokenizer, tmp_path):
    """Where a script refuses: below."""
    folder, evaluator = tmp_path / "eval-epoch2", Evaluator(tiny_model(), tokenizer, CPU, FP32)
    points = [replace(EVALUATION, sampling=SamplingOptions(1, cfg=cfg)) for cfg in (1, 2, 3)]
    for k in (0, 1, 0, 2):
        evaluator.evaluate(points[k], folder, training=True)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["eval-epoch2", "eval-epoch2-2", "eval-epoch2-3"]


def test_decoding_in_bf16_says_what_it_changes_and_is_another_evaluation(inputs, tmp_path, capsys):
    common = dict(resume=inputs / "model", no_metrics=True, num_images=4, num_iter=2)
    plain = evaluate(inputs, tmp_path / "fp32", **common)
    lower = evaluate(inputs, tmp_path / "bf16", **common, vae_precision="bf16")
    said = r"--vae_precision: image 0 is (\d+\.\d) dB from that of fp32"
    assert 30 < float(re.search(said, capsys.readouterr().out)[1]) < 100 and lower != plain
    with pytest.raises(UserError, match="vae_precision None .now bfloat16."):
        evaluate(inputs, tmp_path / "fp32", **common, vae_precision="bf16")


# --- killed, it goes on, on another number of processes too, to the same end

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


# --- sweeps

CFG, TEMPERATURE = [1.0, 3.0, 2.0], [0.5, 1.0]


@pytest.fixture(scope="module")
def swept(inputs, tmp_path_factory) -> tuple[Path, list[str]]:
    """The output folder, and what was built on the way."""
    built, output = mock.Mock(), tmp_path_factory.mktemp("swept")
    settings = dict(cfg=CFG, temperature=TEMPERATURE, num_images=30, eval_bsz=10)
    settings |= dict(feature_extractor=PIXELS, fid_reference=inputs / "data", num_workers=0)
    with pytest.MonkeyPatch.context() as patch:
        places = {"build_model": sweep, "build_vae": setup, "prepare_measure": sweep}
        for name, module in places.items():
            watched = mock.Mock(wraps=getattr(module, name))
            built.attach_mock(watched, name)
            patch.setattr(module, name, watched)
        evaluate(inputs, output, inputs / "model", **settings)
    return output, [name for name, _, _ in built.mock_calls]


def table(output: Path) -> list[dict[str, str]]:
    with open(output / "sweep.csv", newline="") as file:
        return list(csv.DictReader(file))


def records(output: Path) -> list[dict]:
    """metrics.json of each row of the table."""
    paths = [output / row["folder"] / "metrics.json" for row in table(output)]
    return [json.loads(path.read_text()) for path in paths]


def test_every_combination_is_a_row_of_table_and_images_and_all_is_loaded_once(swept):
    output, built = swept
    assert built == ["build_vae", "build_model", "prepare_measure"]
    rows = table(output)
    points = [(float(row["cfg"]), float(row["temperature"])) for row in rows]
    assert points == [(cfg, temperature) for cfg in CFG for temperature in TEMPERATURE]
    for row, record in zip(rows, records(output), strict=True):
        assert record["settings"]["cfg"] == float(row["cfg"])
        for name, value in record["metrics"].items():
            assert float(row[name]) == value
    with Image.open(output / "sweep.png") as image:
        assert image.width > image.height > 100
    shown = np.asarray(Image.open(output / "sweep_images.png"))
    height = SIZE + 4  # of the first look at a point: the same images everywhere
    assert shown.shape == (6 * height, 3 * (SIZE + 2) + 2, 3)
    for k, row in enumerate(rows):
        first = read_png(output / row["folder"] / "grid.png")[:, :height]
        assert np.array_equal(shown[k * height : (k + 1) * height], first.permute(1, 2, 0))


def test_differences_are_from_the_best_and_their_errors_from_pairs(swept):
    rows, found = table(swept[0]), records(swept[0])
    distances = [record["metrics"]["frechet_distance"] for record in found]
    best = int(np.argmin(distances))
    assert [int(row["best"]) for row in rows] == [int(k == best) for k in range(len(rows))]

    def pairs(record: dict, name: str) -> np.ndarray:
        return np.subtract(record["replicates"][name], found[best]["replicates"][name])

    for row, record in zip(rows, found, strict=True):
        difference = record["metrics"]["frechet_distance"] - min(distances)
        assert float(row["frechet_distance_difference"]) == pytest.approx(difference)
        values = pairs(record, "fid")
        expected = np.sqrt(0.9 * ((values - values.mean()) ** 2).sum())
        assert float(row["frechet_distance_difference_error"]) == pytest.approx(expected)
        expected = pairs(record, "inception_score").std(ddof=1) / np.sqrt(10)
        assert float(row["score_mean_difference_error"]) == pytest.approx(expected)


def test_best_is_of_what_was_measured_and_sfid_compared_where_all_points_have_it():
    rows = [{"inception_score_mean": 1 + k, "cfg": k, "replicates": {}} for k in (1.0, 2.0)]
    assert [row["best"] for row in sweep.compared(rows)] == [0, 1]
    assert rows[0]["inception_score_mean_difference"] == -1.0
    assert sweep.compared([{"cfg": 1.0}, {"cfg": 2.0}]) == [{"cfg": 1.0}, {"cfg": 2.0}]
    first = {"fid": 1.0, "sfid": 7.0, "replicates": {"sfid": list(range(0, 20, 2))}}
    second = {"fid": 2.0, "sfid": 5.0, "replicates": {"sfid": list(range(10))}}
    rows = sweep.compared([dict(first), dict(second)])
    assert rows[1]["sfid_difference"] == -2.0
    assert rows[1]["sfid_difference_error"] == pytest.approx(np.sqrt(0.9 * 82.5))
    del second["sfid"]  # of an earlier version
    assert "sfid_difference" not in sweep.compared([dict(first), second])[0]


def test_training_takes_one_point_and_values_that_would_share_a_folder_are_refused():
    args = make_parser().parse(["--num_images", "6", "--cfg", "1", "2"])
    line = complaint(eval_settings, args, class_num=3)
    assert "--online_eval takes no sweep: --cfg" in line
    args.cfg, args.temperature = [2.0], [0.5]
    found = eval_settings(args, class_num=3)
    assert (found.sampling.cfg, found.sampling.temperature) == (2.0, 0.5)
    args.cfg = [1.0000001, 1.0000002]
    assert "too close" in complaint(EvalSettings.of, args, class_num=3)
    args.cfg = [1.0, 1.0, 2.0]
    assert len(EvalSettings.of(args, class_num=3)) == 2
