"""Processes: how they find each other, and the few things they say to each other.

The only file that imports torch.distributed. Every helper works in a world of one, so nobody
else asks whether a run is distributed. Launchers: none, torchrun, Slurm, Open MPI (ITP).
"""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from util import stop
from util.device import resolve_device
from util.errors import (
    EXIT_LOST_PEER,
    EXIT_STOPPED,
    EXIT_USER_ERROR,
    UserError,
    as_user_error,
    program,
)
from util.watchdog import FINISHED, Watchdog

# Ranks wait for each other's last batch of an evaluation or shard of a cache, on a CPU for long.
# That somebody hangs is for the watchdog to see, which knows who makes progress.
TIMEOUT = timedelta(hours=3)
ATTEMPT = "TORCHELASTIC_RESTART_COUNT"  # torchrun counts the restarts of --max-restarts in it
NO_PROGRESS = 600.0  # seconds; the default of --dist_timeout
# Seconds of waiting for processes that have not come yet: to the first line, and between two more.
FIRST_WORD, NEXT_WORD = 30.0, 60.0
# What the backends say on a process whose peer has left.
LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "remote process exited")
_watchdog: Watchdog | None = None  # of this process, if there are others
_finishers: list[Callable[[], None]] = []


@dataclass(frozen=True)
class World:
    """This process among all: rank in [0, size), local_rank on its own node."""

    rank: int
    size: int
    local_rank: int
    launcher: str


def _world(launcher: str, *names: str) -> World:
    """names: the variables that hold rank, size and local rank."""
    try:
        return World(*(int(os.environ[name]) for name in names), launcher=launcher)
    except (KeyError, ValueError) as error:
        values = ", ".join(f"{name}={os.environ.get(name)!r}" for name in names)
        raise UserError(f"{launcher}: cannot read the process's place from {values}") from error


