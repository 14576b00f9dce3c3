"""VQ-16 of LlamaGen: a convolutional autoencoder whose latents are entries of one codebook.

    code(z) = argmin_k |n(z) - n(e_k)|^2,  value = n(e_k),  n(x) = x / |x|

The network is that of `kl16` in other names; tensor names are those of the published file.
Letters: B batch, K codes, C their width, S stride, h = H / S, N = B h w positions.
Source: Sun et al., arXiv 2406.06525; the straight-through gradient: arXiv 1711.00937.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.tokenizers import kl16
from models.tokenizers.kl16 import conv1x1, fastest_layout, shape_of

# The published tokenizer: 71,883,403 parameters, stride 16.
VQ16 = {
    "codebook_size": 16384,
    "embed_dim": 8,
    "ch_mult": (1, 1, 2, 2, 4),
    "ch": 128,
    "num_res_blocks": 2,
    "z_channels": 256,
}
EMBEDDING = "quantize.embedding.weight"
USED = "quantize.codebook_used"
ROWS = 4096  # positions compared with the codebook at once: 256 MiB of distances at 16,384 codes


class Codebook(nn.Module):
    """embedding: [K, C], read l2-normalised. codebook_used: of the published file, never read."""

    def __init__(self, size: int, width: int):
        super().__init__()
        self.register_buffer("codebook_used", torch.zeros(65536))
        self.embedding = nn.Embedding(size, width)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z: [B, C, h, w], of any length -> the nearest codes [B, C, h, w], indices [B, h, w].

        The gradient of the codes is that of n(z).
        """
        z = F.normalize(z, dim=1)
        codebook = F.normalize(self.embedding.weight, dim=1)
        indices = nearest(z.detach().movedim(1, -1), codebook.detach())
        codes = codebook.detach()[indices].movedim(-1, 1)
        return codes + (z - z.detach()), indices


def nearest(z: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest code by squared distance. z: [..., C], codebook: [K, C] -> [...]."""
    with torch.autocast(z.device.type, enabled=False):  # half precision confuses neighbours
        square = codebook.square().sum(dim=1)  # |z|^2 is the same for all codes
        rows = z.float().reshape(-1, z.shape[-1]).split(ROWS)
        found = [torch.addmm(square, part, codebook.T, alpha=-2).argmin(dim=1) for part in rows]
    return torch.cat(found).view(z.shape[:-1])


def renamed(network: nn.Module) -> nn.Module:
    """The same network by the published names, which count inner parts as they are run."""
    counted, parts = {"down": "conv_blocks", "up": "conv_blocks", "mid": "mid"}, {}
    for name, part in network.named_children():
        if name in counted:
            part = nn.Sequential(*(reversed(part) if name == "up" else part))
        parts[counted.get(name, name)] = part
    return nn.Sequential(OrderedDict(parts))


class VQModel(kl16.VAE):
    """The tokenizer, of the settings in `VQ16` unless others are given.

    codebook_size: K. embed_dim: C. z_channels: of the encoder's output, before 1x1 to C.
    ch, ch_mult, num_res_blocks: as of `kl16.AutoencoderKL`.
    Raises ValueError on an unknown setting, or if ch does not fit the group norms.
    """

    def __init__(self, **settings):
        if unknown := set(settings) - set(VQ16):
            raise ValueError(f"unknown VQ settings {sorted(unknown)}")
        config = VQ16 | settings
        config["ch_mult"] = tuple(config["ch_mult"])
        ch, blocks, z_channels = (config[name] for name in ("ch", "num_res_blocks", "z_channels"))
        super().__init__(config, config["embed_dim"], 2 ** (len(config["ch_mult"]) - 1))
        widths = [ch * mult for mult in config["ch_mult"]]
        coarsest = (len(widths) - 1,)  # which alone attends
        self.encoder = renamed(kl16.encoder([ch, *widths], blocks, z_channels, coarsest, "res"))
        self.decoder = renamed(kl16.decoder(widths, blocks + 1, z_channels, coarsest, "res"))
        self.quantize = Codebook(config["codebook_size"], self.channels)
        self.quant_conv = conv1x1(z_channels, self.channels)
        self.post_quant_conv = conv1x1(self.channels, z_channels)

    @staticmethod
    def settings_of(state: dict[str, Tensor]) -> dict:
        return kl16.sizes_of(state, "conv_blocks", "res") | {
            "codebook_size": shape_of(state, EMBEDDING)[0],
            "embed_dim": shape_of(state, "quant_conv.weight")[0],
            "z_channels": shape_of(state, "encoder.conv_out.weight")[0],
        }

    @property
    def codebook(self) -> Tensor:
        """[K, C], of length one."""
        return F.normalize(self.quantize.embedding.weight, dim=1)

    def before_quantizer(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> [B, C, h, w], which `quantize` takes."""
        return self.quant_conv(self.encoder(fastest_layout(images))).contiguous()

    def indices(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> [B, h, w] int64 in [0, K)."""
        return self.quantize(self.before_quantizer(images))[1]

    def codes(self, indices: Tensor) -> Tensor:
        """[B, h, w] int64 in [0, K) -> latents [B, C, h, w]."""
        return self.codebook[indices].movedim(-1, 1).contiguous()

    def moments(self, images: Tensor) -> Tensor:
        """The mean is the code; the log-variance is so small that a sample is the code too."""
        mean = self.codes(self.indices(images))
        return torch.cat([mean, torch.full_like(mean, kl16.LOGVAR_RANGE[0])], dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(fastest_layout(latents))).contiguous()

    def load_published(self, state: dict[str, Tensor]) -> None:
        super().load_published({USED: self.quantize.codebook_used} | state)
