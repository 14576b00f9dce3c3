"""Processes find their place, and together they compute what one computes alone.

Run as a script, this file is one of two processes: see `main`.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import HashStore

from tests.conftest import complaint
from tests.runs import fork_together, free_port, ranks
from util import dist, stop
from util.dist import run
from util.errors import EXIT_STOPPED, EXIT_USER_ERROR, UserError
from util.evaluation import extractor
from util.setup import check_agreement


def main(folder: Path) -> None:
    """Of two processes the second has the weights of Inception."""
    dist.init("cpu")
    rank = dist.rank()
    os.environ["TORCH_HOME"] = str(folder / f"home{rank}")
    if rank == 1:
        weights = extractor.published_weights()
        weights.parent.mkdir(parents=True)
        torch.save({}, weights)
    found = extractor.load_extractor(extractor.INCEPTION, None, torch.device("cpu"))
    print(found, dist.all_reduce_sum(torch.tensor(rank + 1.0)).item(), dist.gather_objects(rank))
    dist.cleanup()


def test_two_processes_sum_gather_print_once_and_use_no_weights_that_one_lacks(tmp_path):
    """Both are on one node: the first tries the download."""
    results = fork_together(*[["-m", "tests.test_dist", tmp_path]] * 2, env=ranks(2))
    assert [code for code, _, _ in results] == [0, 0], results
    first, second = (stdout.splitlines() for _, stdout, _ in results)
    assert first[0] == "2 processes (torchrun), backend gloo" and "Downloading" in first[1]
    assert "no Inception weights" in first[2] and second == first[3:] == ["None 3.0 [0, 1]"]


TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
SBATCH = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "9"}
SLURM = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "2"}
OPEN_MPI = {f"OMPI_COMM_WORLD_{k}": v for k, v in TORCHRUN.items() if k != "WORLD_SIZE"}
OPEN_MPI["OMPI_COMM_WORLD_SIZE"] = "8"


@pytest.fixture
def environment(monkeypatch):
    """Set these variables, and none of any launcher's else."""

    def set_only(variables: dict[str, str]) -> None:
        for name in list(os.environ):
            if name.startswith(("SLURM_", "OMPI_", "MASTER_")) or name in TORCHRUN:
                monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_only


def test_place_is_what_the_launcher_says(environment):
    for variables, itp, expected in (
        ({}, False, (0, 1, 0, "one process")),
        (TORCHRUN, False, (3, 8, 1, "torchrun")),
        (SLURM, False, (5, 8, 2, "Slurm")),
        (SLURM | TORCHRUN, False, (3, 8, 1, "torchrun")),
        (SBATCH, False, (0, 1, 0, "one process")),
        (OPEN_MPI, True, (3, 8, 1, "Open MPI (--dist_on_itp)")),
        (OPEN_MPI, False, (0, 1, 0, "one process")),
    ):
        environment(variables)
        world = dist.detect_world(itp)
        assert (world.rank, world.size, world.local_rank, world.launcher) == expected


def test_the_first_host_of_a_slurm_job_serves_the_meeting(environment):
    for nodes, host in (
        ("gpu7", "gpu7"),
        ("rack[0-1]node[08-15,17],other", "rack0node08"),
        ("a-1,b-2", "a-1"),
    ):
        environment(SLURM | {"SLURM_STEP_NODELIST": nodes, "SLURM_JOB_ID": "20007"})
        assert dist._address("env://", dist.detect_world()) == (host, 20007)


