"""--finetune: a checkpoint's weights begin a training on other classes or at another size."""

import shutil
from pathlib import Path

import pytest
import torch

import main_cache
import main_tokenbridge
from tests import runs
from util import doctor
from util.errors import UserError

AGAIN = dict(class_num=None, cached_path="others_cache", blr=0)  # a rate of 0: weights stay
ROWS = "class_emb.weight"
NAMES = ("bee", "cat", "dog", "eel")


@pytest.fixture(scope="module")
def others(tmp_path_factory) -> Path:
    """Inputs, and others/ and others_cache/ of the classes bee, cat, dog and eel."""
    inputs = runs.make_inputs(tmp_path_factory.mktemp("others") / "inputs")
    shutil.copytree(inputs / "data", inputs / "others")
    train_folder = inputs / "others" / "train"
    (train_folder / "ant").rename(train_folder / "dog")
    shutil.copytree(train_folder / "cat", train_folder / "eel")
    paths = dict(data_path="others", cached_path="others_cache")
    runs.call(main_cache.main, *runs.flags(inputs, runs.CACHE_FLAGS, paths))
    return inputs


def test_averaged_weights_begin_anew_and_rows_are_kept_by_name(others, trained, tmp_path, capsys):
    before = runs.load(trained)["model_ema"]
    found = runs.train(others, tmp_path / "out", finetune=trained, epochs=1, **AGAIN)
    said = capsys.readouterr().out
    assert "2 of 3 rows kept by name; 2 new (dog, eel)" in said and "averaged weights" in said
    assert (found["classes"], found["config"]["class_num"]) == (list(NAMES), 4)
    assert (found["step"], found["epoch"]) == (4, 0)
    for key in ("model", "model_ema"):
        assert all(torch.equal(found[key][k], before[k]) for k in before if k != ROWS)
        assert torch.equal(found[key][ROWS][:2], before[ROWS][1:])
        new = found[key][ROWS][2:]
        assert 0.015 < new.std() < 0.025 and not torch.equal(new[0], new[1])
    assert {s["step"].item() for s in found["optimizer"]["state"].values()} == {4.0}


def test_the_same_command_goes_on_with_what_it_has_begun(others, trained, tmp_path):
    whole = dict(finetune=trained, **AGAIN | dict(blr=1e-2))
    expected = runs.train(others, tmp_path / "whole", **whole, save_last_freq=1)
    assert (tmp_path / "whole" / "checkpoint-step00000004.pth").is_file()
    for resume in ("auto", None):
        out = tmp_path / str(resume)
        out.mkdir()
        shutil.copy(tmp_path / "whole" / "checkpoint-step00000004.pth", out)
        runs.assert_same_training(runs.train(others, out, **whole, resume=resume), expected)


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        (4, "3 of 3 rows kept by number; 1 new (eel)"),
        (2, "0 of 3 rows kept by number; 2 new (dog, eel)"),
    ],
)
def test_rows_without_names_are_kept_of_as_many(others, trained, tmp_path, capsys, classes, said):
    out, path = tmp_path / "out", tmp_path / "published.pth"
    settings = AGAIN | runs.save_published(trained, path) | dict(finetune=path, class_num=None)
    if classes < 3:
        for name in ("dog", "eel"):
            shutil.copytree(others / "others" / "train" / name, tmp_path / "few" / "train" / name)
        paths = dict(data_path=tmp_path / "few", cached_path=tmp_path / "cache")
        runs.call(main_cache.main, *runs.flags(others, runs.CACHE_FLAGS, paths))
        settings["cached_path"] = tmp_path / "cache"
    scale = dict(latent_scale=runs.load(trained)["config"]["latent_scale"])
    found = runs.train(others, out, **settings | scale, epochs=1)
    assert said in capsys.readouterr().out
    kept = torch.equal(found["model"][ROWS][:2], runs.load(trained)["model_ema"][ROWS][:2])
    assert kept == (classes == 4) and len(found["model"][ROWS]) == classes


