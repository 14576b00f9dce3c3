#!/usr/bin/env bash
# Train on one node or on several; the arguments are those of main_tokenbridge.py.
#
#   one node:       scripts/train_torchrun.sh --config configs/tokenbridge_large.yaml \
#                     --data_path IMAGENET --output_dir OUT
#   several nodes:  the same on each of them, after
#                     export NNODES=4 MASTER_ADDR=FIRST_NODE NODE_RANK=0    # 1, 2, 3 on the others
#
# The ready configurations have `resume: auto`: stopped or killed, the same command goes on. Without
# one of them, give --resume auto.
#
# From the environment, with the default in brackets:
#   GPUS          processes of this node [its GPUs; 1 if it has none]
#   NNODES [1]; with more of them NODE_RANK (from 0), MASTER_ADDR and MASTER_PORT [29500]
#   MAX_RESTARTS  how often all start again after one was lost [10]
#   PYTHON [python]
set -euo pipefail

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python}
nnodes=${NNODES:-1}
gpus=${GPUS:-$("$python" -c 'import torch; print(torch.cuda.device_count() or 1)')}

meet=(--standalone) # on a free port
if [ "$nnodes" -gt 1 ]; then
  for name in MASTER_ADDR NODE_RANK; do
    if [ -z "${!name:-}" ]; then
      echo "$0: error: NNODES is $nnodes, but $name is not set (see the top of this file)" >&2
      exit 2
    fi
  done
  meet=(--nnodes="$nnodes" --node_rank="$NODE_RANK"
    --master_addr="$MASTER_ADDR" --master_port="${MASTER_PORT:-29500}")
fi

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # what torchrun sets, without its warning

# The process becomes torchrun, so that a signal sent to it reaches torchrun. SIGUSR1 is handed on as
# well: every worker then saves after its step and ends with exit code 75.
exec "$python" -m torch.distributed.run \
  "${meet[@]}" --nproc_per_node="$gpus" \
  --max-restarts="${MAX_RESTARTS:-10}" \
  --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
  "$project/main_tokenbridge.py" "$@"
