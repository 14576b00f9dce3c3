"""A diffusers AutoencoderKL as tokenizer: that of Stable Diffusion, SDXL, SD 3, Flux, or one's own.

Its latents are as the encoder makes them: `scaling_factor`, `shift_factor`, `latents_mean` and
`latents_std` of its configuration are never applied; the scale is measured, as that of any VAE.
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

    All arithmetic is float32. Raises ImportError where diffusers is not installed, ValueError
    unless settings and tensors are all known and there, and what diffusers raises on damaged ones.
    """

    def __init__(self, folder: Path, config: dict, variant: str | None = None):
        try:
            import diffusers  # an optional extra, and two seconds to import
        except ImportError as error:
            raise ImportError(f"{error}; pip install -e '.[diffusers]'") from error

        if (found := config.get("_class_name", "no class of diffusers")) != CLASS:
            raise ValueError(f"config.json is of {found}; only {CLASS} is a tokenizer here")
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
                listed = f"{what}: {', '.join(map(str, names[:3]))}"
                raise ValueError(f"it does not match diffusers {diffusers.__version__}, {listed}")
        if not network.config.in_channels == network.config.out_channels == 3:
            raise ValueError(f"in_channels is {network.config.in_channels}, and images have 3")
        stride = 2 ** (len(network.config.block_out_channels) - 1)
        settings = {"class": f"diffusers {CLASS}"} | settings
        super().__init__(settings, network.config.latent_channels, stride)
        self.network = network

    def moments(self, images: Tensor) -> Tensor:
        return self.network.encode(fastest_layout(images)).latent_dist.parameters.contiguous()

    def decode(self, latents: Tensor) -> Tensor:
        return self.network.decode(fastest_layout(latents)).sample.contiguous()
