"""Export a checkpoint's weights as a folder of the Hugging Face form.

python -m util.export --resume FOLDER --output_dir OUT

writes what `TokenBridge.from_pretrained(OUT)` reads. A checkpoint of the published code takes its
settings from the flags (--model, --quant_bits, ...).
"""

import argparse
from dataclasses import replace

from models.hub import Origin
from models.tokenbridge import TokenBridge
from models.tokenizers import kl16
from util import dist
from util.args import EVAL_WEIGHTS, MODEL, VAE, Parser
from util.checkpoint import AUTO, Checkpoint, find_checkpoint
from util.download import HUB_ERRORS
from util.errors import UserError, as_user_error
from util.setup import build_config, build_model, build_vae, check_vae, warn_other_vae
from util.vae import vae_digest


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_flags("export", EVAL_WEIGHTS).add_argument
    add("--resume", required=True, help="folder or file of the checkpoint")
    add("--output_dir", required=True, help="folder to write")
    add("--push_to_hub", metavar="NAMESPACE/NAME", help="and put it there; see hf auth login")
    parser.add_flags("tokenizer", *VAE)
    parser.add_flags("model", *MODEL)
    return parser


def load(
    args: argparse.Namespace, checkpoint: Checkpoint, weights: str, vae: kl16.VAE | None
) -> TokenBridge:
    """The model with those weights of --eval_weights, and in `origin` what is known of them."""
    config = build_config(args, checkpoint, vae=vae)
    model = build_model(config, checkpoint, checkpoint.key(weights))
    saved = checkpoint.saved
    known = {name: checkpoint.whole_number(name) for name in ("step", "epoch") if name in saved}
    classes, digest = checkpoint.classes or None, saved.get("vae_sha256")
    kind = "model" if weights == "model" else "ema"  # of any average
    drawn = {name: checkpoint.argument(name) for name in ("preview_iter", "cfg", "temperature")}
    drawn = {name: given for name, given in drawn.items() if given is not None}
    model.origin = Origin(kind, classes=classes, vae_sha256=digest, args=drawn or None, **known)
    return model.eval()


def main() -> None:
    args = make_parser().parse()
    if args.resume == AUTO:
        raise UserError("--resume auto: name the folder of the checkpoint")
    checkpoint = find_checkpoint(args.resume, args.resume, must_exist=True)
    vae = build_vae(args) if args.vae_path is not None else None
    model = load(args, checkpoint, args.eval_weights, vae)
    if vae is not None:
        check_vae(vae, model.config, args.vae_path)
        model.origin = replace(model.origin, vae_sha256=vae_digest(args.vae_path))
        warn_other_vae(checkpoint, model.origin.vae_sha256)
    with as_user_error(f"--output_dir {args.output_dir}: cannot write", (OSError,)):
        model.save_pretrained(args.output_dir)
    print(f"{args.output_dir}: the {args.eval_weights} weights of {checkpoint.path}")
    if args.push_to_hub:
        with as_user_error(f"--push_to_hub {args.push_to_hub}", HUB_ERRORS):
            print(f"pushed to {model.push_to_hub(args.push_to_hub)}")


if __name__ == "__main__":
    dist.run(main)
