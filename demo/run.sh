#!/usr/bin/env bash
# From real images to a page with generated ones, started by `make demo`.
#
#   bash demo/run.sh [--quick] [--seed N]
#
# --quick: a few steps of every stage, to see whether all of them work; the digits are poor.
# --seed N: of the training and of the images; 0 unless given.
# Output goes to output/demo, output/demo-quick or output/demo-seedN; what was there is removed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

demo=output/demo seed=0
stages=(7 12 180 5 28 22 6 13 5 6) # seconds of each, on two cores of 2021
train=() judge=(--epochs 30) bits=(-1 8 6 4 3 2)
sample=(--num_images 360 --eval_bsz 90 --num_iter 16)
while [ $# -gt 0 ]; do
  if [ "$1" = --quick ]; then
    demo+=-quick stages=(4 9 16 5 9 4 5 9 5 5) judge=(--epochs 3) bits=(-1 4)
    train=(--epochs 2 --warmup_epochs 0.5 --ema_rate 0.9 --val_images 16 --preview_iter 4)
    sample=(--num_images 40 --eval_bsz 20 --num_iter 4)
  elif [[ $1 = --seed && ${2-} =~ ^[0-9]{1,9}$ ]]; then
    seed=$2 demo+=-seed$2
    shift
  else
    echo "error: ${*:1:2} is no flag of $0: --quick, --seed N" >&2
    exit 2
  fi
  shift
done

train+=(--seed "$seed")
command -v torchrun >/dev/null || PATH="$PWD/.venv/bin:$PATH"
export OMP_NUM_THREADS=1 # two processes share two cores
export TQDM_MININTERVAL=5
vae=$demo/vae.ckpt
features=(--feature_extractor demo.classifier:digits --inception_weights "$demo/classifier.pth")
two="torchrun --standalone --nproc_per_node=2"

clock() { printf '%d:%02d' $(($1 / 60)) $(($1 % 60)); }

# stage TITLE COMMAND...: say how far the demo is, show the command, run it, note its time.
# What is left is expected to take as much longer than planned as what was done so far.
number=0 done=0 all=$(IFS=+; echo $((${stages[*]})))
stage() {
  local title=$1 began=$SECONDS
  shift
  local left=$(((all - done) * (20 + began) / (20 + done)))
  number=$((number + 1)) done=$((done + stages[number - 1]))
  printf '\n== %d/%d %s   %s so far, about %s left\n$ %s\n' \
    "$number" "${#stages[@]}" "$title" "$(clock "$began")" "$(clock "$left")" "$*"
  "$@"
  printf '%s\t%s\n' "$title" "$((SECONDS - began))" >>"$demo/timings.tsv"
}

rm -rf "$demo"
mkdir -p "$demo"
cp demo/digits_vae.ckpt "$vae" # frozen, of demo/train_vae.py; comes ready made, as KL-16 does
echo "Training a class-conditional generator on real handwritten digits; output in $demo"
SECONDS=0

stage 'Real digits as PNG files, 32 px' \
  python -m demo.digits --output "$demo/data" --size 32

stage 'Cache the latents, on 2 processes' \
  $two main_cache.py --img_size 32 --vae_path "$vae" --data_path "$demo/data" \
  --cached_path "$demo/cache" --shard_size 360 --num_workers 0 --device cpu

stage 'Train the generator, on 2 processes' \
  $two main_tokenbridge.py --config configs/digits.yaml \
  --quant_bits 4 --cached_path "$demo/cache" --vae_path "$vae" --val_path "$demo/data/val" \
  --output_dir "$demo/model" --device cpu "${train[@]}"

stage 'Export the averaged weights, for demo/generate.ipynb' \
  python -m util.export --resume "$demo/model" --output_dir "$demo/exported"

stage 'Reconstruct held-out digits at several bit widths' \
  $two reconstruction.py \
  --image_dir "$demo/data/val" --img_size 32 --vae_path "$vae" \
  --cached_path "$demo/cache" --bits "${bits[@]}" --range 5.0 --num_workers 0 --no_metrics \
  --output_dir "$demo/reconstruction" --device cpu

stage 'Train a classifier of real digits, the judge' \
  python -m demo.classifier train --root "$demo" "${judge[@]}"

stage 'Statistics of the training digits, in its features' \
  python -m util.fid_stats --image_dir "$demo/data/train" --img_size 32 --num_workers 0 \
  "${features[@]}" --output "$demo/digits.npz" --device cpu

stage 'Generate digits, with guidance, and measure them' \
  $two main_tokenbridge.py --evaluate \
  --model tokenbridge_tiny --img_size 32 --vae_path "$vae" --resume "$demo/model" \
  "${sample[@]}" --cfg 2.0 --temperature 0.4 --seed "$seed" \
  "${features[@]}" --fid_stats "$demo/digits.npz" --keep_images \
  --output_dir "$demo/generated" --device cpu

stage 'Judge them by the classifier' \
  python -m demo.classifier judge --root "$demo"

stage 'Report' \
  python -m demo.report --root "$demo"

printf '\nDone in %d min %02d s. Open %s in a browser; draw more with make app.\n' \
  $((SECONDS / 60)) $((SECONDS % 60)) "$demo/report.html"