def test_positions_are_interpolated_to_another_size(others, trained, tmp_path, capsys):
    paths = dict(cached_path=tmp_path / "cache", img_size=32)
    runs.call(main_cache.main, *runs.flags(others, runs.CACHE_FLAGS, paths))
    found = runs.train(others, tmp_path / "out", finetune=trained, epochs=1, blr=0, **paths)
    assert "positions interpolated from 4 x 4 to 8 x 8" in capsys.readouterr().out
    assert found["config"]["img_size"] == 32
    for name in ("encoder_pos_embed_learned", "decoder_pos_embed_learned", "output_pos_embed"):
        new, old = found["model"][name], runs.load(trained)["model_ema"][name]
        assert torch.equal(new[:, :-64], old[:, :-16]), "the slots of the class"
        grid, expected = (
            x[0, -n:].mT.unflatten(1, (s, s)) for x, n, s in ((new, 64, 8), (old, 16, 4))
        )
        pooled = torch.nn.functional.avg_pool2d(grid, 2)
        corr = torch.corrcoef(torch.stack([pooled.flatten(), expected.flatten()]))[0, 1]
        assert corr > 0.98, "each position stays where it was in the image"


def test_dry_run_and_doctor_take_it(others, trained, tmp_path, capsys):
    argv = runs.flags(
        others, runs.TRAIN_FLAGS, AGAIN, finetune=trained, output_dir=tmp_path / "out"
    )
    runs.call(main_tokenbridge.main, *argv, "--dry_run")
    assert "2 of 3 rows kept by name" in capsys.readouterr().out
    runs.call(doctor.main, *argv, "--vae_path", str(others / "vae.ckpt"), "--no_metrics")
    lines = {line[9:26].strip(): line for line in capsys.readouterr().out.splitlines()}
    assert lines["checkpoint"].startswith("ok") and "2 new (dog, eel)" in lines["inputs"]
    assert "4 classes" in lines["inputs"] and not (tmp_path / "out").exists()
    argv = runs.flags(others, runs.TRAIN_FLAGS, AGAIN, resume=trained, output_dir=tmp_path / "out")
    with pytest.raises(SystemExit):
        runs.call(doctor.main, *argv, "--vae_path", str(others / "vae.ckpt"), "--no_metrics")
    said = capsys.readouterr().out
    assert "FAILURE  inputs" in said and "--finetune in the place of --resume" in said


def test_what_contradicts_it_is_refused(others, trained, refusal):
    for changes, said in (
        (dict(resume="RUN"), "--resume auto goes on with what has begun"),
        (dict(finetune="auto"), "--finetune auto names the folder or file"),
        (dict(finetune="/nowhere"), "--finetune /nowhere does not exist"),
        (dict(quant_bits=4), "has quant_levels 64, but the flags say 16"),
        (dict(channel_order="3,2,1,0"), "has channel_order"),
        (dict(class_num=3), "has 4 classes, --class_num is 3; leave --class_num out"),
        (dict(evaluate=True), "--evaluate needs"),
        (dict(finetune=None, resume="RUN"), "--finetune in the place of --resume"),
        (dict(finetune=None, resume="RUN", class_num=4), "leave the flag out, or see --finetune"),
    ):
        changes = AGAIN | dict(finetune=trained) | changes
        changes = {k: trained if v == "RUN" else v for k, v in changes.items()}
        assert said in refusal("train", others, **changes)


def test_a_run_stays_known_by_what_it_began_with(others, trained, tmp_path, capsys, refusal):
    """However the path is spelled, and after the run went on without the flag."""
    goes = dict(output_dir=tmp_path / "out", blr=0)
    argv = [
        runs.flags(others, runs.TRAIN_FLAGS, AGAIN, goes, epochs=epochs) for epochs in (1, 2, 3)
    ]
    runs.call(main_tokenbridge.main, *argv[0], "--finetune", str(trained))
    runs.call(main_tokenbridge.main, *argv[1], "--resume", "auto")
    capsys.readouterr()
    runs.call(main_tokenbridge.main, *argv[2], "--finetune", f"{trained}/checkpoint-last.pth")
    assert "going on after step 8" in capsys.readouterr().out
    shutil.copytree(trained, tmp_path / "other")
    for resume in ("auto", None):  # a folder of another run is not gone on with
        other = dict(output_dir=tmp_path / "other", finetune=trained, resume=resume)
        line = refusal("train", others, **AGAIN, **other)
        assert f"--output_dir {tmp_path / 'other'} holds" in line


def test_a_finished_checkpoint_of_another_run_is_not_nothing_to_train(inputs, trained, tmp_path):
    """As the published ones on one's own images; a run itself may be started again at its end."""
    with pytest.raises(UserError, match=f"has done all of --epochs 2; .*--finetune {trained}"):
        runs.train(inputs, tmp_path / "out", resume=trained)
    shutil.copytree(trained, tmp_path / "own")
    runs.train(inputs, tmp_path / "own", resume="auto")
