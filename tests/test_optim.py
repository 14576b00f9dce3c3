"""The learning rate, a micro-batch's own random numbers, and averaged weights, of any width too.

AdamW's groups and their order are the published ones: test_checkpoint.py, test_tokenbridge.py.
"""

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from tests import runs
from tests.conftest import tiny_model
from util import optim, posthoc_ema
from util.optim import EMA, LRSchedule, PowerEMA, power_of, seed_micro_batch
from util.posthoc_ema import coefficients

WIDTHS = optim.WIDTHS
AVERAGED = dict(ema_rate=[0.9, 0.5], posthoc_ema=1, lr_schedule="constant", save_last_freq=1)


def test_rate_falls_by_half_a_cosine_or_is_constant_after_any_warm_up():
    """Warm-up and fall also of the golden training: test_tokenbridge.py."""
    settings = dict(lr=1.0, min_lr=0.2, warmup_epochs=10, epochs=100, steps_per_epoch=4)
    for epoch, expected in ((0, 0.0), (1, 0.1), (10, 1.0), (55, 0.6), (100, 0.2)):
        assert LRSchedule(**settings)(epoch * 4) == pytest.approx(expected, rel=1e-12)
        constant = LRSchedule(**settings, kind="constant")(epoch * 4)
        assert constant == pytest.approx(min(epoch / 10, 1.0))
    for warmup, expected in ((0, [1.0, 0.5]), (2, [0.0, 0.5]), (5, [0, 0.2])):  # none, all, more
        schedule = LRSchedule(1.0, 0.0, warmup, epochs=2, steps_per_epoch=1)
        assert [schedule(step) for step in (0, 1)] == pytest.approx(expected)


def test_every_micro_batch_has_its_own_random_numbers():
    def draw(*key: int) -> float:
        seed_micro_batch(*key)
        return torch.rand(()).item()

    keys = [(s, t, j) for s in range(3) for t in range(20) for j in range(4)]
    drawn = {key: draw(*key) for key in keys}
    assert len(set(drawn.values())) == len(keys)
    assert all(draw(*key) == drawn[key] for key in reversed(keys))


def test_swap_lends_the_averages_without_a_copy_and_gives_the_weights_back_after_an_error():
    model = tiny_model()
    ema = EMA(model.published_parameters(), 0.5)
    for parameter in model.parameters():
        parameter.data.add_(1.0)
    ema.update()
    own = {name: (p.data_ptr(), p.detach().clone()) for name, p in model.published_parameters()}
    averages = {name: (t.data_ptr(), t.clone()) for name, t in ema.state_dict().items()}
    assert list(averages) == list(own)
    with pytest.raises(RuntimeError), ema.swapped_in():
        for name, parameter in model.published_parameters():
            assert parameter.data_ptr() == averages[name][0]
            assert torch.equal(parameter, averages[name][1])
        raise RuntimeError
    for name, parameter in model.published_parameters():
        assert parameter.data_ptr() == own[name][0] and torch.equal(parameter, own[name][1])
        assert torch.equal(ema.state_dict()[name], averages[name][1])


# --- several averages at once, and any width afterwards


def follow(values: np.ndarray, sigma: float) -> list[float]:
    """The average after every step of parameters that take those values."""
    parameter = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
    ema, found = PowerEMA([("w", parameter)], sigma), []
    for step, value in enumerate(values, 1):
        parameter.data.fill_(value)
        ema.update(step=step)
        found.append(ema.averages[0].item())
    return found


def test_a_power_average_has_its_width():
    """The exponents of two widths as the paper rounds them; weights that sum to one."""
    assert [power_of(sigma) for sigma in WIDTHS] == pytest.approx([16.97, 6.94], abs=0.005)
    steps = np.arange(1, 1001)
    for sigma in (0.05, 0.1, 0.25):
        moments = [follow(values, sigma)[-1] for values in (steps**0.0, steps, steps**2.0)]
        assert moments[0] == pytest.approx(1)
        assert np.sqrt(moments[2] - moments[1] ** 2) / 1000 == pytest.approx(sigma, rel=0.01)


