#!/usr/bin/env bash
# Train under Slurm, on any number of nodes, for as long as it takes; the arguments are those of
# main_tokenbridge.py. To be submitted from the project's folder:
#
#   sbatch scripts/train_slurm.sh --config configs/tokenbridge_large.yaml \
#     --data_path IMAGENET --output_dir OUT
#   sbatch --nodes=1 --gpus-per-node=4 --ntasks-per-node=4 scripts/train_slurm.sh ...
#
# Slurm warns 5 minutes before the end of the time limit: all processes save after their step and end
# with exit code 75, the job goes back into the queue and later on from there, which takes
# `resume: auto` (the ready configurations have it) or --resume auto. Partition and account are
# yours to add, here or as flags of sbatch.
#
#SBATCH --job-name=tokenbridge
#SBATCH --nodes=4
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=tokenbridge-%j.log
set -uo pipefail

stopped=75 # exit code of a run that has saved and is to be started again
cd "${SLURM_SUBMIT_DIR:-.}" || exit 2
if [ -z "${SLURM_JOB_ID:-}" ] || [ ! -f main_tokenbridge.py ]; then
  echo "train_slurm.sh: error: submit it with sbatch from the project's folder" >&2
  exit 2
fi

# Slurm says SIGTERM to this shell when somebody cancels the job, which is then not to come back;
# a job that must make room for another one is queued again by Slurm itself.
cancelled=no
trap 'cancelled=yes' TERM

export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not inherit it since Slurm 22.05
echo "$(date '+%F %T') job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}: ${SLURM_JOB_NODELIST:-}"
srun --kill-on-bad-exit=1 "${PYTHON:-python}" main_tokenbridge.py "$@"
code=$?

if [ "$code" -eq "$stopped" ] && [ "$cancelled" = no ]; then
  echo "$(date '+%F %T') stopped and saved; back into the queue"
  scontrol requeue "$SLURM_JOB_ID" || exit "$stopped"
fi
exit "$code"
