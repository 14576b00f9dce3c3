"""A diffusers AutoencoderKL as tokenizer: that of Stable Diffusion, SDXL, SD 3, Flux, or one's own.

The network is diffusers' own code, wrapped as a `VAE` of kl16.py. Its latents are unscaled and
unshifted, as the encoder makes them: `scaling_factor`, `shift_factor`, `latents_mean` and
`latents_std` of its configuration are for diffusers' pipelines, and never applied here. The scale
that brings latents to unit variance is measured (util/data/statistics.py) and belongs to
`models.tokenizers.tokenizer`.
Letters: B batch, C latent channels, h = H / stride.
"""

import re
from inspect import signature

import torch
from torch import Tensor

from models.tokenizers.kl16 import VAE, check_layout, fastest_layout

CLASS = "AutoencoderKL"
SIZES = ("latent_channels", "layers_per_block", "norm_num_groups")
LISTS = ("block_out_channels", "down_block_types", "up_block_types")
MAX_SIZE = 4096  # of any setting; a configuration that claims more is not built
# Attention as early diffusers named it, and the files of Stable Diffusion 1 and 2 still do.
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class DiffusersVAE(VAE):
    """config: of diffusers, `config.json` of a saved AutoencoderKL. state: its tensors, any floats.

    All arithmetic is float32, whatever the weights were saved in.
    Raises ImportError where diffusers is not installed, and ValueError, TypeError or whatever
    diffusers raises on a configuration of something else, and on tensors that do not match it.
    """

    def __init__(self, config: dict, state: dict[str, Tensor]):
        import diffusers  # an optional extra, and two seconds to import

        settings = check_config(config, len(state))
        unknown = set(settings) - set(signature(diffusers.AutoencoderKL).parameters)
        if unknown:
            raise ValueError(
                f"diffusers {diffusers.__version__} knows nothing of {min(unknown)[:60]!r} in "
                "config.json; a newer one may"
            )
        state = {current_name(name): tensor for name, tensor in state.items()}
        with torch.device("meta"):  # no size is given memory before the tensors have it
            network = diffusers.AutoencoderKL(**settings)
        check_layout(state, network.state_dict())
        for name, tensor in state.items():
            if not tensor.is_floating_point():
                raise ValueError(f"tensor {name} is {tensor.dtype}, not floating point")
            state[name] = tensor.to(torch.float32, copy=True)
        network.load_state_dict(state, assign=True)
        levels = len(network.config.block_out_channels)
        kept = {"class": f"diffusers {CLASS}"} | settings
        super().__init__(kept, channels=network.config.latent_channels, stride=2 ** (levels - 1))
        self.network = network

    def moments(self, images: Tensor) -> Tensor:
        return self.network.encode(fastest_layout(images)).latent_dist.parameters.contiguous()

    def decode(self, latents: Tensor) -> Tensor:
        return self.network.decode(fastest_layout(latents)).sample.contiguous()


def check_config(config: dict, tensors: int) -> dict:
    """The keyword arguments of diffusers' class. tensors: how many the network has.

    Raises ValueError on another class, on images that are not RGB, and on sizes beyond reason.
    """
    found = config.get("_class_name")
    if found != CLASS:
        raise ValueError(
            f"config.json is of {str(found)[:60] if found else 'no class of diffusers'}; "
            f"the only one that is a tokenizer here is {CLASS}"
        )
    settings = {name: value for name, value in config.items() if not name.startswith("_")}
    missing = [name for name in (*SIZES, *LISTS) if name not in settings]
    if missing:
        raise ValueError(f"config.json says nothing of {', '.join(missing)}")
    for name in ("in_channels", "out_channels"):
        if settings.get(name, 3) != 3:
            raise ValueError(f"{name} is {str(settings[name])[:20]}, and images have 3")
    if not all(isinstance(settings[name], list | tuple) for name in LISTS):
        raise ValueError(f"config.json has no lists of {', '.join(LISTS)}")
    numbers = [*(settings[name] for name in SIZES), *settings["block_out_channels"]]
    if not all(type(n) is int and 0 < n <= MAX_SIZE for n in numbers):
        raise ValueError("config.json has sizes that no autoencoder has")
    (blocks, *others) = (len(settings[name]) for name in LISTS)
    if set(others) != {blocks} or not 0 < blocks * settings["layers_per_block"] <= tensors:
        raise ValueError("config.json has another number of blocks than of widths or tensors")
    return settings


def current_name(name: str) -> str:
    """A tensor's name as diffusers has it today."""
    old = "|".join(OLD_NAMES)
    pattern = rf"(\.attentions\.\d+\.)({old})(\.)"
    return re.sub(pattern, lambda match: match[1] + OLD_NAMES[match[2]] + match[3], name)