@pytest.mark.parametrize("sigma", [0.04, 0.05, 0.08, 0.15, 0.2])
def test_any_width_is_rebuilt_of_a_series(sigma):
    """A random walk of 3,000 steps, a snapshot of each track every 150."""
    walk = np.random.default_rng(0).standard_normal(3000).cumsum()
    steps = list(range(150, 3001, 150))
    snapshots = np.stack([follow(walk, known) for known in WIDTHS], 1)[np.array(steps) - 1]
    weights, off = coefficients(steps, sigma)
    expected = follow(walk, sigma)[-1]
    assert off < 0.05 and weights.sum() == pytest.approx(1)
    assert (weights * snapshots).sum() == pytest.approx(expected, abs=0.02 * walk.std())
    weights, worse = coefficients(steps[-1:], sigma)
    if sigma not in WIDTHS:  # which one snapshot has
        assert abs((weights * snapshots[-1:]).sum() - expected) > 0.02 * walk.std() and worse > off


@pytest.fixture(scope="module")
def trained(inputs, tmp_path_factory) -> Path:
    """Eight epochs, in which a third width is followed as the two tracks are."""
    output = tmp_path_factory.mktemp("trained")
    with mock.patch.object(optim, "WIDTHS", (*WIDTHS, 0.15)):
        runs.train(inputs, output, **AVERAGED | dict(epochs=8, ema_rate=[0.9]))
    return output


def test_a_width_of_a_training_is_rebuilt(trained, inputs, tmp_path, capsys):
    """And evaluated: by the file that is written as by a sweep that rebuilds it."""
    saved = runs.load(trained)
    runs.call(posthoc_ema.main, str(trained), "--sigma", "0.15")
    written = Path(capsys.readouterr().out.strip().rpartition("written: ")[2])
    rebuilt = torch.load(written, weights_only=True)
    assert rebuilt["average"] == {"sigma": 0.15, "step": saved["step"]}
    followed, last = saved["averages"]["sigma0.15"], saved["model"]
    moved = sum((last[name] - followed[name]).square().sum() for name in followed).sqrt()
    away = [rebuilt["model_ema"][name] - followed[name] for name in followed]
    assert sum(tensor.square().sum() for tensor in away).sqrt() < 0.02 * moved
    drawn = runs.evaluate(inputs, tmp_path / "file", written, no_metrics=True)
    runs.evaluate(inputs, tmp_path / "sweep", trained, no_metrics=True, ema_sigma=[0.05, 0.15])
    (folder,) = (tmp_path / "sweep").glob("*-sigma0.15")
    assert {path.name: path.read_bytes() for path in (folder / "images").iterdir()} == drawn
    assert (tmp_path / "sweep" / "sweep.csv").read_text().count("\n") == 3


def test_several_rates_are_those_of_trainings_with_one(inputs, tmp_path):
    rates = AVERAGED["ema_rate"]
    both, alone = runs.train(inputs, tmp_path / "both", **AVERAGED), AVERAGED | dict(posthoc_ema=0)
    first, second = (
        runs.train(inputs, tmp_path / str(r), **alone | dict(ema_rate=[r])) for r in rates
    )
    assert "averages" not in first
    del both["optimizer"], first["optimizer"]
    runs.assert_same_training(both["averages"]["0.5"], second["model_ema"])
    assert list(both["averages"]) == ["0.5", "sigma0.05", "sigma0.1"]
    drawn = runs.evaluate(
        inputs, tmp_path / "a", tmp_path / "both", eval_weights="0.5", no_metrics=True
    )
    assert drawn == runs.evaluate(inputs, tmp_path / "b", tmp_path / "0.5", no_metrics=True)
    swapped = AVERAGED | dict(ema_rate=[0.5, 0.9], epochs=2, resume=tmp_path / "both")
    found = runs.train(inputs, tmp_path / "both", **swapped | dict(epochs=3))
    assert list(found["averages"]) == ["0.9", "sigma0.05", "sigma0.1"]


