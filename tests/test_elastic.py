"""One to four processes train the same model.

Run as a script, this file is one of several processes: see `main`.
"""

import sys
from pathlib import Path

import pytest
import torch

from tests.runs import (
    TRAIN_FLAGS,
    flags,
    load,
    make_inputs,
    on_processes,
    tensors,
)
from tests.test_dist import one_step
from util import dist

MICRO_BATCHES = 4
WORLDS = (2, 3, 4)  # three processes share four micro-batches as 2, 1 and 1


def main(folder: Path) -> None:
    dist.init("cpu")
    found = one_step(MICRO_BATCHES)
    torch.save(found, folder / f"{dist.world_size()}-{dist.rank()}.pt")
    dist.cleanup()


@pytest.mark.parametrize("size", WORLDS)
def test_gradient_of_each_micro_batch_is_the_same_to_the_bit(tmp_path, size):
    command = ["-m", "tests.test_elastic", tmp_path]
    result = on_processes(size, *command)
    assert result.returncode == 0, result.stderr
    alone = one_step(MICRO_BATCHES)
    for rank in range(size):
        found = torch.load(tmp_path / f"{size}-{rank}.pt", weights_only=True)
        mine = range(rank, MICRO_BATCHES, size)
        assert sum(map(bool, alone["parts"].values())) > 50
        for name, gradients in alone["parts"].items():
            parts = found["parts"][name]
            assert len(parts) == len(gradients) // MICRO_BATCHES * len(mine)
            for part, j in zip(parts, mine, strict=False):  # some parameters have no part in a step
                assert torch.equal(part, gradients[j]), (name, j)
        for part, whole in zip(found["gradients"], alone["gradients"], strict=True):
            torch.testing.assert_close(part, whole, rtol=1e-5, atol=1e-7)  # the order of a sum


def test_run_begun_on_two_processes_goes_on_with_three(tmp_path):
    """Dropout on; what remains of the difference is the order of sums, which AdamW enlarges."""
    inputs = make_inputs(tmp_path / "inputs")
    settings = dict(batch_size=2, accum_iter=None, global_batch=8, save_last_freq=1, resume="auto")

    def go_on(name: str, size: int, epochs: int) -> dict:
        output = tmp_path / name
        argv = flags(inputs, TRAIN_FLAGS, settings, output_dir=output, epochs=epochs)
        argv += ["--lr_schedule", "constant"]  # so that two epochs are the beginning of four
        result = on_processes(size, "main_tokenbridge.py", *argv)
        assert result.returncode == 0, result.stderr
        return load(output)

    go_on("elastic", 2, epochs=1)
    found = go_on("elastic", 3, epochs=2)
    expected = go_on("alone", 1, epochs=2)
    assert (found["step"], found["schedule"]) == (expected["step"], expected["schedule"])
    found, expected = tensors(found["model"]), tensors(expected["model"])
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-4)


def test_processes_agree_where_a_save_by_steps_meets_the_end_of_an_epoch(tmp_path):
    """The main process alone knows of that save; what all do there must not depend on it."""
    inputs = make_inputs(tmp_path / "inputs")
    settings = dict(accum_iter=1, save_steps=3, save_last_freq=5, dist_timeout=20)  # 3 an epoch
    argv = flags(inputs, TRAIN_FLAGS, settings, output_dir=tmp_path / "out")
    result = on_processes(2, "main_tokenbridge.py", *argv)
    assert result.returncode == 0, result.stderr
    assert "saved checkpoint-step00000003.pth" in result.stdout


if __name__ == "__main__":
    main(Path(sys.argv[1]))
