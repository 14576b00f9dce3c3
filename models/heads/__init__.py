"""Heads: from the condition z of a position to the C*p*p scalars of its token.

What a head is. It is built from a `TokenBridgeConfig`, knows nothing of the grid and the mask, and
takes every row (position) on its own, so that rows can be split and joined. In and out, scalars
are in natural order; an order of prediction is the head's own business.

    head(z, indices) -> losses                      training and validation
        z        [M, D]  float, conditions of M positions
        indices  [M, T]  int64, the levels to predict
        losses   [M, T]  float32, in nats; their mean is what is minimised

    head.loss(z, indices, grad_scale) -> mean of head(z, indices)
    head.cross_entropies(z, indices) -> head(z, indices)
        both may work in chunks of `head.chunk` rows (models/chunks.py); with chunk 0 they do not

    head.sample(z, uniforms, temperature, head_input) -> indices, log_probs
        uniforms [M, T]  in [0, 1), all that is random about the draws
        indices  [M, T]  int64
        log_probs [M, T] float32, in nats, with which they were drawn

    head.grad_checkpointing: recompute blocks in backward.

The file `channel` holds the paper's: autoregressive over the channels.
"""
