"""The loader benchmark compares like with like and says what it was run on."""

import json

import torch

from benchmarks import loaders
from tests.runs import call


def test_both_caches_hold_the_same_posteriors_of_the_published_size(tmp_path):
    npy, npz = (loaders.make_cache(tmp_path / form, form, 6) for form in ("npy", "npz"))
    assert npy.latent_shape == npz.latent_shape == (16, 16, 16)
    for key in ((0, False), (5, True)):
        assert npy[key][0].dtype == torch.float16 and npz[key][0].dtype == torch.float32
        assert torch.equal(npy[key][0], npz[key][0].half())


def test_figures_are_printed_and_kept(tmp_path, capsys):
    flags = ["--images", "16", "--batch_size", "4", "--batches", "3", "--repeats", "3"]
    call(loaders.main, *flags, "--json", str(tmp_path / "loaders.json"))
    found = json.loads((tmp_path / "loaders.json").read_text())
    assert found["settings"]["workers"] == 1 and found["settings"]["batch_size"] == 4
    for form in ("npy", "npz"):
        speeds = found["samples_per_second"][form]
        assert len(speeds) == 3 and found["median"][form] == sorted(speeds)[1] > 0
    assert found["ratio"] == found["median"]["npy"] / found["median"]["npz"]
    assert f"npy / npz: {found['ratio']:.2f}" in capsys.readouterr().out
    assert found["machine"]["torch"] == torch.__version__
