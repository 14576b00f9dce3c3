"""Checkpoints travel between this project and the published code, and no save is ever half done."""

import sys
from argparse import Namespace
from collections import defaultdict
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from engine_tokenbridge import training_state
from models.tokenbridge import TokenBridge
from models.tokenizers.kl16 import AutoencoderKL
from tests import runs
from tests.conftest import complaint, new_run
from tests.measures import random_model
from util.checkpoint import LAST, load_checkpoint
from util.errors import UserError
from util.optim import EMA, build_optimizer
from util.saver import write_checkpoint
from util.vae import load_vae


def published_optimizer(model: TokenBridge) -> torch.optim.AdamW:
    """As the published code builds it: parameters in its own order, 1-D ones and biases first."""
    layout = model.published_state_dict()
    named = dict(model.published_parameters())
    named = [(name, named[name]) for name in layout if name in named]
    plain = [p for name, p in named if p.ndim == 1 or name.endswith(".bias")]
    decayed = [p for name, p in named if not (p.ndim == 1 or name.endswith(".bias"))]
    groups = [{"params": plain, "weight_decay": 0.0}, {"params": decayed}]
    return torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.02)


def step_twice(model: TokenBridge, optimizer: torch.optim.Optimizer) -> None:
    """On random gradients."""
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter) * 1e-3
        optimizer.step()


def published_checkpoint(path: Path) -> tuple[TokenBridge, torch.optim.AdamW]:
    """Write what the published code leaves after its second epoch, a Namespace in it."""
    model = random_model()
    optimizer = published_optimizer(model)
    step_twice(model, optimizer)
    ema = {name: p.detach() * 0.99 for name, p in model.published_parameters()}
    saved = {
        "model": model.published_state_dict(),
        "model_ema": ema,
        "optimizer": optimizer.state_dict(),
        "epoch": 1,
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
        "args": Namespace(model="tokenbridge_tiny", lr=1e-4, resume="", gpu=0, distributed=True),
    }
    torch.save(saved, path)
    return model, optimizer


def moments(optimizer: torch.optim.Optimizer, model: TokenBridge) -> dict[str, torch.Tensor]:
    """Every parameter's moments and step count, by its published name."""
    state = {name: optimizer.state[p] for name, p in model.published_parameters()}
    return runs.tensors(state)


# --- from the published code to here


def write(folder: Path, model: TokenBridge) -> dict:
    """Save as training does, after two steps; the file's content."""
    run = new_run(model, 0.5)
    step_twice(model, run.optimizer)
    run.ema.update()
    write_checkpoint(folder / LAST, training_state(run, 2))
    return runs.load(folder) | {"moments": moments(run.optimizer, model)}


def test_published_file_goes_on_training_at_its_next_epoch(inputs, tmp_path, capsys):
    """In fp16 the scaler must meet an optimizer with the settings of this run, not the file's."""
    published_checkpoint(tmp_path / "published.pth")
    resume = tmp_path / "published.pth"
    settings = dict(resume=resume, epochs=3, log_freq=1, weight_decay=0.5, precision="fp16")
    found = runs.train(inputs, tmp_path / "out", **settings)
    lines = [line for line in capsys.readouterr().out.splitlines() if "  step " in line]
    assert len(lines) == 3 and "step 7/9" in lines[0]
    assert found["epoch"] == 2 and found["config"]["head_input"] == "published"
    assert found["optimizer"]["param_groups"][1]["weight_decay"] == 0.5
    assert {s["step"].item() for s in found["optimizer"]["state"].values()} == {5.0}


def test_moments_of_a_published_file_reach_their_parameters_and_ours_its_optimizer(tmp_path):
    published, optimizer = published_checkpoint(tmp_path / "published.pth")
    checkpoint = load_checkpoint(tmp_path / "published.pth")
    model = random_model()
    ema = EMA(model.published_parameters(), 0.9)
    own = build_optimizer(model.published_parameters(), 1e-3, 0.05)
    checkpoint.load_into(model, "model")
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    checkpoint.load_training_state({"0.9": ema}, own, scaler)
    assert checkpoint.whole_number("epoch") == 1
    found, expected = moments(own, model), moments(optimizer, published)
    assert len(found) == 3 * len(list(model.parameters())) and set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert [g["weight_decay"] for g in own.param_groups] == [0.0, 0.05]
    for name, parameter in model.published_parameters():
        assert torch.equal(ema.state_dict()[name], parameter * 0.99)

    saved = write(tmp_path, model)  # from here to the published code
    assert {"model", "model_ema", "optimizer", "epoch", "scaler"} < set(saved)  # and args
    other = TokenBridge(**saved["config"])
    other.load_published(saved["model"])
    assert type(saved["epoch"]) is int
    assert list(saved["model"]) == list(other.published_state_dict())
    assert list(saved["model_ema"]) == [name for name, _ in other.published_parameters()]
    optimizer = published_optimizer(other)
    optimizer.load_state_dict(saved["optimizer"])
    found = moments(optimizer, other)
    assert all(torch.equal(found[name], saved["moments"][name]) for name in saved["moments"])
    torch.amp.GradScaler("cpu").load_state_dict(saved["scaler"])  # refuses an empty state


# --- what is refused


