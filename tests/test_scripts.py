"""scripts/: training by torchrun and under Slurm, whose srun and scontrol are stand-ins here."""

import re
import subprocess
import sys
from pathlib import Path

from torch.distributed.run import get_args_parser

from tests.conftest import ROOT, environment
from tests.runs import TRAIN_FLAGS, flags, load, stand_in

TORCHRUN, SLURM = (ROOT / "scripts" / f"train_{name}.sh" for name in ("torchrun", "slurm"))


def start(script: Path, *argv, path: Path = ROOT, **env) -> subprocess.CompletedProcess:
    """path: a folder of stand-ins that go before the system's programs."""
    found = environment(alone=True, **{"PYTHON": sys.executable} | env)
    found["PATH"] = f"{path}:{found['PATH']}"
    command, kept = ["bash", str(script), *map(str, argv)], dict(capture_output=True, text=True)
    return subprocess.run(command, cwd=ROOT, env=found, timeout=300, **kept)


# --- torchrun


def test_torchrun_script_hands_everything_on(tmp_path):
    """Of several nodes; on one it is started by test_docs.py."""
    stand_in(tmp_path / "bin", "python", 'printf "%s\\n" "$@"')
    argv = ("--output_dir", "a folder", "--cfg", "")
    meeting = {"NNODES": 3, "NODE_RANK": 2, "MASTER_ADDR": "first"}
    result = start(TORCHRUN, *argv, path=tmp_path / "bin", PYTHON="python", GPUS=4, **meeting)
    words = result.stdout.splitlines()
    assert words[:2] == ["-m", "torch.distributed.run"], result.stderr
    understood = get_args_parser().parse_args(words[2:])
    assert understood.training_script == str(ROOT / "main_tokenbridge.py")
    assert understood.training_script_args == [*argv]
    expected = {"--nnodes=3", "--node_rank=2", "--master_addr=first", "--master_port=29500"}
    assert expected | {"--nproc_per_node=4"} < set(words) and "--standalone" not in words
    assert any(w.startswith("--signals-to-handle=") and w.endswith("SIGUSR1") for w in words)


# --- Slurm


def submit(tmp_path: Path, *argv, **env) -> subprocess.CompletedProcess:
    """Start the script as slurmd does: a copy elsewhere, in the folder it was submitted from."""
    stand_in(tmp_path / "bin", "scontrol", f'echo "$*" >> "{tmp_path}/scontrol"')
    copy = tmp_path / "slurm_script"
    copy.write_text(SLURM.read_text())
    place = {"SLURM_SUBMIT_DIR": ROOT, "SLURM_JOB_ID": 7, "SLURM_CPUS_PER_TASK": 5}
    return start(copy, *argv, path=tmp_path / "bin", **place | env)


def requeued(tmp_path: Path) -> bool:
    path = tmp_path / "scontrol"
    return path.exists() and path.read_text() == "requeue 7\n"


def test_slurm_script_asks_for_what_it_needs():
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", SLURM.read_text(), re.MULTILINE))
    assert options["signal"].startswith("USR1@") and "requeue" in options  # to the steps: no B:
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert options["open-mode"] == "append"  # else a start writes over what the last one said


def test_slurm_script_requeues_what_was_stopped_and_nothing_else(tmp_path):
    """Neither what has ended or failed nor a job that somebody cancels."""
    for end, code in (("exit 0", 0), ("exit 2", 2), ("kill -TERM $PPID; exit 75", 75)):
        stand_in(tmp_path / "bin", "srun", end)
        assert submit(tmp_path).returncode == code and not requeued(tmp_path)
    stand_in(tmp_path / "bin", "srun", 'echo "$SRUN_CPUS_PER_TASK" "$@"; exit 75')
    result = submit(tmp_path, "--output_dir", "out")
    assert result.returncode == 75 and requeued(tmp_path), result.stderr
    started = f"5 --kill-on-bad-exit=1 {sys.executable} main_tokenbridge.py --output_dir out"
    assert started in result.stdout.splitlines()
    for env in ({"SLURM_SUBMIT_DIR": tmp_path}, {"SLURM_JOB_ID": ""}):  # not by sbatch at all
        result = submit(tmp_path, **env)
        assert result.returncode == 2 and "submit it with sbatch" in result.stderr


# Two tasks of one node; at the first start both are warned once the training has begun.
SRUN = """
shift
for rank in 0 1; do
  SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_STEP_NUM_TASKS=2 \\
    SLURM_STEP_NODELIST=127.0.0.1 "$@" >>"{folder}/task$rank" 2>&1 &
  tasks="$tasks $!"
done
if [ "$SLURM_RESTART_COUNT" = 0 ]; then
  until grep -q 'step 1/' "{folder}/task0" || ! kill -0 $!; do sleep 0.05; done
  kill -USR1 $tasks
fi
worst=0
for task in $tasks; do # by its process: bash forgets a job that has ended
  wait "$task"
  code=$?
  [ "$code" -gt "$worst" ] && worst=$code
done
exit "$worst"
"""


def test_slurm_job_is_stopped_requeued_and_ends_its_training(inputs, tmp_path):
    stand_in(tmp_path / "bin", "srun", SRUN.format(folder=tmp_path))
    argv = flags(inputs, TRAIN_FLAGS, accum_iter=1, epochs=400, log_freq=1, save_last_freq=400)
    argv += ["--output_dir", str(tmp_path / "out"), "--resume", "auto", "--no_flip"]
    first = submit(tmp_path, *argv, SLURM_RESTART_COUNT=0)
    assert first.returncode == 75, (tmp_path / "task0").read_text()
    assert requeued(tmp_path)
    step = load(tmp_path / "out")["step"]
    (tmp_path / "scontrol").unlink()
    epochs = str(step // 3 + 1)
    second = submit(tmp_path, *argv, "--epochs", epochs, SLURM_RESTART_COUNT=1)
    assert second.returncode == 0, (tmp_path / "task0").read_text()
    assert not requeued(tmp_path)
    assert f"going on after step {step}" in (tmp_path / "task0").read_text()
    assert load(tmp_path / "out")["step"] == 3 * int(epochs)
