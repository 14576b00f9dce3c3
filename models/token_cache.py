"""Reuse of features between sampling iterations: an approximation, off unless asked for.

From one iteration to the next, the features of most positions hardly change: those change that
were just filled, which were mask tokens before. Every `refresh`-th iteration computes all; in
between only the positions filled since the last iteration (in encoder and decoder) and those to
be predicted now (in the decoder) are computed, and see the keys and values that all others had
when they were last computed. With refresh 1 the result is the plain backbone's.
Letters: N sequences, L positions, S class slots, T = S + L, F positions just filled, n wanted,
D width, H heads, d = D / H.
Source: the idea of LazyMAR, arXiv 2503.12450, which chooses what to compute by similarity.
"""

import torch
from torch import Tensor, nn

from models.backbone import Backbone
from models.layers import Kept, take
from models.masking import Mask


class LazyBackbone:
    """Called once an iteration, with the same sequences each time; see `Backbone.forward`."""

    def __init__(self, backbone: Backbone, refresh: int):
        """refresh: iterations from one that computes everything to the next. Raises ValueError."""
        if refresh < 1:
            raise ValueError(f"a token cache that is renewed every {refresh} iterations")
        self.backbone, self.refresh = backbone, refresh
        self.calls = 0
        self.kept: list[tuple[Tensor, Tensor]] = []  # of every block, the encoder's first

    def __call__(
        self, values: Tensor, classes: Tensor, mask: Mask, positions: Tensor, filled: Tensor
    ) -> Tensor:
        """values: [N, L, C]. classes: [N, D]. positions: [N, n].

        filled: [N, F], those since the last call. Returns z of the positions [N, n, D].
        """
        whole = self.calls % self.refresh == 0
        self.calls += 1
        with torch.no_grad():
            self._encode(values, classes, mask, filled, whole)
            return self._decode(positions, filled, whole)

    def _encode(
        self, values: Tensor, classes: Tensor, mask: Mask, filled: Tensor, whole: bool
    ) -> None:
        """Renew what the decoder is given: [N, T, D], mask tokens included."""
        net, slots = self.backbone, self.backbone.num_slots
        x = net.embed(values, classes)
        rows = self._slots(mask.visible) if whole else filled + slots
        seen = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        seen.scatter_(1, self._slots(mask.visible), True)
        x = self._blocks(net.encoder_blocks, 0, take(x, rows), rows, seen[:, None, None])
        x = net.decoder_embed(net.encoder_norm(x))
        if whole:
            length = slots + values.shape[1]
            self.embedded = net.mask_token.to(x.dtype).expand(len(x), length, -1).clone()
        self.embedded.scatter_(1, rows[..., None].expand_as(x), x)

    def _decode(self, positions: Tensor, filled: Tensor, whole: bool) -> Tensor:
        net = self.backbone
        x = self.embedded + net.decoder_pos_embed_learned
        rows = torch.cat([filled, positions], dim=1) + net.num_slots
        if whole:
            rows = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
        x = self._blocks(
            net.decoder_blocks, len(net.encoder_blocks), take(x, rows), rows, seen=None
        )
        x = take(x, positions + net.num_slots) if whole else x[:, filled.shape[1] :]
        return net.conditions(x, positions)

    def _slots(self, positions: Tensor) -> Tensor:
        """Rows [N, S + V] of the class slots and of these positions."""
        slots = torch.arange(self.backbone.num_slots, device=positions.device)
        rows = positions + self.backbone.num_slots
        return torch.cat([slots.expand(len(rows), -1), rows], dim=1)

    def _blocks(
        self, blocks: nn.ModuleList, first: int, x: Tensor, rows: Tensor, seen: Tensor | None
    ) -> Tensor:
        """x: [N, R, D] of the rows [N, R], through the blocks."""
        for number, block in enumerate(blocks, first):
            if number == len(self.kept):
                self.kept.append(self._buffers(x, block.attn.heads))
            x = block(x, kept=Kept(*self.kept[number], rows, seen))
        return x

    def _buffers(self, x: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        """Places for the keys and values of all positions."""
        total = self.backbone.num_slots + self.backbone.output_pos_embed.shape[1]
        shape, device = (len(x), heads, total, x.shape[-1] // heads), x.device
        dtype = x.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        keys = torch.zeros(shape, dtype=dtype, device=device)
        return keys, torch.zeros_like(keys)
