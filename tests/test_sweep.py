"""Several values of a sampling setting: one load, one table, a comparison in pairs."""

import csv
import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from main_tokenbridge import make_parser
from tests.conftest import complaint
from tests.measures import PIXELS
from tests.runs import SIZE, evaluate
from util import setup
from util.evaluation import sweep
from util.evaluation.folder import read_png
from util.evaluation.settings import EvalSettings, eval_settings

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
