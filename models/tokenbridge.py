"""TokenBridge: quantizer, backbone and a head put together; latents -> loss.

training: latents -> patchify -> quantizer -> masking -> backbone -> channel head -> cross-entropy
A continuous head (models/heads/) reads the latents as they are: `quantizer` is None then.
Letters: B batch, L positions, C channels of a token, K levels, M masked positions of the batch.
Source: arXiv 2503.16430; MAR, arXiv 2406.11838, of whose models `mar_*` have the published layout.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.backbone import Backbone, patchify
from models.config import PRESETS, TokenBridgeConfig, preset
from models.heads.channel import ChannelHead
from models.heads.codebook import CodebookHead
from models.heads.diffusion import DiffusionHead
from models.heads.masked import MaskedHead, ParallelHead
from models.heads.mixture import MixtureHead
from models.hub import Pretrained
from models.layers import AdaLNBlock, AdaLNMLP, Block, take
from models.masking import split_mask, training_mask
from models.quantizer import build_quantizer
from models.tokenizers.kl16 import check_layout

HEADS = {
    "channel": ChannelHead,
    "parallel": ParallelHead,
    "masked": MaskedHead,
    "mixture": MixtureHead,
    "diffusion": DiffusionHead,
    "codebook": CodebookHead,
}
# Tensors, in the published names, whose size is that of the classes or of the grid.
CLASS_ROWS = "class_emb.weight"
POSITIONS = ("encoder_pos_embed_learned", "decoder_pos_embed_learned", "output_pos_embed")
POSITIONS += ("diffusion_pos_embed_learned",)  # in the place of the one before


class TokenBridge(nn.Module, Pretrained):
    """Keyword arguments: the fields of `TokenBridgeConfig`.

    grad_checkpointing: recompute all blocks in backward. head_chunk: see `Head.chunk`.
    """

    def __init__(
        self, *, grad_checkpointing: bool = False, head_chunk: int | None = None, **kwargs
    ):
        super().__init__()
        self.config = config = TokenBridgeConfig(**kwargs)
        self.backbone = Backbone(config)
        self.head = HEADS[config.head](config)
        levels = config.codebook_size or config.quant_levels
        limits = config.quant_min, config.quant_max
        self.quantizer = build_quantizer(config.quantizer, levels, *limits, config.vae_embed_dim)
        self.backbone.grad_checkpointing = self.head.grad_checkpointing = grad_checkpointing
        self.head.chunk = head_chunk

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Each block by itself; blocks of a kind share their graphs. The backbone's are of symbolic
        sizes; the head's in training is of its chunk's, where the positions fill several."""
        self.head.padded = True
        for block in self.modules():
            if isinstance(block, Block | AdaLNBlock | AdaLNMLP):
                block.compile(dynamic=isinstance(block, Block) or None, backend=backend)

    def forward(
        self,
        latents: Tensor,
        labels: Tensor | None,
        mask: Tensor | None = None,
        grad_scale: Tensor | float = 1.0,
    ) -> Tensor:
        """The head's mean loss over all masked positions; of `channel`, cross-entropy in nats.

        latents: [B, C, H, W] scaled. labels: [B] int64, or None for no class.
        mask: [B, L], true where masked, the same number in each row; drawn if None.
        grad_scale: what backward will multiply the loss by, a number or a tensor.
        Raises ValueError on other shapes.
        """
        z, targets = self.conditions(latents, labels, mask)  # [M, D], [M, C]
        # The cross-entropy is in `ChannelHead.forward`. A loss on z is added here, without
        # grad_scale: autograd multiplies it anyway.
        return self.head.loss(z, targets, grad_scale)

    def channel_losses(
        self, latents: Tensor, labels: Tensor | None, mask: Tensor | None = None
    ) -> Tensor:
        """Mean loss of each channel, [C] in natural order, for validation; [1] of some heads."""
        return self.head.losses(*self.conditions(latents, labels, mask)).mean(dim=0)

    def logits(self, latents: Tensor, labels: Tensor | None, mask: Tensor) -> Tensor:
        """Teacher-forced logits of the masked positions, row by row: [M, C, K], natural order.

        Of the channel head.
        """
        return self.head.logits(*self.conditions(latents, labels, mask))

    def conditions(
        self, latents: Tensor, labels: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """z [M, D] and the head's targets [M, C] of the masked positions, or of `head_share` of
        them where the mask is drawn; arguments as those of `forward`.
        """
        config, batch = self.config, len(latents)
        if latents.shape[1:] != config.latent_shape:
            found = tuple(latents.shape)
            raise ValueError(f"latents are {found}, expected [B, *{config.latent_shape}]")
        if mask is not None:
            visible, positions = split_mask(mask)
        else:
            how = config.mask_ratios, config.head_share
            visible, positions = training_mask(batch, config.seq_len, *how, latents.device)
        targets = values = patchify(latents, config.patch_size)  # [B, L, C]
        if self.quantizer is not None:
            targets = self.quantizer.encode(values)
            values = self.quantizer.decode(targets)
        classes = self.backbone.class_embedding(labels, batch)
        z = self.backbone(values, classes, visible, positions)
        return z.flatten(0, 1), take(targets, positions).flatten(0, 1)

    def published_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) in the published names and order."""
        return iter(self._published(dict(self.named_parameters())).items())

    def published_state_dict(self) -> dict[str, Tensor]:
        """All tensors, parameters and buffers, in the published layout."""
        return self._published(self.state_dict())

    def load_published(self, state: dict[str, Tensor], head_input: str = "published") -> None:
        """Load a state dict of the published layout, buffers present or (as in an EMA) absent.

        head_input: of the sampler from now on; files that say nothing of it are published ones.
        Raises ValueError, naming the tensors, unless all of them match.
        """
        own, parameters = self.published_state_dict(), dict(self.published_parameters())
        check_layout(state, {k: t for k, t in own.items() if k in state or k in parameters})
        tables = {} if self.quantizer is None else self.quantizer.state_dict()
        for name, table in tables.items():
            if not self.quantizer.fitted and name not in state:
                raise ValueError("it holds no levels, and this model's own ones are not set")
            given = state.get(name, table).cpu().float()
            if self.quantizer.fitted and not torch.allclose(given, table.cpu(), atol=1e-4):
                raise ValueError(f"the checkpoint's quantizer differs from this one in {name!r}")
        new = own | state
        self.load_state_dict({name: new[self._published_name(name)] for name in self.state_dict()})
        self.config = replace(self.config, head_input=head_input)

    def _published_name(self, name: str) -> str:
        """Ours without the part (backbone, head, quantizer), but for two of MAR's."""
        name = name.split(".", 1)[1]
        if self.config.head != "diffusion":
            return name
        name = name.replace("output_pos_embed", "diffusion_pos_embed_learned")
        return f"diffloss.{name}" if name.startswith("net.") else name

    def _published(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """In the published names and order: first those that belong to no submodule."""
        named = {self._published_name(name): tensor for name, tensor in tensors.items()}
        return dict(sorted(named.items(), key=lambda item: "." in item[0]))


_models = [partial(TokenBridge, **preset(name)) for name in PRESETS]
tokenbridge_tiny, tokenbridge_small, tokenbridge_base, tokenbridge_large = _models[:4]
tokenbridge_huge, mar_base, mar_large, mar_huge = _models[4:]


def resized_positions(state: dict[str, Tensor], side: int) -> dict[str, Tensor]:
    """A published state dict with its tables of positions, [1, S + L, D] or [1, L, D], interpolated
    from their square to one of side x side; the S slots stay."""
    tables = [name for name in POSITIONS if name in state]
    length = state[tables[-1]].shape[1]
    before = math.isqrt(length)
    if before == side:
        return state

    def resized(table: Tensor) -> Tensor:
        slots, grid = table.float().split([table.shape[1] - length, length], dim=1)
        grid = grid.unflatten(1, (before, before)).movedim(-1, 1)  # [1, D, h, w]
        grid = F.interpolate(grid, (side, side), mode="bicubic", antialias=True)
        return torch.cat([slots, grid.flatten(2).mT], dim=1)

    return state | {name: resized(state[name]) for name in tables}
