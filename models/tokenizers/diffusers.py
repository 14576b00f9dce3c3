"""A diffusers AutoencoderKL as tokenizer: that of Stable Diffusion, SDXL, SD 3, Flux, or one's own.

The network is diffusers' own code, read by its own loader and wrapped as a `VAE` of kl16.py. Its
latents are unscaled and unshifted, as the encoder makes them: `scaling_factor`, `shift_factor`,
`latents_mean` and `latents_std` of its configuration are for diffusers' pipelines, and never
applied here. The scale that brings latents to unit variance is measured (util/data/statistics.py)
and belongs to `models.tokenizers.tokenizer`.
"""

import logging
from inspect import signature
from pathlib import Path

import torch
from torch import Tensor

from models.tokenizers.kl16 import VAE, fastest_layout

CLASS = "AutoencoderKL"


class DiffusersVAE(VAE):
    """folder: of a saved AutoencoderKL. config: its config.json. variant: fp16, for example.

    All arithmetic is float32, whatever the weights were saved in.
    Raises ImportError where diffusers is not installed, ValueError unless settings and tensors
    are all known and there, and whatever diffusers raises on damaged ones.
    """

    def __init__(self, folder: Path, config: dict, variant: str | None = None):
        import diffusers  # an optional extra, and two seconds to import

        if config.get("_class_name") != CLASS:
            raise ValueError(
                f"config.json is of {config.get('_class_name', 'no class of diffusers')}; "
                f"the only one that is a tokenizer here is {CLASS}"
            )
        log = logging.getLogger("diffusers")
        level = log.level
        log.setLevel(logging.CRITICAL)  # what it warns of is an error here
        try:
            with torch.random.fork_rng(devices=[]):
                network, loaded = diffusers.AutoencoderKL.from_pretrained(
                    folder,
                    variant=variant,
                    torch_dtype=torch.float32,
                    use_safetensors=True,
                    local_files_only=True,
                    low_cpu_mem_usage=False,
                    output_loading_info=True,
                )
        finally:
            log.setLevel(level)
        settings = {name: value for name, value in config.items() if not name.startswith("_")}
        known = signature(diffusers.AutoencoderKL).parameters
        loaded["unknown settings"] = sorted(set(settings) - set(known))
        for what, names in loaded.items():
            if names:
                raise ValueError(
                    f"config.json and tensors do not match for diffusers {diffusers.__version__}, "
                    f"{what}: {', '.join(map(str, names[:3]))}"
                )
        if not network.config.in_channels == network.config.out_channels == 3:
            raise ValueError(f"in_channels is {network.config.in_channels}, and images have 3")
        levels = len(network.config.block_out_channels)
        settings = {"class": f"diffusers {CLASS}"} | settings
        super().__init__(settings, network.config.latent_channels, stride=2 ** (levels - 1))
        self.network = network

    def moments(self, images: Tensor) -> Tensor:
        return self.network.encode(fastest_layout(images)).latent_dist.parameters.contiguous()

    def decode(self, latents: Tensor) -> Tensor:
        return self.network.decode(fastest_layout(latents)).sample.contiguous()
