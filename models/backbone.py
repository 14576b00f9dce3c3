"""Masked-autoencoder transformer: visible tokens -> a condition vector for every position.

The encoder sees the class slots and the visible tokens only; the decoder sees mask tokens in
place of the others.
Letters: B batch, L positions, V visible, n of them to predict, S class slots (`buffer_size`),
D width, C token scalars, p patch size; of the cache N sequences, T = S + L, F positions just
filled, R rows of the T computed now.
Source: MAR, arXiv 2406.11838; arXiv 2503.16430.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.config import TokenBridgeConfig
from models.layers import Block, KVCache, LayerNorm, call, init_linear, learned, take


def patchify(latents: Tensor, patch_size: int) -> Tensor:
    """[B, C, H, W] -> [B, L, C*p*p]: tokens row-major, channel-major inside a token."""
    return F.pixel_unshuffle(latents, patch_size).flatten(2).mT


def unpatchify(tokens: Tensor, patch_size: int, grid_size: int) -> Tensor:
    """[B, L, C*p*p] with L = grid_size^2 -> [B, C, H, W]."""
    return F.pixel_shuffle(tokens.mT.unflatten(2, (grid_size, grid_size)), patch_size)


class Backbone(nn.Module):
    def __init__(self, config: TokenBridgeConfig):
        super().__init__()
        self.grad_checkpointing = False
        self.num_slots = config.buffer_size
        self.label_drop_prob = config.label_drop_prob
        width, out_width = config.encoder_embed_dim, config.decoder_embed_dim
        how = (config.mlp_ratio, config.attn_dropout, config.proj_dropout)

        self.fake_latent = learned(1, width)  # the embedding of "no class"
        self.encoder_pos_embed_learned = learned(1, self.num_slots + config.seq_len, width)
        self.mask_token = learned(1, 1, out_width)
        self.decoder_pos_embed_learned = learned(1, self.num_slots + config.seq_len, out_width)
        self.output_pos_embed = learned(1, config.seq_len, out_width)

        self.class_emb = nn.Embedding(config.class_num, width)
        self.z_proj = nn.Linear(config.token_dim, width)
        self.z_proj_ln = LayerNorm(width)
        self.encoder_blocks = nn.ModuleList(
            Block(width, config.encoder_num_heads, *how) for _ in range(config.encoder_depth)
        )
        self.encoder_norm = LayerNorm(width)
        self.decoder_embed = nn.Linear(width, out_width)
        self.decoder_blocks = nn.ModuleList(
            Block(out_width, config.decoder_num_heads, *how) for _ in range(config.decoder_depth)
        )
        self.decoder_norm = LayerNorm(out_width)
        self.apply(init_linear)
        nn.init.normal_(self.class_emb.weight, std=0.02)

    def class_embedding(self, labels: Tensor | None, batch: int) -> Tensor:
        """labels: [B] int64, or None for no class -> [B, D].

        In training a label is dropped, independently, with probability `label_drop_prob`.
        """
        if labels is None:
            return self.fake_latent.expand(batch, -1)
        embedding = self.class_emb(labels)
        if not self.training:
            return embedding
        dropped = torch.rand(batch, 1, device=labels.device) < self.label_drop_prob
        return torch.where(dropped, self.fake_latent.to(embedding.dtype), embedding)

    def embed(self, values: Tensor, class_embedding: Tensor) -> Tensor:
        """values: [B, L, C] dequantized tokens, class_embedding: [B, D] -> [B, S + L, D]."""
        x = self.z_proj(values)  # [B, L, D]
        slots = class_embedding[:, None].expand(-1, self.num_slots, -1)
        x = torch.cat([slots, x], dim=1) + self.encoder_pos_embed_learned
        return self.z_proj_ln(x)

    def encode(self, values: Tensor, class_embedding: Tensor, visible: Tensor) -> Tensor:
        """values: [B, L, C], read at the visible positions [B, V] alone -> [B, S + V, D]."""
        x = self.embed(values, class_embedding)
        slots, x = x.split([self.num_slots, values.shape[1]], dim=1)
        x = torch.cat([slots, take(x, visible)], dim=1)
        for block in self.encoder_blocks:
            x = call(block, x, recompute=self.grad_checkpointing)
        return self.encoder_norm(x)

    def decode(self, encoded: Tensor, visible: Tensor, positions: Tensor) -> Tensor:
        """encoded: [B, S + V, D] -> z [B, n, D], the conditions of the positions [B, n].

        The last block computes those alone: nobody reads the others.
        """
        x = self.decoder_embed(encoded)
        slots, tokens = x.split([self.num_slots, visible.shape[1]], dim=1)
        length = self.output_pos_embed.shape[1]
        x = self.mask_token.to(x.dtype).expand(x.shape[0], length, -1)
        x = x.scatter(1, visible[..., None].expand_as(tokens), tokens)
        x = torch.cat([slots, x], dim=1) + self.decoder_pos_embed_learned  # [B, S + L, D]
        *blocks, last = self.decoder_blocks
        for block in blocks:
            x = call(block, x, recompute=self.grad_checkpointing)
        x = call(last, x, positions + self.num_slots, recompute=self.grad_checkpointing)
        return self.conditions(x, positions)

    def conditions(self, x: Tensor, positions: Tensor) -> Tensor:
        """What the last block makes of the positions [B, n], [B, n, D] -> their z."""
        return self.decoder_norm(x) + self.output_pos_embed[0, positions]

    def forward(
        self, values: Tensor, class_embedding: Tensor, visible: Tensor, positions: Tensor
    ) -> Tensor:
        """values: [B, L, C], class_embedding: [B, D] -> z of the positions [B, n]: [B, n, D]."""
        return self.decode(self.encode(values, class_embedding, visible), visible, positions)


class CachedBackbone:
    """Reuse of features between sampling iterations: an approximation, off unless asked for.

    To be called as `Backbone`, once an iteration. The features of most positions hardly change from
    one iteration to the next. Every `refresh`-th computes all; in between only the positions just
    filled (in encoder and decoder) and those to be predicted now (in the decoder) are computed, and
    attend to the keys and values that all others had when they were last computed. With refresh 0
    or 1 the result is the plain backbone's. Another number of sequences begins anew, so that one
    object is of one batch of images, with and without guidance.
    Source: the idea of LazyMAR, arXiv 2503.12450, which chooses what to compute by similarity.
    """

    def __init__(self, backbone: Backbone, refresh: int):
        self.backbone, self.refresh, self.batch = backbone, refresh, 0

    @torch.no_grad()
    def __call__(
        self, values: Tensor, classes: Tensor, visible: Tensor, positions: Tensor, filled: Tensor
    ) -> Tensor:
        """filled: [N, F], positions filled since the last call -> z [N, n, D] of `positions`."""
        net, slots = self.backbone, self.backbone.num_slots
        if not self.refresh:
            return net(values, classes, visible, positions)
        if len(values) != self.batch:  # other sequences: with guidance, or without
            self.batch, self.calls, self.caches = len(values), 0, {}
        whole = self.calls % self.refresh == 0
        self.calls += 1

        x = net.embed(values, classes)
        every = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)  # rows [N, T]
        visible = torch.cat([every[:, :slots], visible + slots], dim=1)  # [N, S + V]
        attended = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        attended.scatter_(1, visible, True)
        rows = visible if whole else filled + slots
        x = self._run(net.encoder_blocks, take(x, rows), rows, attended[:, None, None])
        x = net.decoder_embed(net.encoder_norm(x))
        if whole:  # what the decoder is given, mask tokens included
            self.embedded = net.mask_token.to(x.dtype).expand(*every.shape, -1).clone()
        self.embedded.scatter_(1, rows[..., None].expand_as(x), x)

        x = self.embedded + net.decoder_pos_embed_learned  # [N, T, D]
        rows = every if whole else torch.cat([filled, positions], dim=1) + slots
        x = self._run(net.decoder_blocks, take(x, rows), rows)
        x = take(x, positions + slots) if whole else x[:, filled.shape[1] :]
        return net.conditions(x, positions)

    def _run(
        self, blocks: nn.ModuleList, x: Tensor, rows: Tensor, visible: Tensor | None = None
    ) -> Tensor:
        """x: [N, R, D] of the rows [N, R], through the blocks."""
        for block in blocks:
            if block not in self.caches:
                length = self.backbone.num_slots + self.backbone.output_pos_embed.shape[1]
                self.caches[block] = KVCache.empty(x, block.attn.heads, length)
            x = block(x, cache=self.caches[block]._replace(positions=rows, visible=visible))
        return x
