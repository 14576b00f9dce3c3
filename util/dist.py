"""Processes: how they find each other, the few things they say to each other, and how they end.

The only file that imports torch.distributed. Every helper works in a world of one, so nobody
else asks whether a run is distributed. Launchers: none, torchrun, Slurm, Open MPI (ITP).
"""

import os
import re
import socket
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from util import errors, stop
from util.device import resolve_device
from util.errors import UserError, as_user_error, program
from util.files import listed

# Ranks wait for each other's last batch of an evaluation or shard of a cache, on a CPU for long.
# That somebody hangs is for the watchdog to see, which knows who makes progress.
TIMEOUT = timedelta(hours=3)
ATTEMPT = "TORCHELASTIC_RESTART_COUNT"  # torchrun counts the restarts of --max-restarts in it
NO_PROGRESS = 600.0  # seconds; the default of --dist_timeout
FIRST_WORD, NEXT_WORD = 30.0, 60.0  # seconds of waiting to the first line, and between two more
# What the backends say on a process whose peer has left.
LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "remote process exited")
# The variables with the rank, the number of processes, and the rank on the own node. Of a step only
# srun sets the number of tasks; the script of sbatch has Slurm's other variables, too.
LAUNCHERS = {
    "Open MPI (--dist_on_itp)": [f"OMPI_COMM_WORLD_{n}" for n in ("RANK", "SIZE", "LOCAL_RANK")],
    "torchrun": ["RANK", "WORLD_SIZE", "LOCAL_RANK"],
    "Slurm": ["SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"],
}


@dataclass(frozen=True)
class World:
    """This process among all: rank in [0, size), local_rank on its own node."""

    rank: int
    size: int
    local_rank: int
    launcher: str


def detect_world(dist_on_itp: bool = False) -> World:
    """This process's rank, from what its launcher put into the environment."""
    env = os.environ
    if dist_on_itp:
        launcher = "Open MPI (--dist_on_itp)"
    elif "RANK" in env and "WORLD_SIZE" in env:
        launcher = "torchrun"
        env.setdefault("LOCAL_RANK", "0")
    elif env.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        launcher = "Slurm"
    else:
        if env.get("SLURM_NTASKS", "1") != "1" and "SLURM_STEP_ID" not in env:
            tasks = f"inside a Slurm allocation of {env['SLURM_NTASKS']} tasks"
            print(f"{tasks} but not started by srun: one process", file=sys.stderr)
        return World(rank=0, size=1, local_rank=0, launcher="one process")
    try:
        return World(*(int(env[name]) for name in LAUNCHERS[launcher]), launcher=launcher)
    except (KeyError, ValueError) as error:
        values = ", ".join(f"{name}={env.get(name)!r}" for name in LAUNCHERS[launcher])
        raise UserError(f"{launcher}: cannot read the process's rank from {values}") from error


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
    local_rank = world.local_rank
    if world.launcher == "Slurm" and torch.cuda.is_available():
        local_rank %= torch.cuda.device_count()  # --gpus-per-task shows each task its own alone
    chosen = resolve_device(device, local_rank, quiet=world.rank > 0)
    is_cuda, is_shared = chosen.type == "cuda", ":" in device  # NCCL refuses two on one card
    if is_cuda:
        torch.cuda.set_device(chosen)
    if world.size == 1 or dist.is_initialized():
        return chosen
    host, port = _address(dist_url, world)
    # torchrun itself may serve the store.
    agent = dist_url == "env://" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    dist.init_process_group(
        backend="gloo" if is_shared or not is_cuda else "nccl",
        store=_meet(host, port, world.rank == 0 and not agent, world),
        rank=world.rank,
        world_size=world.size,
        timeout=TIMEOUT,
        device_id=None if is_shared or not is_cuda else chosen,
    )
    print_main(f"{world.size} processes ({world.launcher}), backend {backend()}")
    _start_watchdog(host, timeout)
    return chosen


def _address(dist_url: str, world: World) -> tuple[str, int]:
    """Host and port of the store in which the processes find each other."""
    env = os.environ
    host, port = env.get("MASTER_ADDR"), env.get("MASTER_PORT")
    if world.launcher == "Slurm":
        nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_NODELIST", "127.0.0.1")
        # The first of rack[0-1]node[08-15,17],other is rack0node08.
        host = host or re.sub(r"\[(\d+)[^]]*\]", r"\1", nodes).split(",")[0]
        port = port or 20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000
    with as_user_error(f"--dist_url {dist_url}"):
        if dist_url != "env://":
            host, port = urlsplit(dist_url).hostname, urlsplit(dist_url).port
        if not host or not port:
            raise ValueError("set MASTER_ADDR and MASTER_PORT, or name it as tcp://HOST:PORT")
        return host, int(port)


