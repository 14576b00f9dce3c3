"""GIVT's head: a mixture of Gaussians with diagonal covariance over a position's scalars.

Letters: M positions, C scalars of a token, G components.
Source: GIVT, arXiv 2312.02116, section 3.3.
"""

import math

from torch import Tensor, nn

from models.config import TokenBridgeConfig
from models.heads import Head, inverse_cdf, normals

LEAST_SCALE = 1e-6


class MixtureHead(Head):
    """Continuous. Its loss is one for a position, [M, 1]: nats, summed over the channels.

    The temperature multiplies the deviations; published: 0.95.
    """

    def __init__(self, config: TokenBridgeConfig):
        super().__init__(draws=1 + config.token_dim)
        self.components, self.channels = config.mixture_components, config.token_dim
        self.linear = nn.Linear(config.decoder_embed_dim, self.components * (1 + 2 * self.channels))
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def mixture(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z [M, D] -> logits of the components [M, G], means and scales [M, G, C]."""
        out = self.linear(z).float()
        logits, rest = out.split([self.components, out.shape[1] - self.components], dim=1)
        means, x = rest.unflatten(1, (2, self.components, self.channels)).unbind(dim=1)
        scales = (x + (x.square() + 4).sqrt()) / 2
        return logits, means, scales.clamp(min=LEAST_SCALE)

    def forward(self, z: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihood of the targets [M, C] -> [M, 1]."""
        return -self._log_density(targets, *self.mixture(z))[:, None]

    def _log_density(self, x: Tensor, logits: Tensor, means: Tensor, scales: Tensor) -> Tensor:
        normal = -((x.float()[:, None] - means) / scales).square() / 2 - scales.log()
        of_each = normal.sum(dim=-1) - self.channels * math.log(2 * math.pi) / 2  # [M, G]
        return (logits.log_softmax(dim=1) + of_each).logsumexp(dim=1)

    def sample_rows(self, z: Tensor, uniforms: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """uniforms: [M, 1 + C], of the component and of each channel."""
        logits, means, scales = self.mixture(z)
        component, _ = inverse_cdf(logits, uniforms[:, 0], 1.0)
        chosen = component[:, None, None].expand(-1, 1, self.channels)
        mean, scale = (x.gather(1, chosen)[:, 0] for x in (means, scales))
        values = mean + temperature * scale * normals(uniforms[:, 1:]).float()
        return values, self._log_density(values, logits, means, scales)[:, None]