def test_what_cannot_start_says_why(environment):
    for variables, arguments, fragment in (
        ({}, {"dist_on_itp": True}, "OMPI_COMM_WORLD_RANK=None"),
        (SLURM | {"SLURM_LOCALID": "x"}, {}, "SLURM_LOCALID='x'"),
        (TORCHRUN, {}, "--dist_url env://: set MASTER_ADDR and MASTER_PORT"),
        (TORCHRUN | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"}, {}, "env://: invalid"),
        (TORCHRUN, {"dist_url": "tcp://127.0.0.1"}, "tcp://127.0.0.1: set MASTER_ADDR"),
        ({}, {"device": "tpu"}, "--device 'tpu'"),
    ):
        environment(variables)
        assert fragment in complaint(dist.init, **{"device": "cpu"} | arguments)


def test_one_of_an_allocation_and_a_missing_device_are_said(environment, capsys, monkeypatch):
    environment(SBATCH)
    dist.init("cpu")
    assert "allocation of 8 tasks but not started by srun: one process" in capsys.readouterr().err
    environment(SBATCH | TORCHRUN | {"WORLD_SIZE": "1", "RANK": "0"})
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    assert dist.init("cuda") == torch.device("cpu")
    assert capsys.readouterr().err == "no cuda device here: running on cpu\n"


def test_who_waits_says_for_whom_until_a_signal_or_the_end_of_process_0(
    environment, monkeypatch, capfd
):
    port = free_port()
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "3"}
    monkeypatch.setattr(dist, "FIRST_WORD", 0.05)
    monkeypatch.setattr(dist, "NEXT_WORD", 0.05)

    def start(rank: int, words: str, url: str = "env://") -> multiprocessing.Process:
        """A process of which it is said for whom it waits."""
        environment(meeting | {"RANK": str(rank), "LOCAL_RANK": "0"})
        context, said = multiprocessing.get_context("fork"), ""
        process = context.Process(target=lambda: run(lambda: dist.init("cpu", url)))
        process.start()
        while process.is_alive() and f"waiting for {words} at 127.0.0.1:{port} for" not in said:
            said += capfd.readouterr().err
            time.sleep(0.02)
        assert process.is_alive(), said
        return process

    both = "2 of 3 processes (rank 1, 2)"
    for rank, *words in ((1, "process 0 of 3"), (0, both, f"tcp://127.0.0.1:{port}")):
        process = start(rank, *words)
        os.kill(process.pid, stop.SIGNALS[rank])
        process.join(10)
        assert process.exitcode == EXIT_STOPPED
    first, second = start(0, both), start(1, "1 of 3 processes (rank 2)")
    first.kill()
    second.join(20)
    assert second.exitcode == EXIT_USER_ERROR
    assert f"cannot meet process 0 at 127.0.0.1:{port}" in capfd.readouterr().err


def test_torchrun_s_signal_does_not_hide_why_a_process_ends(monkeypatch, capfd):
    monkeypatch.setattr(stop._state, "received", None)  # and again when the test ends
    monkeypatch.setattr(dist, "_announce_end", lambda why: os.kill(os.getpid(), signal.SIGTERM))

    def main():
        raise UserError("--size 0")

    with pytest.raises(SystemExit) as end:
        run(main)
    assert end.value.code == EXIT_USER_ERROR
    assert capfd.readouterr().err.endswith("error: --size 0\n")


def test_processes_that_found_different_things_are_all_refused(monkeypatch):
    """As when a node sees another output folder: every process stops, none trains alone."""
    facts = [{"first epoch": 2, "classes": ["a"]}, {"classes": ["a"]}]
    monkeypatch.setattr(dist, "gather_objects", lambda own: facts)
    for own in facts:
        with pytest.raises(UserError, match="process [01] and process [01] .*: first epoch;"):
            check_agreement(own)
    monkeypatch.setattr(dist, "gather_objects", lambda own: [own, own])
    check_agreement(facts[0])


# --- who has died, and who holds everybody up


NAMES = ["process 0 (a)", "process 1 (b)", "process 2 (c)"]


@pytest.fixture
def now(monkeypatch):
    """A clock that the test moves."""
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(stop, "INTERVAL", 0)
    return clock


def new_dogs(end=lambda rank, why: None) -> list[stop.Watchdog]:
    store = HashStore()  # what TCPStore does, in one process
    ends = [lambda why, rank=rank: end(rank, why) for rank in range(3)]
    return [stop.Watchdog(store, rank, NAMES, 80.0, ends[rank]) for rank in range(3)]


