"""MAR's diffusion head: noise on a position's token is predicted by an MLP that is given z.

training: x_0 -> x_t at a random t -> net(x_t, t, z) -> epsilon, v -> (eps - eps_hat)^2 + vb
sampling: x_T ~ N(0, 1) -> ancestral steps over a subset of the timesteps -> x_0
v in [-1, 1] interpolates the log variance of a step between its posterior's and log beta.
Letters: M positions, r repeats (`diffusion_batch_mul`), C scalars of a token, T timesteps, S steps
of sampling, W width, N rows.
Source: MAR, arXiv 2406.11838, section 3; Nichol and Dhariwal, arXiv 2102.09672 (cosine schedule,
learned variance, respacing); Ho et al., arXiv 2006.11239 (the process).
"""

import math
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from models.config import TokenBridgeConfig
from models.heads import Head, normals
from models.layers import AdaLNLinear, AdaLNMLP, call, init_linear

TIMESTEPS = 1000
FREQUENCIES = 128  # of the sinusoid of t
HALF_BIN = 1 / 255  # of the discretised likelihood at t = 0


def cosine_betas() -> np.ndarray:
    """beta_t of the whole process, float64 [T]."""
    shares = ((i / TIMESTEPS + 0.008) / 1.008 for i in range(TIMESTEPS + 1))
    alpha_bars = [math.cos(share * math.pi / 2) ** 2 for share in shares]
    return np.array([min(1 - after / before, 0.999) for before, after in pairwise(alpha_bars)])


def respaced_timesteps(steps: int) -> np.ndarray:
    """S of the T timesteps, evenly spread, both ends among them, ascending. S = 1 is the first."""
    return np.unique(np.linspace(0, TIMESTEPS - 1, steps).round()).astype(np.int64)


def respaced_betas(timesteps: np.ndarray) -> np.ndarray:
    """beta of each step over a subset of the timesteps, the same alpha_bar at each: float64 [S]."""
    alphas_cumprod = np.cumprod(1 - cosine_betas())[timesteps]
    return 1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])


class Step(NamedTuple):
    """Coefficients of rows [..., 1], each of its own step, as the columns of `table`."""

    sqrt_alpha_bar: Tensor
    sqrt_noise: Tensor
    inverse_sqrt_alpha_bar: Tensor
    inverse_sqrt_noise: Tensor
    posterior_of_start: Tensor
    posterior_of_x: Tensor
    min_log_variance: Tensor
    max_log_variance: Tensor

    @staticmethod
    def table(betas: np.ndarray) -> Tensor:
        """float32 [S, 8], of all steps of a process."""
        after = np.cumprod(1 - betas)  # alpha_bar
        before = np.append(1.0, after[:-1])
        variance = betas * (1 - before) / (1 - after)  # of q(x_{t-1} | x_t, x_0)
        clipped = np.append(variance[1:2] if len(variance) > 1 else variance, variance[1:])
        columns = (
            np.sqrt(after),
            np.sqrt(1 - after),
            np.sqrt(1 / after),
            np.sqrt(1 / after - 1),
            betas * np.sqrt(before) / (1 - after),
            (1 - before) * np.sqrt(1 - betas) / (1 - after),
            np.log(clipped),
            np.log(betas),
        )
        return torch.from_numpy(np.stack(columns, axis=1)).float()

    def posterior_mean(self, start: Tensor, x: Tensor) -> Tensor:
        """Of q(x_{t-1} | x_t, x_0)."""
        return self.posterior_of_start * start + self.posterior_of_x * x

    def model_mean(self, x: Tensor, epsilon: Tensor) -> Tensor:
        start = self.inverse_sqrt_alpha_bar * x - self.inverse_sqrt_noise * epsilon
        return self.posterior_mean(start, x)

    def log_variance(self, v: Tensor) -> Tensor:
        share = (v + 1) / 2
        return share * self.max_log_variance + (1 - share) * self.min_log_variance


class TimeEmbedding(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width)
        )

    def forward(self, t: Tensor) -> Tensor:
        """t: [N] -> [N, W]: cosines, then sines, of t at falling frequencies, through an MLP."""
        powers = torch.arange(FREQUENCIES, device=t.device, dtype=torch.float32) / FREQUENCIES
        angles = t[:, None].float() * torch.exp(-math.log(10000) * powers)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))


