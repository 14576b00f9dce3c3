"""--finetune: a checkpoint's weights begin a training on other classes or at another size."""

import shutil
from pathlib import Path

import pytest
import torch

from tests import runs
from util import doctor
from util.errors import UserError

AGAIN = dict(class_num=None, cached_path="others_cache", blr=0)  # a rate of 0: weights stay
ROWS = "class_emb.weight"
NAMES = ("bee", "cat", "dog", "eel")


@pytest.fixture(scope="module")
def others(tmp_path_factory) -> Path:
    """Inputs with the classes bee, cat, dog and eel, and others_cache/ of them."""
    inputs = runs.make_inputs(tmp_path_factory.mktemp("others") / "inputs")
    train_folder = inputs / "data" / "train"
    (train_folder / "ant").rename(train_folder / "dog")
    shutil.copytree(train_folder / "cat", train_folder / "eel")
    runs.use("cache", inputs, cached_path="others_cache")
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


def test_rows_without_names_are_kept_of_as_many(others, trained, tmp_path, capsys):
    runs.train(others, tmp_path / "five", class_num=5, epochs=1)
    for folder, said in (
        (trained, "3 of 3 rows kept by number; 1 new (eel)"),
        (tmp_path / "five", "0 of 5 rows kept by number; 4 new (bee, cat, dog, eel)"),
    ):
        saved, path = runs.load(folder), tmp_path / f"{folder.name}.pth"
        settings = AGAIN | runs.save_published(folder, path) | dict(finetune=path, class_num=None)
        settings |= dict(latent_scale=saved["config"]["latent_scale"], epochs=1)
        found = runs.train(others, path.with_suffix(".run"), **settings)["model"][ROWS]
        assert said in capsys.readouterr().out and len(found) == 4
        assert torch.equal(found[:3], saved["model_ema"][ROWS][:3]) == (folder == trained)


def test_positions_are_interpolated_to_another_size(others, trained, tmp_path, capsys):
    paths = dict(cached_path=tmp_path / "cache", img_size=32)
    runs.use("cache", others, **paths)
    found = runs.train(others, tmp_path / "out", finetune=trained, epochs=1, **AGAIN | paths)
    assert "positions interpolated from 4 x 4 to 8 x 8" in capsys.readouterr().out
    assert found["config"]["img_size"] == 32
    for name in ("encoder_pos_embed_learned", "decoder_pos_embed_learned", "output_pos_embed"):
        new, old = found["model"][name], runs.load(trained)["model_ema"][name]
        assert torch.equal(new[:, :-64], old[:, :-16]), "the slots of the class"
        grid, expected = new[0, -64:].mT.unflatten(1, (8, 8)), old[0, -16:].mT
        pooled = torch.nn.functional.avg_pool2d(grid, 2)
        corr = torch.corrcoef(torch.stack([pooled.flatten(), expected.flatten()]))[0, 1]
        assert corr > 0.98, "each position stays where it was in the image"


def test_dry_run_and_doctor_take_it(others, trained, tmp_path, capsys):
    settings = AGAIN | dict(finetune=trained, output_dir=tmp_path / "out")
    runs.use("train", others, **settings, dry_run=True)
    assert "2 of 3 rows kept by name" in capsys.readouterr().out
    settings |= dict(vae_path="vae.ckpt", no_metrics=True)
    runs.call(doctor.main, *runs.flags(others, runs.TRAIN_FLAGS, settings))
    lines = {line[9:26].strip(): line for line in capsys.readouterr().out.splitlines()}
    assert lines["checkpoint"].startswith("ok") and "2 new (dog, eel)" in lines["inputs"]
    assert "4 classes" in lines["inputs"] and not (tmp_path / "out").exists()


def test_what_contradicts_it_is_refused(others, trained, refusal):
    for changes, said in (
        (dict(resume=True), "--resume auto goes on with what has begun"),
        (dict(finetune="auto"), "--finetune auto names the folder or file"),
        (dict(finetune="/nowhere"), "--finetune /nowhere does not exist"),
        (dict(quant_bits=4), "has quant_levels 64, but the flags say 16"),
        (dict(channel_order="3,2,1,0"), "has channel_order"),
        (dict(class_num=3), "has 4 classes, --class_num is 3; leave --class_num out"),
        (dict(evaluate=True), "--evaluate needs"),
        (dict(finetune=None, resume=True), "--finetune in the place of --resume"),
        (dict(finetune=None, resume=True, class_num=4), "leave the flag out, or see --finetune"),
    ):
        changes |= {"resume": trained} if "resume" in changes else {}
        assert said in refusal("train", others, **AGAIN | dict(finetune=trained) | changes)


def test_a_run_stays_known_by_what_it_began_with(others, trained, tmp_path, capsys, refusal):
    """However the path is spelled, and after the run went on without the flag."""
    for epochs, how in (
        (1, dict(finetune=trained)),
        (2, dict(resume="auto")),
        (3, dict(finetune=trained / "checkpoint-last.pth")),
    ):
        runs.train(others, tmp_path / "out", **AGAIN, epochs=epochs, **how)
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