def exchange(dogs: list[stop.Watchdog]) -> None:
    for dog in (*dogs, *dogs):  # twice: the first has asked before the others wrote
        dog._exchange(dog.others)


def beat(dogs: list[stop.Watchdog], doing: str) -> None:
    for dog in dogs:
        dog.beat(doing)


def test_process_without_a_sign_of_life_has_died_and_the_main_one_without_its_store(now):
    dogs = new_dogs()
    exchange(dogs)
    exchange(dogs[:2])  # who have read the third's last sign now
    now[0] += 59
    exchange(dogs[:2])
    assert dogs[0].find_lost() == ""
    now[0] += 2
    exchange(dogs[:2])
    assert dogs[0].find_lost().startswith("process 2 (c) has died: no sign of life for 61 s")
    dogs[1].store = None
    dogs[1]._exchange([])
    assert dogs[1].find_lost().startswith("process 0 (a) has died")


def test_process_that_said_why_it_ends_is_quoted_and_one_that_finished_not_missed(now):
    dogs = new_dogs()
    dogs[1].announce_end("stopped with an error: no such file")
    dogs[1].announce_end("again")  # the first reason counts
    exchange(dogs[:1])
    assert dogs[0].find_lost() == "process 1 (b) stopped with an error: no such file"
    dogs = new_dogs()
    for dog in dogs[1:]:
        dog.announce_end(stop.FINISHED)
    now[0] += 1000
    exchange(dogs[:1])
    assert dogs[0].find_lost() == ""


def test_who_is_behind_is_named_when_nobody_makes_progress(now):
    dogs = new_dogs()
    beat(dogs, "step 1: forward")
    beat([dogs[0], dogs[2]], "step 1: backward")
    exchange(dogs)
    now[0] += 79
    exchange(dogs)
    assert dogs[0].find_lost() == ""
    now[0] += 2
    for dog in dogs:
        exchange(dogs)
        line = dog.find_lost()
        assert "no progress for 81 s" in line and "--dist_timeout" in line
        assert line.endswith("waiting for process 1 (b) (step 1: forward)")


def test_slow_start_and_one_that_works_on_are_no_hang(now):
    """An evaluation ends when its slowest process has drawn its last batch."""
    dogs = new_dogs()
    dogs[0].beat("step 1")
    now[0] += 1000
    exchange(dogs)
    assert dogs[0].find_lost() == ""
    beat(dogs, "batch 1")
    for _ in range(10):
        now[0] += 70
        dogs[1].beat("batch")
        exchange(dogs)
        assert [dog.find_lost() for dog in dogs] == [""] * 3


def test_main_process_lets_the_others_read_who_is_lost_before_its_store_ends(monkeypatch):
    """Each thread ends its process with the reason."""
    ended = []
    monkeypatch.setattr(stop, "INTERVAL", 0.1)

    def end(rank: int, why: str) -> None:
        ended.append((rank, why))
        if rank == 0:  # and its store with it
            dogs[0].store = dogs[1].store = None

    dogs = new_dogs(end)
    for dog in dogs[:2]:
        dog.start()
    dogs[2].announce_end("was stopped by SIGKILL")
    for dog in dogs[:2]:
        dog.join(10)
    assert sorted(ended) == [(r, "process 2 (c) was stopped by SIGKILL") for r in (0, 1)]


def test_a_process_ends_after_its_watchdog_has_left_the_store(monkeypatch):
    """Else Python may end while the thread is in the store's C++: "terminate called"."""
    monkeypatch.setattr(stop, "INTERVAL", 0.01)
    dog, entered = new_dogs()[0], threading.Event()

    def multi_get(keys: list[str]) -> list[bytes]:
        entered.set()
        time.sleep(0.3)
        return store.multi_get(keys)

    store, dog.store = dog.store, SimpleNamespace(set=dog.store.set, multi_get=multi_get)
    dog.start()
    assert entered.wait(10)
    dog.announce_end(stop.FINISHED)
    assert not dog.is_alive()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
