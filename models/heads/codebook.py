"""One softmax over the codes of a learnt codebook: the discrete side of the comparison.

Letters: M positions, D width of z, K codes.
Source: LlamaGen, arXiv 2406.06525, whose classifier is one linear layer.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from models.config import TokenBridgeConfig
from models.heads import Head, inverse_cdf
from models.layers import init_linear


class CodebookHead(Head):
    """A token is one index, [M, 1]."""

    def __init__(self, config: TokenBridgeConfig):
        super().__init__(draws=1)
        self.classifier = nn.Linear(config.decoder_embed_dim, config.codebook_size)
        self.apply(init_linear)

    def forward(self, z: Tensor, indices: Tensor) -> Tensor:
        """Cross-entropy: z [M, D], indices [M, 1] -> [M, 1], in nats."""
        losses = F.cross_entropy(self.classifier(z).float(), indices[:, 0], reduction="none")
        return losses[:, None]

    def sample_rows(self, z: Tensor, uniforms: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        indices, log_probs = inverse_cdf(self.classifier(z), uniforms[:, 0], temperature)
        return indices[:, None], log_probs[:, None]
