"""From flags, a checkpoint and a cache's manifest to the objects a script works with."""

import argparse
import sys

from models.config import PUBLISHED_LATENT_SCALE, TokenBridgeConfig, default_channel_order, preset
from models.tokenbridge import TokenBridge
from models.vae import AutoencoderKL
from util.checkpoint import Checkpoint, load_vae
from util.errors import UserError, as_user_error

# Settings that may change from one use of the same weights to the next.
BEHAVIOUR = (
    "attn_dropout",
    "proj_dropout",
    "label_drop_prob",
    "mask_ratio_min",
    "head_input",
)


def build_config(
    args: argparse.Namespace,
    checkpoint: Checkpoint | None,
    manifest: dict | None,
    vae: AutoencoderKL | None,
) -> TokenBridgeConfig:
    """The model's settings.

    A checkpoint made here knows them: a flag that was given must agree with it, unless it only
    changes behaviour. Otherwise they are the flags, with the latent scale and the channel order
    of the cache's manifest or, for KL-16, the published ones.
    """
    asked = _flag_settings(args)
    saved = checkpoint.config.to_dict() if checkpoint and checkpoint.config else None
    if saved is None:
        if checkpoint is not None and "head_input" not in args.explicit:
            asked["head_input"] = "published"  # as the released checkpoints were measured
        asked |= _latent_geometry(args, manifest, vae)
        asked |= _latent_settings(args, checkpoint, manifest, vae)
        with as_user_error():
            return TokenBridgeConfig(**asked)
    given = _given_settings(args, asked)
    for name, value in given.items():
        if name not in BEHAVIOUR and value != saved[name]:
            raise UserError(
                f"--resume {checkpoint.path} has {name} {saved[name]}, but the flags say {value}; "
                "leave the flag out, or name another checkpoint"
            )
    with as_user_error():
        return TokenBridgeConfig.from_dict(saved | given)


def _flag_settings(args: argparse.Namespace) -> dict:
    """The settings that flags hold, but for the latent scale and the channel order."""
    direct = ("img_size", "vae_stride", "patch_size", "vae_embed_dim", "class_num", "buffer_size")
    direct += ("quant_min", "quant_max", *BEHAVIOUR)
    return {
        **preset(args.model),
        **{name: getattr(args, name) for name in direct},
        "quant_levels": 2**args.quant_bits,
    }


def _given_settings(args: argparse.Namespace, asked: dict) -> dict:
    """Those settings whose flags were given on the command line."""
    names = {name for name in args.explicit if name in asked}
    names |= set(preset(args.model)) if "model" in args.explicit else set()
    names |= {"quant_levels"} if "quant_bits" in args.explicit else set()
    given = {name: asked[name] for name in names}
    if args.latent_scale != "auto":
        given["latent_scale"] = args.latent_scale
    if args.channel_order != "auto":
        given["channel_order"] = list(args.channel_order)
    return given


def _latent_geometry(
    args: argparse.Namespace, manifest: dict | None, vae: AutoencoderKL | None
) -> dict:
    """Channels and stride of the latents that are there, unless a flag says otherwise."""
    found = {}
    if manifest is not None:
        channels, side, _ = manifest["latent_shape"]
        found = {"vae_embed_dim": channels, "vae_stride": manifest["image_size"] // side}
    elif vae is not None:
        found = {"vae_embed_dim": vae.config["embed_dim"], "vae_stride": vae.stride}
    return {name: value for name, value in found.items() if name not in args.explicit}


def _latent_settings(
    args: argparse.Namespace,
    checkpoint: Checkpoint | None,
    manifest: dict | None,
    vae: AutoencoderKL | None,
) -> dict:
    """Latent scale and channel order: the flags', the manifest's, or KL-16's published ones."""
    known = None
    if manifest is not None:
        known = {key: manifest[key] for key in ("latent_scale", "channel_order")}
    elif checkpoint is not None or vae is None or vae.is_kl16:
        known = {
            "latent_scale": PUBLISHED_LATENT_SCALE,
            "channel_order": default_channel_order(args.vae_embed_dim),
        }
    flags = {"latent_scale": args.latent_scale, "channel_order": args.channel_order}
    missing = [f"--{name}" for name, value in flags.items() if value == "auto"]
    if known is None and missing:
        raise UserError(
            f"--vae_path {args.vae_path} is not KL-16, so {' and '.join(missing)} must be given; "
            "or cache its latents with main_cache.py, which measures them, and use --use_cached"
        )
    return {key: known[key] if value == "auto" else value for key, value in flags.items()}


def build_model(
    config: TokenBridgeConfig,
    checkpoint: Checkpoint | None,
    weights: str = "model",
    grad_checkpointing: bool = False,
) -> TokenBridge:
    """A model, with the checkpoint's weights under that key if there is a checkpoint."""
    with as_user_error():
        model = TokenBridge(**config.to_dict(), grad_checkpointing=grad_checkpointing)
    if checkpoint is not None:
        checkpoint.load_into(model, weights)
    return model


def build_vae(args: argparse.Namespace) -> AutoencoderKL:
    """The VAE of --vae_path, checked against --vae_embed_dim (if given) and --img_size."""
    given = "vae_embed_dim" in args.explicit
    vae = load_vae(args.vae_path, args.vae_embed_dim if given else None)
    if "img_size" in args.explicit and args.img_size % vae.stride:
        raise UserError(f"--img_size {args.img_size} is not a multiple of the stride {vae.stride}")
    return vae


def check_vae(vae: AutoencoderKL, config: TokenBridgeConfig, path: str) -> None:
    """Raise UserError unless the VAE makes latents of the model's shape."""
    found = (vae.config["embed_dim"], vae.stride)
    expected = (config.vae_embed_dim, config.vae_stride)
    if found != expected:
        raise UserError(
            f"--vae_path {path} has {found[0]} channels and stride {found[1]}, the model "
            f"{expected[0]} and {expected[1]}; see --vae_embed_dim and --vae_stride"
        )


def warn_other_vae(checkpoint: Checkpoint, vae_sha256: str) -> None:
    """Say so if the checkpoint was trained on another VAE's latents: its images will be wrong."""
    trained = checkpoint.saved.get("vae_sha256")
    if trained and trained != vae_sha256:
        print(
            f"warning: {checkpoint.path} was trained with another VAE file (sha256 {trained[:12]}, "
            f"this one {vae_sha256[:12]}); unless its weights are the same, all figures are wrong",
            file=sys.stderr,
        )
