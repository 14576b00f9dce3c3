#!/usr/bin/env bash
# Installs the project as a user does, not editable, by pip and by uv, each into an environment of its
# own, and runs the console commands there from another folder. The other libraries are those of
# .venv. Called by .ci/run; needs an index of packages.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

unset PYTHONPATH OMP_NUM_THREADS CUDA_VISIBLE_DEVICES VIRTUAL_ENV
python=$PWD/.venv/bin/python
libraries=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkdir "$folder/checkout" "$folder/elsewhere"
git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t "$folder/checkout"
"$python" -c 'import pathlib, sys; from tests.runs import make_inputs
make_inputs(pathlib.Path(sys.argv[1]))' "$folder/inputs" >/dev/null

# A file of paths in the environment, which leaves .venv's own editable installation out.
share_libraries() {
  echo "$libraries" >"$(echo "$1"/lib/python*/site-packages)/libraries.pth"
}

try_help() {
  for name in train cache reconstruct doctor report; do
    echo "== $1: tokenbridge-$name --help"
    (cd "$folder/elsewhere" && "$folder/$1/bin/tokenbridge-$name" --help) \
      | grep -x "usage: tokenbridge-$name .*"
  done
}

"$python" -m venv "$folder/pip"
share_libraries "$folder/pip"
"$folder/pip/bin/pip" install --quiet --no-deps uv "$folder/checkout"
try_help pip

cd "$folder/checkout"
export UV_PROJECT_ENVIRONMENT=$folder/uv
"$folder/pip/bin/uv" lock --quiet
mapfile -t others < <(sed -n '/^name = "tokenbridge"$/d; s/^name = "\(.*\)"$/\1/p' uv.lock)
"$folder/pip/bin/uv" sync --quiet --locked --no-editable --python "$python" \
  "${others[@]/#/--no-install-package=}"
share_libraries "$folder/uv"
try_help uv

# All five in turn, at tiny size.
cd "$folder/elsewhere"
PATH=$folder/pip/bin:$PATH
common=(--img_size 16 --vae_path "$folder/inputs/vae.ckpt" --num_workers 0 --device cpu)
run=("${common[@]}" --model tokenbridge_tiny --class_num 3 --buffer_size 4 --use_cached
  --cached_path cache --batch_size 4 --accum_iter 2 --epochs 1 --warmup_epochs 1 --output_dir run)
set -x
tokenbridge-cache "${common[@]}" --data_path "$folder/inputs/data" --cached_path cache
tokenbridge-doctor "${run[@]}" --no_metrics --photo "$folder/inputs/data/train/ant/0.png"
tokenbridge-train "${run[@]}" --preview_freq 0
python -m torch.distributed.run --standalone --nproc_per_node=2 -m main_tokenbridge \
  "${run[@]}" --preview_freq 0 --epochs 2 --resume auto
tokenbridge-reconstruct "${common[@]}" --image_dir "$folder/inputs/data" --cached_path cache \
  --no_metrics --output_dir reconstruction
tokenbridge-report .
python -m util.report . --output again.html
grep -c '<h2' report.html again.html
