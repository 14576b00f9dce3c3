"""Other heads through the scripts: training, resuming, drawing; MAR's folders and flags."""

import argparse
import shutil

import pytest
import torch

from models.tokenbridge import resized_positions
from models.tokenizers.vq import VQModel
from tests.runs import assert_same_training, call, evaluate, load, train, train_on, use
from util import export
from util.vae import save_vae

SMALL = {"diffusion": dict(diffloss_d=1, diffloss_w=32, num_sampling_steps=3)}
HEADS = pytest.mark.parametrize("head", ["parallel", "masked", "mixture", "diffusion"])
VALIDATED = dict(holdout=4, val_freq=1, preview_freq=1, preview_iter=2, preview_images=2)


@HEADS
def test_training_goes_on_is_shared_and_draws_the_same_in_any_batch(inputs, tmp_path, head):
    settings = dict(head=head, **SMALL.get(head, {}), **VALIDATED)
    whole = train(inputs, tmp_path / "whole", **settings, save_last_freq=1)
    assert whole["config"]["head"] == head
    assert (whole["config"]["quantizer"] is None) == (head in ("mixture", "diffusion"))
    (tmp_path / "parts").mkdir()
    (earlier,) = (path for path in (tmp_path / "whole").glob("*step*2.pth"))
    shutil.copy(earlier, tmp_path / "parts" / "checkpoint-last.pth")
    parts = train(inputs, tmp_path / "parts", **settings | dict(val_freq=0), resume="auto")
    assert_same_training(parts, whole)
    train_on(2, inputs, tmp_path / "two", **settings)
    two = load(tmp_path / "two")
    for name, tensor in whole["model"].items():
        torch.testing.assert_close(two["model"][name], tensor, rtol=1e-3, atol=1e-4)
    drawn = evaluate(inputs, tmp_path / "a", tmp_path / "whole", no_metrics=True)
    exported = tmp_path / "exported"
    call(export.main, "--resume", str(tmp_path / "whole"), "--output_dir", str(exported))
    assert drawn == evaluate(inputs, tmp_path / "b", exported, no_metrics=True, eval_bsz=3)
    assert len(drawn) == 12


def test_a_vq_tokenizer_is_cached_trained_on_and_drawn_with(inputs, tmp_path, refusal):
    torch.manual_seed(0)
    sizes = dict(codebook_size=16, embed_dim=4, z_channels=32, ch=32, ch_mult=(1, 1, 1))
    vae = VQModel(num_res_blocks=1, **sizes)
    path, cache = tmp_path / "vq.ckpt", tmp_path / "cache"
    save_vae(path, vae)
    use("cache", inputs, vae_path=path, cached_path=cache)
    asked = dict(head="codebook", cached_path=cache, vae_path=path, **VALIDATED)
    saved = train(inputs, tmp_path / "run", **asked)
    scale = saved["config"]["latent_scale"]
    assert torch.allclose(saved["model"]["codebook"], vae.codebook * scale)
    assert saved["config"]["codebook_size"] == 16
    how = dict(resume=tmp_path / "run", vae_path=path, no_metrics=True)
    drawn = evaluate(inputs, tmp_path / "a", **how)
    assert len(drawn) == 12 and drawn == evaluate(inputs, tmp_path / "b", **how, eval_bsz=3)
    assert drawn != evaluate(inputs, tmp_path / "c", **how, order="confidence")
    train(inputs, tmp_path / "images", **asked | dict(use_cached=False, data_path="data", epochs=1))
    for wrong in (dict(head="channel"), dict(vae_path="vae.ckpt", cached_path="cache")):
        assert "a VQ tokenizer belong together" in refusal("train", inputs, **asked | wrong)
    assert "entries of a codebook" in refusal("train", inputs, **asked, latent_norm="channel")
    save_vae(path, VQModel(num_res_blocks=1, **sizes | dict(codebook_size=9)))
    assert "VAE: (4, 4, 9), of the model: (4, 4, 16)" in refusal("evaluate", inputs, **how)


# --- MAR's commands


def test_a_folder_of_mar_draws_and_trains_on_without_decay_of_its_net(inputs, tmp_path):
    """As MAR's code leaves it: no settings but an argparse.Namespace."""
    mar_folder, asked = tmp_path / "mar", dict(head="diffusion", **SMALL["diffusion"])
    small = asked | dict(diffusion_batch_mul=2)
    saved = train(inputs, tmp_path / "begun", **small, lr_schedule="constant")
    keys = ("model", "model_ema", "optimizer", "epoch", "scaler")
    before = {key: saved[key] for key in keys} | {"args": argparse.Namespace(model="mar_base")}
    mar_folder.mkdir()
    torch.save(before, mar_folder / "checkpoint-last.pth")
    asked |= dict(model="tokenbridge_tiny", buffer_size=4, img_size=16, no_metrics=True)
    scale = dict(latent_scale=1.0, vae_embed_dim=4, vae_stride=4)
    assert len(evaluate(inputs, tmp_path / "a", mar_folder, **asked, **scale)) == 12
    shutil.copytree(mar_folder, tmp_path / "run")
    after = train(inputs, tmp_path / "run", **small | {"epochs": 3}, resume=tmp_path / "run")
    assert list(after["model"]) == list(before["model"]) and after["epoch"] == 2
    assert any(name.startswith("diffloss.net.") for name in after["model_ema"])
    assert "diffusion_pos_embed_learned" in after["model"]
    tuned = train(inputs, tmp_path / "tuned", **small | {"epochs": 1}, finetune=mar_folder)
    assert tuned["step"] == 3
    state = resized_positions(tuned["model"], 6)
    assert state["diffusion_pos_embed_learned"].shape[1] == 36

    plain, decayed = (group["params"] for group in before["optimizer"]["param_groups"])
    names = [name for name in before["model_ema"] if "diffloss" in name]
    small = [n for n, t in before["model_ema"].items() if t.ndim == 1 and "diffloss" not in n]
    assert len(plain) == len(names) + len(small)
    assert len(plain) + len(decayed) == len(before["model_ema"])


def test_flags_that_a_head_does_not_have_are_refused_in_one_line(inputs, trained, refusal):
    """What a model refuses of its settings: test_heads.py."""
    for head, wrong, said in (
        ("diffusion", dict(quant_bits=4), "--quant_bits"),
        ("mixture", dict(head_input="published"), "--head_input"),
        ("mixture", dict(channel_order="0,1,2,3"), "--channel_order"),
        ("masked", dict(head_steps=5), "head_steps 5 is more than 4"),
        ("mixture", dict(order="confidence"), "--order confidence needs probabilities"),
        ("codebook", dict(dry_run=True, use_cached=False, cached_path=None), "needs --vae_path"),
    ):
        assert said in refusal("train", inputs, head=head, **wrong), head
    line = refusal("train", inputs, head="mixture", resume=trained)
    assert "has head channel, but the flags say mixture" in line
    wrong = dict(resume=trained, num_sampling_steps=10)
    assert "num_sampling_steps 10" in refusal("evaluate", inputs, **wrong)
