"""Measure both quantizers at several bit widths; write tables and figure of docs/quantizer.md.

python tools/quantizer_table.py --cached_path output/demo/cache

On N(0, 1) data: points that are equally likely, fitted to and measured on. On a cache's latents:
one posterior sample of each; levels are fitted to every second image and measured on the others.
"""

import platform
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from models.calibration import EXPONENT, fit_levels
from models.quantizer import CalibratedQuantizer, GaussianQuantizer, entropy, level_counts
from models.tokenizers.kl16 import Posterior
from util.args import bit_width
from util.data.histogram import LatentHistogram, posterior_noise
from util.data.latent_cache import open_cache
from util.dist import run
from util.errors import UserError
from util.files import atomic_write
from util.page import write_between
from util.parser import Parser
from util.provenance import processor

ROOT = Path(__file__).resolve().parent.parent
MARK = "tools/quantizer_table.py"  # of the place in the page
POINTS = 2**22  # of N(0, 1)
LIMIT = 5.0  # the published range
EXPONENTS = (1 / 3, EXPONENT, 0.5, 0.7, 1.0)


@dataclass(frozen=True)
class Data:
    """name: for the table. fitted, measured: [N, C] latents, scaled."""

    name: str
    fitted: Tensor
    measured: Tensor


@dataclass(frozen=True)
class Cost:
    """Means over channels. error: mean squared. bits: entropy. outside: share beyond the range."""

    error: float
    bits: float
    outside: float


def normal_data() -> Data:
    uniforms = (torch.arange(POINTS, dtype=torch.float64) + 0.5) / POINTS
    points = torch.special.ndtri(uniforms)[:, None]
    return Data("N(0, 1)", points, points)


def cached_data(path: str) -> Data:
    """Posterior samples x scale: of even images to fit to, of odd ones to measure on."""
    cache = open_cache(path)
    if cache.manifest is None:
        raise UserError(f"--cached_path {path} does not say its scale; make one with main_cache.py")
    halves = []
    for start in (0, 1):
        keys = [(i, flip) for i in range(start, len(cache), 2) for flip in (False, True)]
        samples = [sample(cache[key][0]) for key in keys]
        halves.append(torch.stack(samples).movedim(1, -1).flatten(0, 2))
    scale = cache.manifest["latent_scale"]
    return Data(f"{len(cache)} images' latents", *(half * scale for half in halves))


def sample(moments: Tensor) -> Tensor:
    """moments: [2C, h, w] -> [C, h, w] float64."""
    posterior = Posterior(moments[None].double())
    return (posterior.mean + posterior.std * posterior_noise(moments))[0]


def published(bits: int) -> GaussianQuantizer:
    return GaussianQuantizer(2**bits, -LIMIT, LIMIT)


def calibrated(data: Data, bits: int, exponent: float = EXPONENT) -> CalibratedQuantizer:
    histogram = LatentHistogram.of(data.fitted[:, :, None, None])
    tables = fit_levels(histogram.counts, histogram.bin_widths(), 2**bits, exponent)
    quantizer = CalibratedQuantizer(2**bits, data.fitted.shape[1])
    quantizer.set_levels(*(table.float() for table in tables))
    return quantizer


def cost(quantizer: GaussianQuantizer | CalibratedQuantizer, latents: Tensor) -> Cost:
    """latents: [N, C]."""
    indices = quantizer.encode(latents)
    error = (quantizer.decode(indices).double() - latents).square().mean().item()
    bits = entropy(level_counts(indices, quantizer.levels)).mean().item()
    return Cost(error, bits, quantizer.outside(latents).double().mean().item())


def table(data: Data, rows: dict[int, tuple[Cost, Cost]]) -> list[str]:
    """rows: bits -> costs of the published and of the calibrated quantizer."""
    channels = data.measured.shape[1]
    lines = [
        f"**{data.name}** ({len(data.measured):,} values measured, {channels} "
        f"channel{'s' if channels > 1 else ''}; beyond ±{LIMIT:g}: "
        f"{next(iter(rows.values()))[0].outside:.4%})",
        "",
        "| bits | MSE published | calibrated | ratio | entropy published | calibrated |",
        "|---|---|---|---|---|---|",
    ]
    for bits, (old, new) in rows.items():
        lines.append(
            f"| {bits} | {old.error:.4g} | {new.error:.4g} | {new.error / old.error:.4f} "
            f"| {old.bits:.4f} | {new.bits:.4f} |"
        )
    return [*lines, ""]


def exponent_table(data: list[Data], bits: int) -> list[str]:
    """What other densities of levels would give: MSE and entropy at one width."""
    lines = [
        f"At {bits} bits, with other densities of levels f^a (MSE, entropy):",
        "",
        "| a | " + " | ".join(d.name for d in data) + " |",
        "|---|" + "---|" * len(data),
    ]
    for exponent in EXPONENTS:
        costs = [cost(calibrated(d, bits, exponent), d.measured) for d in data]
        cells = " | ".join(f"{c.error:.4g}, {c.bits:.3f}" for c in costs)
        lines.append(f"| {exponent:.3g} | {cells} |")
    return [*lines, ""]


def provenance() -> str:
    return (
        f"Measured by `tools/quantizer_table.py` on one thread of {processor()} "
        f"({platform.machine()}), {platform.system()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}."
    )


def draw(path: Path, results: dict[str, dict[int, tuple[Cost, Cost]]]) -> None:
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    left = figure.add_subplot(1, 2, 1, xlabel="bits", title="mean squared error", yscale="log")
    right = figure.add_subplot(1, 2, 2, xlabel="bits", title="bits not used (bits - entropy)")
    for color, (name, rows) in zip(("tab:blue", "tab:orange"), results.items(), strict=False):
        for which, (style, kind) in enumerate((("o--", "published"), ("o-", "calibrated"))):
            costs = [pair[which] for pair in rows.values()]
            looks = {"color": color, "label": f"{name}, {kind}", "markersize": 3}
            left.plot(list(rows), [c.error for c in costs], style, **looks)
            unused = [bits - c.bits for bits, c in zip(rows, costs, strict=True)]
            right.plot(list(rows), unused, style, **looks)
    left.legend(fontsize="x-small")
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--cached_path", required=True, help="a cache of main_cache.py")
    parser.add_argument("--bits", type=bit_width, nargs="+", default=list(range(2, 9)))
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "quantizer.md")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs" / "images" / "quantizer.png")
    args = parser.parse()
    torch.set_num_threads(1)
    data = [normal_data(), cached_data(args.cached_path)]
    lines, results = [], {}
    for d in data:
        rows = {
            bits: (cost(published(bits), d.measured), cost(calibrated(d, bits), d.measured))
            for bits in args.bits
        }
        results[d.name] = rows
        lines += table(d, rows)
    lines += [*exponent_table(data, 6), provenance(), ""]
    print("\n".join(lines))
    write_between(args.page, MARK, lines)
    draw(args.figure, results)


if __name__ == "__main__":
    run(main)