@pytest.mark.parametrize("size", [1, 2])
def test_tracks_and_snapshots_go_on_where_they_were(inputs, tmp_path, size):
    """The second of two epochs, on one process or on two."""
    whole = AVERAGED | dict(epochs=2, accum_iter=None, global_batch=8)
    expected = runs.train(inputs, tmp_path / "whole", **whole)
    runs.train(inputs, tmp_path / "parts", **whole | dict(epochs=1))
    stale = tmp_path / "parts" / "posthoc_ema" / "step00000099.pth"  # of a run that was here before
    stale.write_bytes(b"")
    runs.train_on(size, inputs, tmp_path / "parts", **whole, resume="auto")
    snapshots = [sorted((tmp_path / x / "posthoc_ema").iterdir()) for x in ("parts", "whole")]
    assert [path.name for path in snapshots[0]] == [path.name for path in snapshots[1]]
    assert len(snapshots[0]) == 2
    files = [(torch.load(path, weights_only=True) for path in group) for group in snapshots]
    for found, other in ((runs.load(tmp_path / "parts"), expected), *zip(*files, strict=True)):
        runs.assert_same_training(found, other)


def test_a_sweep_over_widths_that_was_killed_goes_on(trained, inputs, tmp_path):
    settings = dict(ema_sigma=[0.05, 0.08, 0.12], num_images=24, eval_bsz=4, no_metrics=True)
    runs.evaluate(inputs, tmp_path / "whole", trained, **settings)
    settings |= dict(output_dir=tmp_path / "killed", resume=trained)
    command = runs.command("evaluate", inputs, **settings)
    process = runs.start_fork(command, tmp_path / "log")
    runs.kill_when(lambda: list((tmp_path / "killed").glob("*sigma0.08/images/*.png")), process)
    assert not list((tmp_path / "killed").glob("*sigma0.12/images/*.png"))
    (first,) = (tmp_path / "killed").glob("*sigma0.05/images/00000*.png")
    written = first.stat().st_mtime_ns
    runs.on_processes(2, *command)
    assert first.stat().st_mtime_ns == written
    assert runs.images(tmp_path / "killed") == runs.images(tmp_path / "whole")


def test_what_was_not_followed_is_refused(inputs, trained, tmp_path, capsys, refusal):
    """Tracks begin with a training; a rate may begin later, and says so."""
    plain = dict(ema_rate=[0.9], lr_schedule="constant", epochs=1)
    runs.train(inputs, tmp_path, **plain)
    later = plain | dict(epochs=2, resume="auto")
    line = refusal("train", inputs, **later, posthoc_ema=1, output_dir=tmp_path)
    assert "has no sigma0.05; its tracks begin with the training" in line
    line = refusal("evaluate", inputs, resume=tmp_path, ema_sigma=[0.08])
    assert "train with --posthoc_ema" in line
    line = refusal("evaluate", inputs, resume=tmp_path, eval_weights="0.99")
    assert line.endswith("has ema, model, 0.9")
    runs.train(inputs, tmp_path, **later | dict(ema_rate=[0.9, 0.99]))
    assert "the average 0.99 begins with the weights of --resume" in capsys.readouterr().out
    runs.train(inputs, tmp_path, **later | dict(epochs=3))
    assert "the averages 0.99 end here" in capsys.readouterr().out
    bigger = later | dict(epochs=9, posthoc_ema=1, accum_iter=4, output_dir=trained)
    line = refusal("train", inputs, **bigger)
    assert "--posthoc_ema counts steps, and step 24 would be 8" in line
    snapshot = trained / "posthoc_ema" / "step00000003.pth"
    whole = snapshot.read_bytes()
    snapshot.write_bytes(whole[:-1000])
    line = runs.refused(capsys, posthoc_ema.main, str(trained), "--sigma", "0.08")
    snapshot.write_bytes(whole)
    assert str(snapshot) in line