def _meet(host: str, port: int, serves: bool, world: World) -> dist.Store:
    """The store in which the processes find each other's addresses, once all of them are there.

    Not torch's own waiting, in which Python's signals would wait, too.
    """
    begun, due = time.monotonic(), FIRST_WORD

    def pause(missing: str) -> None:
        nonlocal due
        waited = time.monotonic() - begun
        if waited > TIMEOUT.total_seconds():
            raise ValueError(f"others have not come in {TIMEOUT}")
        if waited >= due and not world.local_rank:
            due += NEXT_WORD
            print(f"waiting for {missing} at {host}:{port} for {waited:.0f} s", file=sys.stderr)
        time.sleep(min(0.01 + waited / 10, 0.5))

    with as_user_error(f"cannot meet process 0 at {host}:{port}", (RuntimeError, ValueError)):
        while not serves:
            with suppress(OSError), socket.create_connection((host, port), timeout=1):
                break
            pause(f"process 0 of {world.size}")
        store = dist.TCPStore(host, port, None, serves, TIMEOUT, wait_for_workers=False)
        # With --master_addr, torchrun --max-restarts keeps one store for all attempts, and with it
        # addresses of processes that have died. With --rdzv_id, nodes may count attempts
        # differently; after a restart all may then seem to be here at once.
        one_node = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
        if one_node or os.environ.get("TORCHELASTIC_RUN_ID", "none") == "none":
            store = dist.PrefixStore(f"attempt{os.environ.get(ATTEMPT, 0)}", store)
        keys = [f"here{rank}" for rank in range(world.size)]
        store.set(keys[world.rank], "")
        while not store.check(keys):
            absent = [rank for rank, key in enumerate(keys) if not store.check([key])]
            pause(f"{len(absent)} of {world.size} processes (rank {listed(absent)})")
    return store


def is_restarted() -> bool:
    """Whether torchrun has started this run again, after it lost a worker."""
    return os.environ.get(ATTEMPT, "0") != "0"


_watchdog: stop.Watchdog | None = None  # of this process, if there are others
_finishers: list[Callable[[], None]] = []


def _start_watchdog(host: str, timeout: float) -> None:
    global _watchdog
    # A store of its own, served by the main process: the launcher's may outlive or predate a run.
    served = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False) if is_main() else None
    name = f"process {rank()} (pid {os.getpid()} on {socket.gethostname()})"
    names, ports = zip(*gather_objects((name, served.port if served else None)), strict=True)
    store = served or dist.TCPStore(host, ports[0], is_master=False)
    _watchdog = stop.Watchdog(store, rank(), names, timeout, lambda lost: end(f"stopped: {lost}"))
    barrier()  # everybody is in the store
    _watchdog.start()


def beat(doing: str) -> None:
    """Publish progress, once a batch in every long loop; a signal to stop is noticed here."""
    stop.check()
    if _watchdog is not None:
        _watchdog.beat(doing)


def _announce_end(why: str) -> None:
    if _watchdog is not None:
        _watchdog.announce_end(why)


def run(main: Callable[[], None]) -> NoReturn:
    """Run a script's main and end the process.

    A UserError becomes one line on stderr and exit code 2; a signal, after which the same command
    goes on where it was, one line and exit code 75; a lost process, its name and exit code 1.
    """
    try:
        stop.install()
        main()
        sys.exit(0)
    except UserError as error:
        # A DataLoader worker re-raises with its traceback inside the message: keep the last line.
        message = str(error).strip().rpartition("\n")[2].removeprefix("util.errors.UserError: ")
        with stop.deferred():  # torchrun asks this one to end as soon as another has
            _announce_end(f"stopped with an error: {message}")
            _say(f"error: {message}")
            sys.exit(errors.EXIT_USER_ERROR)
    except stop.Stopped as signal:
        _announce_end(f"was stopped by {signal}")
        _say(f"stopped by {signal}; start the same command again to go on")
        sys.exit(errors.EXIT_STOPPED)
    except RuntimeError as error:
        if _watchdog is None or not any(phrase in str(error) for phrase in LOST_PEER):
            _announce_end(f"failed: {type(error).__name__}")
            raise
        with stop.deferred():  # torchrun asks the others to end before they have found out why
            _watchdog.silence = stop.PROBABLY_DEAD
            _watchdog.join(3 * stop.PROBABLY_DEAD)  # which ends this process once it knows why
            end("stopped: another process ended first")


def _say(line: str) -> None:
    print(f"{program()}: {line}", file=sys.stderr, flush=True)


def before_exit(finish: Callable[[], None]) -> None:
    """Have this done if the process must end because another one is lost."""
    _finishers.append(finish)


def end(why: str) -> NoReturn:
    """End this process at once, a checkpoint that is being written apart: print why, and go.

    Not by an exception: what is left of the backend would only fail once more.
    """
    _say(why)
    for finish in _finishers:
        finish()
    sys.stdout.flush()
    os._exit(1)


def cleanup() -> None:
    if dist.is_initialized():
        barrier()
        _announce_end(stop.FINISHED)
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def backend() -> str:
    """nccl, gloo, or none in a world of one."""
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
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def gather_to_main(value) -> list | None:
    """Every process's value, in the order of ranks, on the main process; None on the others."""
    values = [value] * world_size() if is_main() else None
    if dist.is_initialized():
        dist.gather_object(value, values)
    return values


def wrap(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with its gradients summed over processes; the model itself in a world of one."""
    if not dist.is_initialized():
        return model
    ids = [device] if device.type == "cuda" else None
    wrapped = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
    wrapped.register_comm_hook(None, _sum_gradients)
    return wrapped


def _sum_gradients(_state, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """The sum, where DDP divides by the number of processes: a micro-batch's gradient is then the
    same on any number of them, and they may have unequal shares of the micro-batches.
    """
    reduced = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return reduced.then(lambda future: future.value()[0])


def keep_gradients_local(model: nn.Module, active: bool):
    """Context in which backward does not talk to other processes (gradient accumulation)."""
    if active and isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return nullcontext()