def detect_world(dist_on_itp: bool = False) -> World:
    """Where this process stands, from what its launcher put into the environment."""
    if dist_on_itp:
        names = (f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK"))
        return _world("Open MPI (--dist_on_itp)", *names)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        os.environ.setdefault("LOCAL_RANK", "0")
        return _world("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK")
    # Of a step only srun tells the number of tasks; the script of sbatch has all other variables.
    if os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        return _world("Slurm", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    return World(rank=0, size=1, local_rank=0, launcher="one process")


def _say_that_slurm_is_not_used(world: World) -> None:
    tasks = os.environ.get("SLURM_NTASKS", "1")
    if world.launcher == "one process" and tasks != "1" and "SLURM_STEP_ID" not in os.environ:
        print(
            f"inside a Slurm allocation of {tasks} tasks but not started by srun: one process "
            "(`srun python ...` starts one for each task)",
            file=sys.stderr,
            flush=True,
        )


def _slurm_master() -> str:
    """The first host of the Slurm job."""
    nodes = os.environ.get("SLURM_STEP_NODELIST", os.environ.get("SLURM_NODELIST", "127.0.0.1"))
    if not any(mark in nodes for mark in "[,"):
        return nodes
    try:
        listed = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"cannot read SLURM_NODELIST {nodes!r}; set MASTER_ADDR") from error
    return listed.stdout.split()[0]


def init(
    device: str = "cuda",
    dist_url: str = "env://",
    dist_on_itp: bool = False,
    timeout: float = NO_PROGRESS,
) -> torch.device:
    """Join the other processes, if there are any, and return this process's device.

    device: what the user asked for; if the machine lacks it, what it has is used, and said.
    timeout: seconds without progress of any process after which all stop.
    """
    world = detect_world(dist_on_itp)
    _say_that_slurm_is_not_used(world)
    local_rank = world.local_rank
    if world.launcher == "Slurm" and torch.cuda.is_available():
        local_rank %= torch.cuda.device_count()  # --gpus-per-task shows each task its own alone
    chosen = resolve_device(device, local_rank, quiet=world.rank > 0)
    if chosen.type == "mps" and world.size > 1 and not device.startswith("mps"):
        chosen = resolve_device("cpu")  # MPS serves one process, and nobody asked for it
        if world.rank == 0:
            print(f"{world.size} processes cannot share mps: running on cpu", flush=True)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world.size == 1 or dist.is_initialized():
        return chosen
    if chosen.type == "mps":
        raise UserError(f"--device mps runs one process, not {world.size}")
    if dist_url == "env://":
        if world.launcher == "Slurm":
            os.environ.setdefault("MASTER_ADDR", _slurm_master())
            port = 20000 + int(os.environ.get("SLURM_JOB_ID", "0")) % 20000
            os.environ.setdefault("MASTER_PORT", str(port))
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise UserError(f"--dist_url env:// needs {' and '.join(missing)} in the environment")
    dist.init_process_group(
        backend="nccl" if chosen.type == "cuda" else "gloo",
        store=_meet(dist_url, world),
        rank=world.rank,
        world_size=world.size,
        timeout=TIMEOUT,
        device_id=chosen if chosen.type == "cuda" else None,
    )
    print_main(f"{world.size} processes ({world.launcher}), backend {backend()}")
    _start_watchdog(dist_url, timeout)
    return chosen


def _meet(dist_url: str, world: World) -> dist.Store:
    """The store in which the processes find each other's addresses, once all of them are there.

    With --master_addr, torchrun --max-restarts keeps one store for all attempts: without a prefix
    of its own a process might find the address of one that has died, and wait for it. Where
    torchrun finds its nodes by itself (--rdzv_id), nodes may count the attempts differently, so
    there is no prefix; after a restart all may then seem to be here at once.
    """
    where = _meeting_place(dist_url)
    opened = _in_thread(lambda: _open_store(dist_url, world))
    # One process of each node says so.
    _wait(opened.done, lambda: "" if world.local_rank else f"process 0 of {world.size} at {where}")
    with as_user_error(f"cannot meet at {where}", (RuntimeError, ValueError)):
        store = opened.result()
    one_node = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    if one_node or os.environ.get("TORCHELASTIC_RUN_ID", "none") == "none":
        store = dist.PrefixStore(f"attempt{os.environ.get(ATTEMPT, 0)}", store)
    keys = [f"here{rank}" for rank in range(world.size)]
    try:
        store.set(keys[world.rank], "")
        _wait(lambda: store.check(keys), lambda: _told_missing(store, world, where))
    except dist.DistError as error:
        raise UserError(f"process 0 at {where} ended while others were waited for") from error
    return store


def _meeting_place(dist_url: str) -> str:
    address, port = (os.environ.get(f"MASTER_{name}") for name in ("ADDR", "PORT"))
    return f"{address}:{port} (MASTER_ADDR, MASTER_PORT)" if dist_url == "env://" else dist_url


def _open_store(dist_url: str, world: World) -> dist.Store:
    """As torch's rendezvous, but that the main process does not wait for the others here."""
    url = urlsplit(dist_url)
    if url.scheme not in ("env", "tcp"):
        return next(rendezvous(dist_url, world.rank, world.size, timeout=TIMEOUT))[0]
    host, port, of_agent = url.hostname, url.port, False
    if url.scheme == "env":
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's own
    if not host or not port:
        raise ValueError("host or port is missing")
    serves = world.rank == 0 and not of_agent
    return dist.TCPStore(host, port, None, serves, TIMEOUT, wait_for_workers=False)


def _in_thread(work: Callable[[], dist.Store]) -> Future:
    """What waits in torch's C++ keeps the main thread's signals waiting, too."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="rendezvous").start()
    return future


def _wait(done: Callable[[], bool], whom: Callable[[], str]) -> None:
    """Wait until it is done, in short sleeps, so that a signal ends the wait.

    whom: for whom one waits, in words, said after 30 s and then each minute; "" says nothing.
    Raises UserError after TIMEOUT.
    """
    begun, due = time.monotonic(), FIRST_WORD
    while not done():
        waited = time.monotonic() - begun
        if waited > TIMEOUT.total_seconds():
            raise UserError(f"waited {waited:.0f} s for {whom() or 'other processes'}: ended")
        if waited >= due:
            due += NEXT_WORD
            if words := whom():
                print(f"waiting for {words} for {waited:.0f} s", file=sys.stderr, flush=True)
        time.sleep(min(0.01 + waited / 10, 0.5))


def _told_missing(store: dist.Store, world: World, where: str) -> str:
    """Whom one waits for, in words; none but on the first rank that is here."""
    missing = [rank for rank in range(world.size) if not store.check([f"here{rank}"])]
    if not missing or world.rank != min(set(range(world.size)) - set(missing)):
        return ""
    shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
    return f"{len(missing)} of {world.size} processes (rank {shown}) at {where}"


def is_restarted() -> bool:
    """Whether torchrun has started this run again, after it lost a worker."""
    return os.environ.get(ATTEMPT, "0") != "0"


def _start_watchdog(dist_url: str, timeout: float) -> None:
    global _watchdog
    host = urlsplit(dist_url).hostname or os.environ.get("MASTER_ADDR", "127.0.0.1")
    # A store of its own, served by the main process: the launcher's may outlive or predate a run.
    served = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False) if is_main() else None
    name = f"process {rank()} (pid {os.getpid()} on {socket.gethostname()})"
    found = gather_objects((name, served.port if served else None))
    store = served or dist.TCPStore(host, found[0][1], is_master=False)
    names = [name for name, _ in found]
    _watchdog = Watchdog(store, rank(), names, timeout, lambda lost: end(f"stopped: {lost}", 1))
    barrier()  # everybody has told the store of itself
    _watchdog.start()


def beat(doing: str) -> None:
    """Tell the others that this process makes progress: once a batch, in every long loop.

    Also where a signal that asks the process to stop is noticed at the latest.
    """
    stop.check()
    if _watchdog is not None:
        _watchdog.beat(doing)


def say_goodbye(why: str) -> None:
    """Tell the others why this process ends."""
    if _watchdog is not None:
        _watchdog.say_goodbye(why)


def who_is_lost() -> str:
    """Whose connection broke, in words."""
    return _watchdog.who_is_lost() if _watchdog is not None else "another process ended first"


def end(why: str, code: int) -> NoReturn:
    """End this process at once, a checkpoint that is being written apart: print why, and go.

    Not by an exception: what is left of the backend would only fail once more.
    """
    print(f"{program()}: {why}", file=sys.stderr, flush=True)
    for finish in _finishers:
        finish()
    sys.stdout.flush()
    os._exit(code)


def before_exit(finish: Callable[[], None]) -> None:
    """Have this done if the process must end because another one is lost."""
    _finishers.append(finish)


def cleanup() -> None:
    if dist.is_initialized():
        barrier()
        say_goodbye(FINISHED)
        dist.destroy_process_group()


def run(main: Callable[[], None]) -> NoReturn:
    """Run a script's main and end the process.

    A UserError becomes one line on stderr and exit code 2; a signal, after which the same command
    goes on where it was, one line and exit code 75; a lost process, its name and exit code 1.
    """
    code, line = 0, None
    try:
        stop.install()
        main()
    except UserError as error:
        # A DataLoader worker re-raises with its traceback inside the message: keep the last line.
        lines = str(error).strip().splitlines() or ["unknown error"]
        message = lines[-1].strip().removeprefix("util.errors.UserError: ")
        code, line = EXIT_USER_ERROR, f"error: {message}"
        say_goodbye(f"stopped with an error: {message}")
    except stop.Stopped as signal:
        code, line = EXIT_STOPPED, f"stopped by {signal}; start the same command again to go on"
        say_goodbye(f"was stopped by {signal}")
    except RuntimeError as error:
        if not any(phrase in str(error) for phrase in LOST_PEER):
            say_goodbye(f"failed: {type(error).__name__}")
            raise
        with stop.deferred():  # torchrun asks the others to end before they have found out why
            end(f"stopped: {who_is_lost()}", EXIT_LOST_PEER)
    if line is not None:
        print(f"{program()}: {line}", file=sys.stderr, flush=True)
    sys.exit(code)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def backend() -> str:
    """What carries the processes' messages: nccl, gloo, or none in a world of one."""
    return dist.get_backend() if dist.is_initialized() else "none"


def is_main() -> bool:
    return rank() == 0


def print_main(*values) -> None:
    """Print once, from the main process."""
    if is_main():
        print(*values, flush=True)


def barrier() -> None:
    """Wait until every process is here."""
    if dist.is_initialized():
        dist.barrier()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum of every process's tensor, in place, the same on all."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_reduce_max(tensor: Tensor) -> Tensor:
    """The largest of every process's values, in place, the same on all."""
    if dist.is_initialized():
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def gather_objects(value) -> list:
    """Every process's value, in the order of ranks, on every process."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def gather_to_main(value) -> list | None:
    """Every process's value, in the order of ranks, on the main process; None on the others."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size() if is_main() else None
    dist.gather_object(value, values)
    return values


def wrap(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with its gradients summed over processes; the model itself in a world of one.

    Not as a static graph: no parameter is ever unused, which is what it would spare looking for,
    and steps with gradients kept local in between are no static graph to it.
    """
    if not dist.is_initialized():
        return model
    ids = [device] if device.type == "cuda" else None
    wrapped = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
    wrapped.register_comm_hook(None, _sum_gradients)
    return wrapped


def _sum_gradients(_state, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """The sum, where DDP would divide by the number of processes, which changes nothing but bits:

    a micro-batch's gradient is then the same on any number of processes, and they may have
    unequal shares of the micro-batches.
    """
    reduced = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return reduced.then(lambda future: future.value()[0])


def keep_gradients_local(model: nn.Module, active: bool):
    """Context in which backward does not talk to other processes (gradient accumulation)."""
    if active and isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return nullcontext()
