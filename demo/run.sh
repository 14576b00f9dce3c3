#!/usr/bin/env bash
# From real images to a page with generated ones, started by `make demo` and `make gallery`.
#
#   bash demo/run.sh [--gallery] [--quick] [--seed N]
#
# --gallery: colour emoji of 64 px in place of digits. Their generator comes trained (demo/gallery)
# and goes on for six epochs.
# --quick: a few steps of every stage, to see whether all of them work; the images are poor.
# --seed N: of the training and of the images; 0 unless given.
# Output goes to output/demo or output/gallery, with -quick or -seedN behind it. What was
# interrupted goes on where it was; what was finished is removed and begins anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

demo=output/demo subject=digits size=32 seed=0 quick='' suffix=''
while [ $# -gt 0 ]; do
  if [ "$1" = --gallery ]; then
    demo=output/gallery subject=emoji size=64
  elif [ "$1" = --quick ]; then
    quick=1 suffix+=-quick
  elif [[ $1 = --seed && ${2-} =~ ^[0-9]{1,9}$ ]]; then
    seed=$2 suffix+=-seed$2
    shift
  else
    echo "error: ${*:1:2} is no flag of $0: --gallery, --quick, --seed N" >&2
    exit 2
  fi
  shift
done

# stages: seconds of each, on two cores of 2021, and those of --quick; levels: of the quantizer
judge=(--epochs 30) levels=(--range 5.0) some=()
if [ $subject = digits ]; then
  stages=(7 12 180 5 28 22 6 13 5 6) few=(4 9 16 5 9 4 5 9 5 5)
  begin='Training a class-conditional generator'
  train=(--quant_bits 4) bits=(-1 8 6 4 3 2)
  sample=(--num_images 360 --eval_bsz 90 --num_iter 16 --cfg 2.0 --temperature 0.4)
else
  stages=(6 38 360 6 40 60 60 80 20 6) few=(5 12 18 5 9 15 12 9 9 5)
  begin='Training the generator of demo/gallery further'
  train=(--finetune demo/gallery --lr 1e-4) bits=(-1 8 6 5 4 3)
  levels=(--quantizer calibrated --latent_norm channel) # as the generator has them
  sample=(--num_images 330 --eval_bsz 33 --num_iter 32 --cfg 6.0 --temperature 0.6)
fi
if [ $quick ]; then
  stages=("${few[@]}") judge=(--epochs 3) bits=(-1 4)
  [ $subject = digits ] || some=(--every 9) # with which every class has some held out
  train+=(--epochs 2 --warmup_epochs 0.5 --ema_rate 0.9 --val_images 16 --preview_iter 4)
  sample+=(--num_images 40 --eval_bsz 20 --num_iter 4)
fi
demo+=$suffix
train+=(--seed "$seed")
command -v torchrun >/dev/null || PATH="$PWD/.venv/bin:$PATH"
export OMP_NUM_THREADS=1 # two processes share two cores
export TQDM_MININTERVAL=5
vae=$demo/vae.ckpt
features=(--feature_extractor demo.classifier:judge --inception_weights "$demo/classifier.pth")
two="torchrun --standalone --nproc_per_node=2"

clock() { printf '%d:%02d' $(($1 / 60)) $(($1 % 60)); }

# stage TITLE COMMAND...: say how far the demo is, show the command, run it, note its time.
# What is left is expected to take as much longer than planned as what was done so far.
number=0 done=0 all=$(IFS=+; echo $((${stages[*]})))
note() { printf '%s\t%s\n' "$1" "$((SECONDS - began))" >>"$demo/timings.tsv"; }
stage() {
  title=$1
  shift
  began=$SECONDS left=$(((all - done) * (20 + SECONDS) / (20 + done)))
  number=$((number + 1)) done=$((done + stages[number - 1]))
  ! grep -q "^$title"$'\t' "$demo/timings.tsv" || return 0
  printf '\n== %d/%d %s   %s so far, about %s left\n$ %s\n' \
    "$number" "${#stages[@]}" "$title" "$(clock "$began")" "$(clock "$left")" "$*"
  trap 'note "$title, interrupted"' EXIT
  "$@"
  trap - EXIT
  note "$title"
}

rm -rf "$demo-old"
[ ! -e "$demo/report.html" ] || mv "$demo" "$demo-old" # half a removal is no beginning
rm -rf "$demo-old"
mkdir -p "$demo"
touch "$demo/timings.tsv"
[ ! -s "$demo/timings.tsv" ] || echo "Going on where it was interrupted; make clean begins anew"
cp "demo/${subject}_vae.ckpt" "$vae" # frozen, of demo/train_vae.py; comes ready made, as KL-16 does
echo "$begin on real $subject; output in $demo"
SECONDS=$(awk '{ sum += $NF } END { print sum + 0 }' "$demo/timings.tsv") # of what was interrupted

stage "Real $subject as PNG files, $size px" \
  python -m "demo.$subject" --output "$demo/data" ${some[@]+"${some[@]}"}

stage 'Cache the latents, on 2 processes' \
  $two main_cache.py --img_size $size --vae_path "$vae" --data_path "$demo/data" \
  --cached_path "$demo/cache" --shard_size 360 --num_workers 0 --device cpu

stage 'Train the generator, on 2 processes' \
  $two main_tokenbridge.py --config "configs/$subject.yaml" \
  --cached_path "$demo/cache" --vae_path "$vae" --val_path "$demo/data/val" \
  --output_dir "$demo/model" --resume auto --device cpu "${train[@]}"

stage 'Export the averaged weights, for demo/generate.ipynb' \
  python -m util.export --resume "$demo/model" --output_dir "$demo/exported"

stage 'Reconstruct held-out images at several bit widths' \
  $two reconstruction.py \
  --image_dir "$demo/data/val" --img_size $size --vae_path "$vae" \
  --cached_path "$demo/cache" --bits "${bits[@]}" "${levels[@]}" --num_workers 0 --no_metrics \
  --output_dir "$demo/reconstruction" --device cpu

stage 'Train a classifier of real images, the judge' \
  python -m demo.classifier train --root "$demo" --network $subject "${judge[@]}"

stage 'Statistics of the training images, in its features' \
  python -m util.fid_stats --image_dir "$demo/data/train" --img_size $size --num_workers 0 \
  "${features[@]}" --output "$demo/statistics.npz" --device cpu

stage 'Generate images, with guidance, and measure them' \
  $two main_tokenbridge.py --evaluate \
  --vae_path "$vae" --resume "$demo/model" \
  "${sample[@]}" --seed "$seed" \
  "${features[@]}" --fid_stats "$demo/statistics.npz" --keep_images \
  --output_dir "$demo/generated" --device cpu

stage 'Judge them by the classifier' \
  python -m demo.classifier judge --root "$demo"

stage 'Report' \
  python -m demo.report --root "$demo" --subject $subject

printf '\nDone in %d min %02d s. Open %s in a browser; draw more with make app.\n' \
  $((SECONDS / 60)) $((SECONDS % 60)) "$demo/report.html"
