#!/usr/bin/env bash
# The demo, started by `make demo`: from real images to a page with generated ones.
# Every command is shown as a user would type it; there is nothing special about them but their
# flags. What was in output/demo before is removed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

demo=output/demo
export OMP_NUM_THREADS=1 # two processes share two cores
export TQDM_MININTERVAL=5
bits=(-1 8 6 4 3 2)

# stage TITLE COMMAND...: show the command, run it, note how long it took.
stage() {
  local title=$1 began=$SECONDS
  shift
  printf '\n== %s\n' "$title"
  printf '%s' "$ $*" | fold -s -w 96 | sed -e '$!s/$/\\/' -e '2,$s/^/    /'
  printf '\n'
  "$@"
  printf '%s\t%s\n' "$title" "$((SECONDS - began))" >>"$demo/timings.tsv"
}

rm -rf "$demo"
mkdir -p "$demo"
echo "Training a class-conditional generator on real handwritten digits: about 9 minutes on 2 cores."

stage 'Real digits as PNG files, 32 px' \
  python demo/digits.py --output "$demo/data" --size 32

stage 'Train the autoencoder' \
  python demo/train_vae.py --data_path "$demo/data" --output "$demo/vae.ckpt"

stage 'Cache the latents, on 2 processes' \
  torchrun --standalone --nproc_per_node=2 main_cache.py \
  --img_size 32 --vae_path "$demo/vae.ckpt" \
  --data_path "$demo/data" --cached_path "$demo/cache" --shard_size 360 --num_workers 0 \
  --device cpu

stage 'Train the generator, on 2 processes' \
  torchrun --standalone --nproc_per_node=2 main_tokenbridge.py --config configs/digits.yaml \
  --cached_path "$demo/cache" --vae_path "$demo/vae.ckpt" --val_path "$demo/data/val" \
  --output_dir "$demo/model" --device cpu

stage 'Export the averaged weights, for demo/generate.ipynb' \
  python -m util.export --resume "$demo/model" --output_dir "$demo/exported"

# main_cache.py measured 1 / std of the latents; KL-16's is built in, any other comes from a cache
stage 'Reconstruct held-out digits at several bit widths' \
  torchrun --standalone --nproc_per_node=2 reconstruction.py \
  --image_dir "$demo/data/val" --img_size 32 --vae_path "$demo/vae.ckpt" \
  --cached_path "$demo/cache" --bits "${bits[@]}" --range 5.0 --num_workers 0 --no_metrics \
  --output_dir "$demo/reconstruction" --device cpu

stage 'Train a classifier of real digits, the judge' \
  python demo/classifier.py train --data_path "$demo/data" --output "$demo/classifier.pth"

# FID's arithmetic in the classifier's features: Inception's weights are a download
stage 'Statistics of the training digits, in its features' \
  python -m util.fid_stats --image_dir "$demo/data/train" --img_size 32 --num_workers 0 \
  --feature_extractor demo.classifier:digits --inception_weights "$demo/classifier.pth" \
  --output "$demo/digits.npz" --device cpu

stage 'Generate digits, with guidance, and measure them' \
  torchrun --standalone --nproc_per_node=2 main_tokenbridge.py --evaluate \
  --model tokenbridge_tiny --img_size 32 --vae_path "$demo/vae.ckpt" --resume "$demo/model" \
  --num_images 360 --eval_bsz 90 --num_iter 16 --cfg 2.0 --temperature 0.5 \
  --feature_extractor demo.classifier:digits --inception_weights "$demo/classifier.pth" \
  --fid_stats "$demo/digits.npz" --keep_images \
  --output_dir "$demo/generated" --device cpu

generated=("$demo"/generated/ariter*/)
stage 'Judge them by the classifier' \
  python demo/classifier.py judge --data_path "$demo/data" --classifier "$demo/classifier.pth" \
  --stats "$demo/digits.npz" --generated "${generated[0]}" --output "$demo/scores.json"

stage 'Report' \
  python demo/report.py --root "$demo" --data_path "$demo/data" --generated "${generated[0]}" \
  --scores "$demo/scores.json" --timings "$demo/timings.tsv" --output "$demo/report.html"

printf '\nDone in %d min %02d s. Open %s in a browser; draw more with make app.\n' \
  $((SECONDS / 60)) $((SECONDS % 60)) "$demo/report.html"
