"""Reuse of features between sampling iterations: an approximation, off unless asked for.

The features of most positions hardly change from one iteration to the next. Every `refresh`-th
computes all; in between only the positions just filled (in encoder and decoder) and those to be
predicted now (in the decoder) are computed, and attend to the keys and values that all others had
when they were last computed. With refresh 1 the result is the plain backbone's.
Letters: N sequences, L positions, S class slots, T = S + L, F positions just filled, n to predict,
R rows of the T computed now, D width.
Source: the idea of LazyMAR, arXiv 2503.12450, which chooses what to compute by similarity.
"""

import torch
from torch import Tensor

from models.backbone import Backbone
from models.layers import KVCache, take
from models.masking import Mask


class CachedBackbone:
    """To be called as `Backbone`, once an iteration, with the same sequences each time."""

    def __init__(self, backbone: Backbone, refresh: int):
        self.backbone, self.refresh, self.calls = backbone, refresh, 0
        self.caches: dict[torch.nn.Module, KVCache] = {}  # of every block

    @torch.no_grad()
    def __call__(
        self, values: Tensor, classes: Tensor, mask: Mask, positions: Tensor, filled: Tensor
    ) -> Tensor:
        """filled: [N, F], positions filled since the last call -> z [N, n, D] of `positions`."""
        whole = self.calls % self.refresh == 0
        self.calls += 1
        self._encode(self.backbone.embed(values, classes), mask, filled, whole)
        return self._decode(positions, filled, whole)

    def _encode(self, x: Tensor, mask: Mask, filled: Tensor, whole: bool) -> None:
        """Renew what the decoder is given: [N, T, D], mask tokens included."""
        net = self.backbone
        slots = torch.arange(net.num_slots, device=x.device).expand(len(x), -1)
        visible = torch.cat([slots, mask.visible + net.num_slots], dim=1)  # rows [N, S + V]
        rows = visible if whole else filled + net.num_slots
        attended = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        attended.scatter_(1, visible, True)
        length = x.shape[1]
        x = self._run(net.encoder_blocks, take(x, rows), rows, attended[:, None, None])
        x = net.decoder_embed(net.encoder_norm(x))
        if whole:
            self.embedded = net.mask_token.to(x.dtype).expand(len(x), length, -1).clone()
        self.embedded.scatter_(1, rows[..., None].expand_as(x), x)

    def _decode(self, positions: Tensor, filled: Tensor, whole: bool) -> Tensor:
        net = self.backbone
        x = self.embedded + net.decoder_pos_embed_learned
        rows = torch.cat([filled, positions], dim=1) + net.num_slots
        if whole:
            rows = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
        x = self._run(net.decoder_blocks, take(x, rows), rows)
        x = take(x, positions + net.num_slots) if whole else x[:, filled.shape[1] :]
        return net.conditions(x, positions)

    def _run(
        self, blocks: torch.nn.ModuleList, x: Tensor, rows: Tensor, visible: Tensor | None = None
    ) -> Tensor:
        """x: [N, R, D] of the rows [N, R], through the blocks."""
        for block in blocks:
            if block not in self.caches:
                length = self.backbone.num_slots + self.backbone.output_pos_embed.shape[1]
                self.caches[block] = KVCache.empty(x, block.attn.heads, length)
            x = block(x, cache=self.caches[block]._replace(positions=rows, visible=visible))
        return x