def test_what_does_not_match_is_named_and_nothing_is_trained(inputs, tmp_path):
    """Of step and schedule: test_setup.py."""
    path = tmp_path / "spoiled.pth"
    for spoil, fragment in (
        (lambda s: s.pop("model"), "'model'"),
        (lambda s: s.pop("model_ema"), "'model_ema'"),
        (lambda s: s["model_ema"].pop("z_proj.bias"), "z_proj.bias"),
        (lambda s: s["model"].pop("mask_token"), "mask_token"),
        (lambda s: s["model"]["mask_token"].fill_(torch.nan), "mask_token is not finite"),
        (lambda s: s["model_ema"].update({"z_proj.bias": torch.ones(1)}), "z_proj.bias is (1,)"),
        (lambda s: s["model"].update(z_proj=1), "'model'"),
        (lambda s: s["optimizer"]["param_groups"].pop(), "another model"),
        (lambda s: s["optimizer"]["state"][5].update(exp_avg=torch.ones(1)), "parameter 5"),
        (lambda s: s.update(optimizer=3), "'optimizer'"),
        (lambda s: (s.pop("schedule"), s.update(epoch="two")), "'epoch' is 'two'"),
        (lambda s: s.update(config=[1]), "spoiled.pth"),
        (lambda s: s["config"].update(wings=2), "wings"),
    ):
        spoil(saved := write(tmp_path / "out", random_model()))
        torch.save(saved, path)
        message = complaint(runs.train, inputs, tmp_path / "new", resume=path)
        assert message.startswith(f"--resume {path}") and fragment in message
        assert not (tmp_path / "new").exists()


# --- what others put into files


class ModelCheckpoint(dict):
    """As Lightning has among its callbacks; the module that it says it is of is not there."""

    __module__ = "pytorch_lightning"


def beside() -> dict:
    """Plain values that are not of Python's own."""
    return {
        **dict(loss=np.float64(1.5), step=np.int64(3), rng=np.arange(3, dtype=np.uint32)),
        **dict(path=Path("/data"), device=torch.device("cuda:0")),
        **dict(args=Namespace(path=Path("x"), scale=np.float32(2)), counts=defaultdict(int, a=1)),
    }


def lightning_vae(vae: AutoencoderKL) -> dict:
    """As a training of latent diffusion saves it, by DistributedDataParallel and torch.compile."""
    state = {f"first_stage_model.{name}": t for name, t in vae.state_dict().items()}
    state = {f"module.{k}" if i % 2 else f"_orig_mod.{k}": state[k] for i, k in enumerate(state)}
    state |= {"loss.logvar": torch.zeros(()), "model.diffusion_model.w": torch.zeros(3)}
    callbacks = {ModelCheckpoint: ModelCheckpoint(best=np.float64(1))}
    return {"state_dict": state, "callbacks": callbacks, "config": "x.yaml", **beside()}


@pytest.mark.parametrize("form", ["lightning", "bare", "safetensors"])
def test_vaes_of_other_trainers_are_read(inputs, tmp_path, capsys, form):
    """What is left out is said."""
    vae, path = load_vae(inputs / "vae.ckpt"), tmp_path / "vae.safetensors"
    if form == "safetensors":
        save_file(vae.state_dict(), path)
    else:
        path, lightning = tmp_path / "vae.pt", ModuleType(ModelCheckpoint.__module__)
        lightning.ModelCheckpoint = ModelCheckpoint
        with mock.patch.dict(sys.modules, {lightning.__name__: lightning}):
            torch.save(vae.state_dict() if form == "bare" else lightning_vae(vae), path)
    runs.use("cache", inputs, vae_path=path, cached_path=tmp_path / "new")
    assert (f"{path}: passed over loss." in capsys.readouterr().out) == (form == "lightning")
    for shard in (tmp_path / "new").glob("shard-*.npy"):
        assert shard.read_bytes() == (inputs / "cache" / shard.name).read_bytes()


def test_names_of_wrapped_models_and_plain_values_change_nothing(inputs, trained, tmp_path, capsys):
    content = runs.load(trained)
    for key, prefix in (("model", "module."), ("model_ema", "_orig_mod.module.")):
        content[key] = {f"{prefix}{name}": tensor for name, tensor in content[key].items()}
    torch.save(content | {"step": np.int64(6), "more": beside()}, tmp_path / "wrapped.pth")
    found = runs.train(inputs, tmp_path / "out", resume=tmp_path / "wrapped.pth", epochs=3)
    assert "'model_ema': without module. and _orig_mod. in" in capsys.readouterr().out
    expected = runs.train(inputs, tmp_path / "other", resume=trained, epochs=3)
    runs.assert_same_training(found, expected)


def test_a_bare_state_dict_is_the_raw_weights(inputs, trained, tmp_path):
    content, path = runs.load(trained), tmp_path / "bare.pth"
    torch.save({"state_dict": content["model"]}, path)
    wrapped = load_checkpoint(path).weights("model")
    torch.save(content["model"], path)
    assert wrapped.keys() == load_checkpoint(path).weights("model").keys()
    order = ",".join(map(str, content["config"]["channel_order"]))
    raw = dict(eval_weights="model", no_metrics=True)
    same = dict(channel_order=order, latent_scale=content["config"]["latent_scale"])
    same |= runs.save_published(trained, tmp_path / "published.pth") | raw
    found = runs.evaluate(inputs, tmp_path / "a", path, head_input="trained", **same)
    named = runs.evaluate(inputs, tmp_path / "b", trained, **raw)  # by classes, which it lacks
    assert list(found.values()) == list(named.values())
    default = runs.evaluate(inputs, tmp_path / "c", path, **same)  # the published way
    assert default != found and list(default) == list(found)
    with pytest.raises(UserError, match="pass --eval_weights model"):
        runs.evaluate(inputs, tmp_path / "d", path, **same | {"eval_weights": "ema"})
