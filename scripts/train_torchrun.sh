#!/usr/bin/env bash
# Train on one node or on several; the arguments are those of main_tokenbridge.py.
#
#   one node:       scripts/train_torchrun.sh --config configs/tokenbridge_large.yaml \
#                     --data_path IMAGENET --output_dir OUT
#   several nodes:  the same on each of them, with --node_rank 1, 2, 3 on the others, after
#                     export NODES='--nnodes=4 --node_rank=0 --master_addr=FIRST_NODE'
#
# The ready configurations have `resume: auto`: stopped or killed, the same command goes on. Without
# one of them, give --resume auto.
#
# From the environment, with the default in brackets: GPUS, processes of this node [its GPUs; 1 if it
# has none]; MAX_RESTARTS, how often all start again after one was lost [10]; PYTHON [python].
set -euo pipefail

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python}
gpus=${GPUS:-$("$python" -c 'import torch; print(torch.cuda.device_count() or 1)')}
read -ra nodes <<<"${NODES:---standalone}" # alone, on a free port
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # what torchrun sets, without its warning

# The process becomes torchrun, so that a signal sent to it reaches torchrun. SIGUSR1 is handed on as
# well: every worker then saves after its step and ends with exit code 75.
exec "$python" -m torch.distributed.run "${nodes[@]}" --nproc_per_node="$gpus" \
  --max-restarts="${MAX_RESTARTS:-10}" \
  --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
  "$project/main_tokenbridge.py" "$@"
