"""Which micro-batches make a step, and with which step a run begins."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch

import main_tokenbridge
from models.tokenbridge import CLASS_ROWS
from tests.conftest import complaint, tiny_model
from util import dist
from util.checkpoint import Checkpoint
from util.data.batches import Batches, plan_batches
from util.setup import build_config

IMAGES = 100


def arguments(**given) -> Namespace:
    defaults = dict.fromkeys(("accum_iter", "global_batch", "seed", "posthoc_ema"))
    return Namespace(**defaults | dict(batch_size=4, start_epoch=0) | given)


def checkpoint() -> Checkpoint:
    schedule = dict(batch_size=4, micro_batches=6, images=IMAGES, seed=7)
    return Checkpoint(Path("x.pth"), {"optimizer": {}, "step": 30, "schedule": schedule})


@pytest.fixture
def world(monkeypatch):
    return lambda size: monkeypatch.setattr(dist, "world_size", lambda: size)


def test_global_batch_is_that_of_the_flags_or_of_a_resumed_run_on_any_processes(world):
    for given, processes, micro_batches in (
        ({}, 3, 3),
        (dict(accum_iter=2), 3, 6),
        (dict(global_batch=48), 4, 12),
        (dict(global_batch=48), 5, 12),  # three of them, or two
        (dict(global_batch=48, accum_iter=3), 4, 12),
    ):
        world(processes)
        expected = Batches(4, micro_batches, IMAGES, 1)
        assert plan_batches(arguments(**given), Checkpoint(), IMAGES) == (expected, 0, [])
    for processes in (1, 2, 4, 6):
        world(processes)
        found = plan_batches(arguments(batch_size=None), checkpoint(), IMAGES)
        assert found == (Batches(4, 6, IMAGES, 7), 30, [])


def test_other_batches_go_on_at_the_same_epoch_and_a_published_file_at_its_next():
    batches, first, (note,) = plan_batches(arguments(global_batch=8, seed=9), checkpoint(), IMAGES)
    assert batches.steps_per_epoch == 12  # were 4
    assert first == 90
    assert "micro_batches 2 (was 6), seed 9 (was 7)" in note and "epoch, 7.50" in note

    published = Checkpoint(Path("x.pth"), {"optimizer": {}, "epoch": 4})
    assert plan_batches(arguments(), published, IMAGES)[1] == 5 * 25
    weights = Checkpoint(Path("x.pth"), {"model": {}})
    assert plan_batches(arguments(start_epoch=2), weights, IMAGES)[1] == 2 * 25


def test_what_does_not_fit_is_refused(world):
    for given, resumed, processes, fragment in (
        (dict(global_batch=50), None, 1, "--global_batch 50 is not a multiple of --batch_size 4"),
        (dict(global_batch=8), None, 3, "3 processes cannot share the 2 micro-batches"),
        (dict(global_batch=8, accum_iter=2), None, 2, "leave --accum_iter out"),
        ({}, checkpoint(), 7, "7 processes cannot share the 6"),
        (dict(batch_size=101), None, 1, "100 samples do not fill"),
    ):
        world(processes)
        before = resumed or Checkpoint()
        assert fragment in complaint(plan_batches, arguments(**given), before, IMAGES)


def test_another_distribution_of_masks_brings_its_own_minimum():
    state, config = {CLASS_ROWS: torch.zeros(3, 8)}, tiny_model().config
    kept = Checkpoint(Path("x.pth"), {"model": state, "config": config.to_dict()})
    parse = main_tokenbridge.make_parser().parse
    assert build_config(parse([]), kept).mask_ratio_min == 0.7
    assert build_config(parse(["--mask_distribution", "exp"]), kept).mask_ratio_min == 0.2
    given = ["--mask_distribution", "exp", "--mask_ratio_min", "0.5"]
    assert build_config(parse(given), kept).mask_ratio_min == 0.5
