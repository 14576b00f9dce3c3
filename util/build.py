"""From flags, a checkpoint and a cache's manifest to the objects a script works with."""

import argparse
import sys
from dataclasses import dataclass, replace

from torch import Tensor

from models.calibration import fit_levels
from models.config import PUBLISHED_LATENT_SCALE, TokenBridgeConfig, default_channel_order, preset
from models.tokenbridge import CLASS_ROWS, TokenBridge
from models.tokenizers.kl16 import VAE
from util import dist
from util.checkpoint import FINETUNE, WEIGHT_KEYS, Checkpoint
from util.data.histogram import LatentHistogram
from util.data.latent_cache import open_cache
from util.errors import UserError, as_user_error
from util.vae import load_vae

# Settings that may change from one use of the same weights to the next.
BEHAVIOUR = ("attn_dropout", "proj_dropout", "label_drop_prob", "mask_ratio_min", "head_input")
# Settings that belong to the tokenizer's latents and can be measured.
LATENT = ("latent_scale", "channel_order")


@dataclass(frozen=True)
class ModelFlags:
    """What the command line says of the model.

    settings: of `TokenBridgeConfig`, the flags' defaults included; latent_scale and channel_order
    only where they are not "auto". given: the names of those that were given.
    """

    settings: dict
    given: frozenset[str]

    @classmethod
    def of(cls, args: argparse.Namespace) -> "ModelFlags":
        direct = ["img_size", "vae_stride", "patch_size", "vae_embed_dim", "class_num"]
        direct += ["buffer_size", "quant_min", "quant_max", "quantizer", *BEHAVIOUR]
        direct += [name for name in LATENT if getattr(args, name) != "auto"]
        sizes = preset(args.model)
        settings = {name: getattr(args, name) for name in direct}
        given = {name for name in direct if name in args.explicit}
        given |= set(sizes) if "model" in args.explicit else set()
        given |= {"quant_levels"} if "quant_bits" in args.explicit else set()
        return cls(sizes | settings | {"quant_levels": 2**args.quant_bits}, frozenset(given))


def build_config(
    flags: ModelFlags,
    checkpoint: Checkpoint | None,
    manifest: dict | None,
    vae: VAE | None,
    classes: int | None = None,
) -> TokenBridgeConfig:
    """The model's settings.

    A checkpoint made here knows them: a flag that was given must agree with it, unless it only
    changes behaviour. Otherwise they are the flags, completed by what is known of the latents.
    classes: of the data, if there are any; the model's where neither flag nor checkpoint says.
    """
    if checkpoint is not None and checkpoint.config is not None:
        return _agreed_config(flags, checkpoint)
    known = _known_latents(flags, checkpoint, manifest, vae)
    if checkpoint is None and classes:
        known["class_num"] = classes
    if checkpoint is not None:
        if flags.settings["quantizer"] == "calibrated":
            raise UserError(
                f"--quantizer calibrated, but {checkpoint.named} was made by the published "
                "code, which has the published one; leave the flag out"
            )
        known["head_input"] = "published"  # as the released checkpoints were measured
        if not checkpoint.begins:  # of which class_num is a flag, see util/inputs.py
            known |= _class_num(checkpoint)
    settings = flags.settings | {k: v for k, v in known.items() if k not in flags.given}
    missing = [f"--{name}" for name in LATENT if name not in settings]
    if missing:
        raise UserError(
            f"--vae_path is not KL-16, so {' and '.join(missing)} must be given; or cache its "
            "latents with main_cache.py, which measures them, and name the cache with --cached_path"
        )
    with as_user_error():
        return TokenBridgeConfig(**settings)


def _class_num(checkpoint: Checkpoint) -> dict:
    """The rows of the table of classes, where the weights alone tell."""
    states = (checkpoint.saved.get(key) for key in WEIGHT_KEYS.values())
    tables = (state.get(CLASS_ROWS) for state in states if isinstance(state, dict))
    found = [len(table) for table in tables if isinstance(table, Tensor) and table.dim() == 2]
    return {"class_num": found[0]} if found else {}


def _agreed_config(flags: ModelFlags, checkpoint: Checkpoint) -> TokenBridgeConfig:
    """The checkpoint's settings, with those flags that were given and may differ."""
    saved = checkpoint.config
    given = {name: value for name, value in flags.settings.items() if name in flags.given}
    with as_user_error():
        asked = replace(saved, **given)
    for name in given:
        found, wanted = getattr(saved, name), getattr(asked, name)
        if name not in BEHAVIOUR and found != wanted:
            raise UserError(
                f"{checkpoint.named} has {name} {found}, but the flags say {wanted}; "
                f"leave the flag out, or name another checkpoint{_finetune_hint(name, checkpoint)}"
            )
    return asked


def _finetune_hint(name: str, checkpoint: Checkpoint) -> str:
    changes = name in ("class_num", "img_size") and not checkpoint.begins
    return (
        f"; to train on with another {name}, {FINETUNE} in the place of --resume" if changes else ""
    )


