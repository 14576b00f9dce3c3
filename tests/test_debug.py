"""A step that went wrong is kept, and replayed with the numbers it had."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import main_tokenbridge
from tests.conftest import tiny_model
from tests.runs import (
    CLASSES,
    IMAGES,
    TRAIN_FLAGS,
    call,
    flags,
    on_processes,
    refused,
)
from util.debug import gradient_norms, module_of


def test_modules_are_blocks_and_what_is_in_none():
    names = {
        "backbone.encoder_blocks.3.attn.qkv.weight": "backbone.encoder_blocks.3",
        "backbone.z_proj.bias": "backbone.z_proj",
        "head.channel_heads.12.weight": "head.channel_heads.12",
        "head.channel_embed": "head.channel_embed",
    }
    assert {name: module_of(name) for name in names} == names


def test_gradient_norms_by_module_make_up_the_whole():
    model = tiny_model()
    model(torch.randn(2, 6, 4, 4), torch.tensor([0, 1])).backward()
    norms = gradient_norms(model)
    whole = torch.nn.utils.get_total_norm(
        [p.grad for p in model.parameters() if p.grad is not None]
    )
    assert sum(norm**2 for norm in norms.values()) ** 0.5 == pytest.approx(whole.item(), rel=1e-5)
    expected = model.backbone.z_proj.weight.grad.norm() ** 2
    expected += model.backbone.z_proj.bias.grad.norm() ** 2
    assert norms["backbone.z_proj"] == pytest.approx(expected.item() ** 0.5, rel=1e-5)


def broken_weights(inputs: Path, output: Path, **changes) -> list[str]:
    settings = dict(output_dir=output, blr=1e30, grad_clip=1e30, max_skipped=2)
    return flags(inputs, TRAIN_FLAGS, **settings | changes)


def losses(printed: str) -> list[str]:
    return re.findall("loss by channel  (.*)", printed)


def test_too_many_skipped_steps_leave_a_dump_that_replays(inputs, tmp_path, capsys):
    line = refused(capsys, main_tokenbridge.main, *broken_weights(inputs, tmp_path / "out"))
    dump = tmp_path / "out" / "debug-step00000004.pth"
    assert str(dump) in line
    saved = torch.load(dump, weights_only=True)
    assert saved["step"] == 3 and [r["micro_batch"] for r in saved["micro_batches"]] == [0, 1]
    first = saved["micro_batches"][0]
    assert len(first["keys"]) == 4 and first["loss_by_channel"].shape == (4,)
    assert "backbone.encoder_blocks.0" in first["gradient_norms"]
    call(main_tokenbridge.main, "--debug_dump", str(dump), "--device", "cpu")
    printed = capsys.readouterr().out
    assert "first output that is not finite: " in printed and printed.endswith("reproduced\n")
    assert len(losses(printed)) == 2 and "nan" in losses(printed)[0]


def test_dump_names_the_samples_that_are_not_finite(inputs, tmp_path, capsys):
    """In a published cache, without checksums; the loss does not tell, as levels are finite."""
    cache, broken = tmp_path / "cache", np.full((8, 4, 4), np.inf, np.float32)
    for name in CLASSES:
        (cache / name).mkdir(parents=True)
        for i in range(IMAGES):
            np.savez(cache / name / f"{i}.png.npz", moments=broken, moments_flip=broken)
    argv = broken_weights(inputs, tmp_path / "out", blr=1e-4, cached_path=cache, max_skipped=3)
    argv += ["--latent_scale", "1", "--channel_order", "0,1,2,3"]
    argv += ["--vae_embed_dim", "4", "--vae_stride", "4"]
    line = refused(capsys, main_tokenbridge.main, *argv)
    dump = tmp_path / "out" / "debug-step00000003.pth"
    assert str(dump) in line
    call(main_tokenbridge.main, "--debug_dump", str(dump), "--device", "cpu")
    printed = capsys.readouterr().out
    assert printed.count("its latents are not finite") == 2 and "reproduced" in printed


def test_two_processes_skip_together_and_dump_all_micro_batches(inputs, tmp_path):
    argv = broken_weights(inputs, tmp_path / "out", accum_iter=1)
    result = on_processes(2, "main_tokenbridge.py", *argv)
    assert result.stderr.count("2 steps in a row was not finite") >= 1, result.stderr
    saved = torch.load(tmp_path / "out" / "debug-step00000004.pth", weights_only=True)
    assert [r["micro_batch"] for r in saved["micro_batches"]] == [0, 1]


def test_damaged_dump_is_refused(tmp_path, capsys):
    torch.save({"config": {}}, tmp_path / "dump.pth")
    line = refused(
        capsys, main_tokenbridge.main, "--debug_dump", str(tmp_path / "dump.pth"), "--device", "cpu"
    )
    assert f"--debug_dump {tmp_path / 'dump.pth'}" in line