class DenoisingMLP(nn.Module):
    """Named as in the published checkpoints."""

    def __init__(self, config: TokenBridgeConfig):
        super().__init__()
        width, channels = config.diffloss_w, config.token_dim
        self.time_embed = TimeEmbedding(width)
        self.cond_embed = nn.Linear(config.decoder_embed_dim, width)
        self.input_proj = nn.Linear(channels, width)
        self.res_blocks = nn.ModuleList(AdaLNMLP(width, width) for _ in range(config.diffloss_d))
        self.final_layer = AdaLNLinear(width, 2 * channels)
        self.apply(init_linear)
        for linear in self.time_embed.mlp[::2]:
            nn.init.normal_(linear.weight, std=0.02)
        for part in (*self.res_blocks, self.final_layer):  # adaLN-zero
            nn.init.zeros_(part.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def forward(self, x: Tensor, t: Tensor, z: Tensor, recompute: bool = False) -> Tensor:
        """x: [N, C], t: [N], z: [N, D] -> epsilon and v, [N, 2 C]."""
        return self.denoise(x, self.time_embed(t) + self.cond_embed(z), recompute)

    def denoise(self, x: Tensor, y: Tensor, recompute: bool = False) -> Tensor:
        """As `forward`, with t and z embedded, y: [N, W]."""
        x = self.input_proj(x)
        for block in self.res_blocks:
            x = call(block, x, y, recompute=recompute)
        return self.final_layer(x, y)


class DiffusionHead(Head):
    """Continuous: targets are the token's scalars. Its losses are of each scalar, [M, C]."""

    guides = True
    coefficients: Tensor
    timesteps: Tensor
    respaced: Tensor

    def __init__(self, config: TokenBridgeConfig):
        self.steps, self.repeats = config.num_sampling_steps, config.diffusion_batch_mul
        super().__init__((self.steps + 1) * config.token_dim, self.repeats)
        self.channels = config.token_dim
        self.net = DenoisingMLP(config)
        every, timesteps = (respaced_timesteps(steps) for steps in (TIMESTEPS, self.steps))
        self.register_buffer("coefficients", Step.table(respaced_betas(every)), persistent=False)
        self.register_buffer("respaced", Step.table(respaced_betas(timesteps)), persistent=False)
        self.register_buffer("timesteps", torch.from_numpy(timesteps), persistent=False)

    def noise(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Timesteps [M, r] and noise [M, r, C] of every repeat."""
        shape, device = (len(targets), self.repeats), targets.device
        t = torch.randint(TIMESTEPS, shape, device=device)
        return t, torch.randn(*shape, self.channels, device=device)

    def forward(self, z: Tensor, targets: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """z [M, D], targets [M, C], t and noise of `noise` -> mse + vb [M, C], over repeats."""
        return sum(self.parts(z, targets, t, noise)).mean(dim=1)

    def parts(self, z: Tensor, targets: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Squared error of epsilon, and the variational bound in bits, each [M, r, C]."""
        step = Step(*self.coefficients[t][..., None].unbind(dim=-2))  # each [M, r, 1]
        start = targets.float()[:, None].expand_as(noise)
        x = step.sqrt_alpha_bar * start + step.sqrt_noise * noise
        rows = z[:, None].expand(-1, t.shape[1], -1).flatten(0, 1)
        out = self.net(x.flatten(0, 1), t.flatten(), rows, self.grad_checkpointing).float()
        epsilon, v = out.view(*t.shape, -1).chunk(2, dim=-1)
        mean = step.model_mean(x, epsilon.detach())  # the bound trains the variance alone
        log_variance = step.log_variance(v)
        true_mean = step.posterior_mean(start, x)
        kl = gaussian_kl(true_mean, step.min_log_variance, mean, log_variance)
        nll = -discretised_log_likelihood(start, mean, log_variance / 2)
        bound = torch.where(t[..., None] == 0, nll, kl) / math.log(2)
        return (noise - epsilon).square(), bound

    def sample_rows(
        self, z: Tensor, uniforms: Tensor, temperature: float, guidance: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """z: [M, D], or [M, 2, D] with guidance. uniforms: [M, (S + 1) C], x_T and of each step."""
        noise = normals(uniforms).float().unflatten(1, (self.steps + 1, self.channels))
        x, guided = noise[:, 0], z.dim() == 3
        times = self.net.time_embed(self.timesteps)  # [S, W], once for all rows
        conditions = self.net.cond_embed(z.transpose(0, 1).flatten(0, 1) if guided else z)
        for i, k in enumerate(reversed(range(self.steps))):
            step = Step(*self.respaced[k])
            rows = torch.cat([x, x]) if guided else x
            epsilon, v = self.net.denoise(rows, times[k] + conditions).float().chunk(2, dim=-1)
            if guided:
                conditional, unconditional = epsilon.chunk(2)
                epsilon = unconditional + guidance * (conditional - unconditional)
                v = v[: len(z)]
            x = step.model_mean(x, epsilon)
            if k > 0:
                x = x + torch.exp(step.log_variance(v) / 2) * noise[:, i + 1] * temperature
        return x, torch.zeros(len(z), 1, device=z.device)


def gaussian_kl(mean: Tensor, log_variance: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL divergence of the first from the second, of every scalar, in nats."""
    ratio = torch.exp(log_variance - log_variance2)
    distance = (mean - mean2).square() * torch.exp(-log_variance2)
    return 0.5 * (-1 + log_variance2 - log_variance + ratio + distance)


def discretised_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Of a Gaussian in bins of half width 1/255 around x; beyond +-0.999 they are open."""

    def cdf(value: Tensor) -> Tensor:  # the published approximation
        inner = math.sqrt(2 / math.pi) * (value + 0.044715 * value.pow(3))
        return (1 + torch.tanh(inner)) / 2

    inverse = torch.exp(-log_scale)
    above = cdf(inverse * (x - mean + HALF_BIN))
    below = cdf(inverse * (x - mean - HALF_BIN))
    inside = torch.where(x > 0.999, 1 - below, above - below)
    return torch.where(x < -0.999, above, inside).clamp(min=1e-12).log()