def _known_latents(
    flags: ModelFlags,
    checkpoint: Checkpoint | None,
    manifest: dict | None,
    vae: VAE | None,
) -> dict:
    """Channels, stride, scale and channel order of the latents, as far as anything tells them.

    A cache's manifest knows them all; a VAE its shape, and if it is KL-16 the published constants;
    published checkpoints and caches, which say nothing, belong to KL-16.
    """
    if manifest is not None:
        channels, side, _ = manifest["latent_shape"]
        known = {name: manifest[name] for name in LATENT}
        return known | {"vae_embed_dim": channels, "vae_stride": manifest["image_size"] // side}
    known = {}
    if vae is not None:
        known = {"vae_embed_dim": vae.channels, "vae_stride": vae.stride}
    if checkpoint is not None or vae is None or vae.is_kl16:
        channels = known.get("vae_embed_dim", flags.settings["vae_embed_dim"])
        known["latent_scale"] = PUBLISHED_LATENT_SCALE
        known["channel_order"] = default_channel_order(channels)
    return known


def build_model(
    config: TokenBridgeConfig,
    checkpoint: Checkpoint | None,
    weights: str = "model",
    grad_checkpointing: bool = False,
    head_chunk: int | None = None,
    levels: tuple[Tensor, Tensor] | None = None,
) -> TokenBridge:
    """A model, with the checkpoint's weights under that key if there is a checkpoint.

    levels: of a calibrated quantizer, where no checkpoint brings them (see `calibrated_levels`).
    """
    with as_user_error():
        model = TokenBridge(
            **config.to_dict(), grad_checkpointing=grad_checkpointing, head_chunk=head_chunk
        )
    if levels is not None:
        model.quantizer.set_levels(*levels)
    if checkpoint is not None:
        if config.quantizer == "calibrated":  # averaged weights come without buffers
            with as_user_error(checkpoint.named, (ValueError, KeyError)):
                kept = checkpoint.weights("model")
                model.quantizer.set_levels(kept["boundaries"], kept["reconstruction_values"])
        checkpoint.load_into(model, weights)
    return model


def cache_histogram(cached_path: str, channels: int, vae_sha256: str | None) -> LatentHistogram:
    """The distribution of a cache's latents, not scaled, which --quantizer calibrated fits.

    Raises UserError unless the cache is of this VAE and knows it.
    """
    if not cached_path:
        raise UserError(
            "--quantizer calibrated needs --cached_path, a cache of main_cache.py: its levels are "
            "fitted to the latents' distribution, which the cache knows"
        )
    manifest = open_cache(cached_path, vae_sha256=vae_sha256).manifest
    if manifest is None or not manifest.get("histogram"):
        raise UserError(
            f"--cached_path {cached_path} does not say how its latents are distributed, which "
            "--quantizer calibrated needs; make a new cache with this version's main_cache.py"
        )
    with as_user_error(f"--cached_path {cached_path}: manifest.json is damaged"):
        histogram = LatentHistogram.from_dict(manifest["histogram"])
        if len(histogram.counts) != channels:
            raise ValueError(f"a histogram of {len(histogram.counts)} channels, not {channels}")
    return histogram


def calibrated_levels(
    histogram: LatentHistogram, levels: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Boundaries [C, K + 1] and values [C, K], float32, that fit latents multiplied by scale."""
    with as_user_error("--quantizer calibrated"):
        fitted = fit_levels(histogram.counts, histogram.bin_widths(scale), levels)
    boundaries, values = (table.float() for table in fitted)
    return boundaries, values


def build_vae(args: argparse.Namespace) -> VAE:
    """The VAE of --vae_path, checked against --vae_embed_dim and --img_size where given."""
    given = "vae_embed_dim" in args.explicit
    vae = load_vae(args.vae_path, args.vae_embed_dim if given else None)
    if "img_size" in args.explicit and args.img_size % vae.stride:
        raise UserError(f"--img_size {args.img_size} is not a multiple of the stride {vae.stride}")
    return vae


def check_vae(vae: VAE, config: TokenBridgeConfig, path: str) -> None:
    """Raise UserError unless the VAE makes latents of the model's shape."""
    found = (vae.channels, vae.stride)
    expected = (config.vae_embed_dim, config.vae_stride)
    if found != expected:
        raise UserError(
            f"--vae_path {path} has {found[0]} channels and stride {found[1]}, the model "
            f"{expected[0]} and {expected[1]}; see --vae_embed_dim and --vae_stride"
        )


def warn_other_vae(checkpoint: Checkpoint, vae_sha256: str) -> None:
    """Say so if the checkpoint was trained on another VAE's latents: its images will be wrong."""
    trained = checkpoint.saved.get("vae_sha256")
    if trained and trained != vae_sha256 and dist.is_main():
        print(
            f"warning: {checkpoint.path} was trained with another VAE file (sha256 {trained[:12]}, "
            f"this one {vae_sha256[:12]}); unless its weights are the same, all figures are wrong",
            file=sys.stderr,
        )
