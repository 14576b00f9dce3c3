"""Export a checkpoint's weights as a folder of the Hugging Face form.

python -m util.export --resume FOLDER --output_dir OUT

writes OUT/model.safetensors, OUT/config.json and a card, OUT/README.md, which
`TokenBridge.from_pretrained(OUT)` reads. A checkpoint made here knows its settings; one of the
published code takes them from the flags (--model, --quant_bits, ...). --vae_path, if given, is
compared with the model and its checksum noted.
"""

import argparse
import sys
from pathlib import Path

from models.hub import WEIGHTS, Origin
from models.tokenbridge import TokenBridge
from util.args import add_model_flags, add_vae_flags
from util.build import ModelFlags, build_config, build_model, build_vae, check_vae, warn_other_vae
from util.checkpoint import AUTO, WEIGHT_KEYS, Checkpoint, find_checkpoint
from util.dist import run
from util.download import HUB_ERRORS
from util.errors import UserError, as_user_error
from util.files import check_writable
from util.parser import Parser
from util.vae import vae_digest


def make_parser() -> Parser:
    parser = Parser(__doc__)
    group = parser.add_argument_group("export")
    add = group.add_argument
    add("--resume", required=True, help="folder or file of the checkpoint")
    add("--output_dir", required=True, help="folder to write")
    add("--eval_weights", choices=WEIGHT_KEYS, default="ema", help="averaged or raw weights")
    add("--push_to_hub", metavar="NAMESPACE/NAME", help="and put it there; see hf auth login")
    add_vae_flags(parser)
    add_model_flags(parser)
    return parser


def main() -> None:
    args = make_parser().parse()
    if args.resume == AUTO:
        raise UserError("--resume auto: name the folder whose newest checkpoint is to be exported")
    check_writable(args.output_dir, "--output_dir")
    checkpoint = find_checkpoint(args.resume, args.resume, must_exist=True)
    model = load(args, checkpoint)
    checkpoint.release()
    with as_user_error(f"--output_dir {args.output_dir}: cannot write", (OSError,)):
        model.save_pretrained(args.output_dir)
    tell(args, checkpoint, model)
    if args.push_to_hub:
        with as_user_error(f"--push_to_hub {args.push_to_hub}", HUB_ERRORS):
            print(f"pushed to {model.push_to_hub(args.push_to_hub)}")


def load(args: argparse.Namespace, checkpoint: Checkpoint) -> TokenBridge:
    """The model with the weights that were asked for, and what is known of them."""
    vae = build_vae(args) if "vae_path" in args.explicit else None
    config = build_config(ModelFlags.of(args), checkpoint, manifest=None, vae=vae)
    made_by = checkpoint.saved.get("vae_sha256")
    if vae is not None:
        check_vae(vae, config, args.vae_path)
        made_by = vae_digest(args.vae_path)
        warn_other_vae(checkpoint, made_by)
    model = build_model(config, checkpoint, checkpoint.key(args.eval_weights))
    saved = checkpoint.saved
    known = {name: checkpoint.whole_number(name) for name in ("step", "epoch") if name in saved}
    known["vae_sha256"] = str(made_by) if made_by else None
    model.origin = Origin(args.eval_weights, classes=checkpoint.classes or None, **known)
    return model.eval()


def tell(args: argparse.Namespace, checkpoint: Checkpoint, model: TokenBridge) -> None:
    path = Path(args.output_dir) / WEIGHTS
    count = sum(parameter.numel() for parameter in model.parameters())
    step = f", step {model.origin.step}" if model.origin.step is not None else ""
    print(
        f"{path}: {count:,} parameters, the {args.eval_weights} weights of {checkpoint.path}{step}"
    )
    if checkpoint.config is None:
        print(
            f"note: {checkpoint.path} does not say its settings; they are the flags' and KL-16's",
            file=sys.stderr,
        )


if __name__ == "__main__":
    run(main)
