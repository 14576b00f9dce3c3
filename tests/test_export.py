"""python -m util.export: from a checkpoint to a folder that from_pretrained reads."""

import hashlib
import json
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors import safe_open

from models.hub import CONFIG, HEADER, WEIGHTS
from models.tokenbridge import TokenBridge
from models.tokenizers.kl16 import AutoencoderKL
from tests.conftest import complaint
from tests.hub import in_place_of_the_hub
from tests.runs import CLASSES, call, evaluate, flags, load, refused, save_published, train
from util import export
from util.checkpoint import LAST, find_checkpoint
from util.vae import save_vae


def run(resume: Path, output: Path, *others: str) -> dict:
    """Export in this process; the header of what it writes."""
    call(export.main, "--resume", str(resume), "--output_dir", str(output), *others)
    with safe_open(output / WEIGHTS, framework="pt") as file:
        return json.loads(file.metadata()[HEADER])


@pytest.mark.parametrize(("weights", "key"), [("ema", "model_ema"), ("model", "model")])
def test_weights_and_origin_are_written_and_draw_the_same(
    inputs, trained, tmp_path, capsys, weights, key
):
    header = run(trained, tmp_path / "exported", "--eval_weights", weights)
    saved = load(trained)
    state = TokenBridge.from_pretrained(tmp_path / "exported").published_state_dict()
    expected = saved["model"] | saved[key]
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert not torch.equal(saved["model"]["mask_token"], saved["model_ema"]["mask_token"])
    assert json.loads((tmp_path / "exported" / CONFIG).read_text()) == saved["config"]
    digest = hashlib.sha256((inputs / "vae.ckpt").read_bytes()).hexdigest()
    known = dict(weights=weights, step=saved["step"], epoch=saved["epoch"], classes=list(CLASSES))
    scale = saved["config"]["latent_scale"]
    drawn = {"preview_iter": 32, "cfg": [1.0], "temperature": [1.0]}
    assert header == known | {"latent_scale": scale, "vae_sha256": digest, "args": drawn}
    chosen = dict(eval_weights=weights, no_metrics=True)
    images = evaluate(inputs, tmp_path / "a", trained, **chosen)
    assert evaluate(inputs, tmp_path / "b", tmp_path / "exported", **chosen) == images
    assert "warning" not in capsys.readouterr().err
    for folder in tmp_path.glob("*/ariter*"):
        assert folder.name == f"ariter4-temp1-linearcfg2-image12-seed1-{weights}"


def test_an_exported_folder_may_be_the_output_folder_or_begin_a_training(inputs, trained, tmp_path):
    """Nothing starts from scratch where there are weights; nor goes on with older ones."""
    run(trained, tmp_path)
    place = str(tmp_path)
    found, again = (find_checkpoint(place, place, must_exist) for must_exist in (False, True))
    assert found.path == again.path == tmp_path / WEIGHTS
    expected = load(trained) | {"classes": CLASSES}
    for name in ("step", "epoch", "classes", "vae_sha256", "config"):
        assert found.saved[name] == expected[name]
    # A training begins with its weights; with a learning rate of 0 they stay, the average too.
    begun = train(inputs, tmp_path / "out", resume=tmp_path, lr=0.0, epochs=1)
    assert begun["step"] == 3 and begun["epoch"] == 0
    weights = expected["model_ema"]
    for key in ("model", "model_ema"):
        assert all(torch.equal(begun[key][name], weights[name]) for name in weights)
    shutil.copy(trained / LAST, tmp_path)
    for must_exist in (False, True):
        assert find_checkpoint(place, place, must_exist).path == tmp_path / LAST


def test_a_published_checkpoint_takes_its_settings_from_the_flags(trained, tmp_path):
    settings = save_published(trained, tmp_path / "weights.pth")
    header = run(tmp_path / "weights.pth", tmp_path / "out", *flags(tmp_path, settings))
    assert "step" not in header and "classes" not in header
    config = TokenBridge.from_pretrained(tmp_path / "out").config
    assert config.head_input == "published" and config.latent_scale == 0.2325


def test_a_vae_that_is_named_is_compared_and_noted(inputs, trained, tmp_path, capsys):
    """And to draw with another one is worth a warning."""
    torch.manual_seed(3)
    save_vae(tmp_path / "other.ckpt", AutoencoderKL(4, (1, 1, 1), ch=32, num_res_blocks=1))
    header = run(trained, tmp_path / "out", "--vae_path", str(tmp_path / "other.ckpt"))
    assert "trained with another VAE file (sha256 " in capsys.readouterr().err
    digest = hashlib.sha256((tmp_path / "other.ckpt").read_bytes()).hexdigest()
    assert header["vae_sha256"] == digest
    drawing = dict(vae_path=tmp_path / "other.ckpt", num_images=1, no_metrics=True)
    evaluate(inputs, tmp_path / "drawn", trained, **drawing)
    assert capsys.readouterr().err.count("trained with another VAE") == 1
    save_vae(tmp_path / "small.ckpt", AutoencoderKL(4, (1, 1), ch=32, num_res_blocks=1))
    small = ("--vae_path", str(tmp_path / "small.ckpt"))
    assert "VAE: (4, 2, None)" in complaint(run, trained, tmp_path / "no", *small)


def test_wrong_calls_and_folders_are_refused(inputs, trained, tmp_path, refusal):
    settings = save_published(trained, tmp_path / "weights.pth") | dict(buffer_size=5)
    for resume, others, said in (
        (tmp_path / "nothing", (), "does not exist"),
        ("auto", (), "name the folder"),
        (trained, ("--class_num", "7"), "class_num"),
        (tmp_path / "weights.pth", flags(tmp_path, settings), "do not match"),
    ):
        assert said in complaint(run, resume, tmp_path / "out", *others)
    assert not (tmp_path / "out").exists()
    run(trained, tmp_path / "model", "--eval_weights", "model")
    said = refusal("evaluate", inputs, resume=tmp_path / "model")
    assert "holds the model weights alone; pass --eval_weights model" in said
    (tmp_path / "model" / CONFIG).write_text("[]")
    assert "config.json" in refusal("evaluate", inputs, resume=tmp_path / "model")


def test_push_to_hub_puts_it_there(trained, tmp_path, capsys, monkeypatch):
    argv = ["--resume", str(trained), "--output_dir", str(tmp_path), "--push_to_hub", "me/digits"]
    with in_place_of_the_hub(monkeypatch) as hub:
        call(export.main, *argv)
        assert f"pushed to {hub.url}/me/digits" in capsys.readouterr().out
        assert hub.repos["me/digits"] == {p.name: p.read_bytes() for p in tmp_path.iterdir()}
        monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", mock.Mock(side_effect=OSError))
        assert "--push_to_hub me/digits: OSError" in refused(capsys, export.main, *argv)
