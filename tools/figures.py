"""Draw the figures of docs/method.md: quantizer, channel head, mask schedule.

python tools/figures.py [--output docs/images]
Every number is asked of models/. Letters: K levels, S iterations.
"""

from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch.distributions import Normal

from models.config import TokenBridgeConfig
from models.masking import mask_schedule
from models.quantizer import SPAN, GaussianQuantizer
from util import dist
from util.args import Parser

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
BLUE, PALE, ORANGE, GREY = "#2b6cb0", "#bcd4ee", "#dd6b20", "#8a94a3"
BITS = (2, 3, 4, 5, 6)
SHADED = 4  # bits whose cells are drawn under the density
ITERATIONS = (8, 64, 256)
PUBLISHED = TokenBridgeConfig()


def levels_and_edges(bits: int) -> tuple[list[float], list[float]]:
    """Of the published range: K levels, and the K - 1 places where the nearest level changes."""
    low, high = PUBLISHED.quant_min, PUBLISHED.quant_max
    quantizer = GaussianQuantizer(2**bits, low, high)
    edges = (quantizer.midpoints + SPAN) / (2 * SPAN) * (high - low) + low
    return quantizer.decode(torch.arange(2**bits)).tolist(), edges.tolist()


def quantizer_figure() -> Figure:
    """N(0, 1) cut into cells, the wider normal that would use all levels alike; levels by bits."""
    figure = new_figure(8, 4.4)
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=(1.35, 1))
    low, high = PUBLISHED.quant_min, PUBLISHED.quant_max
    borders = [low, *levels_and_edges(SHADED)[1], high]
    for i, ends in enumerate(zip(borders, borders[1:], strict=False)):
        x = torch.linspace(*ends, 60)
        top.fill_between(x, Normal(0, 1).log_prob(x).exp(), color=BLUE if i % 2 else PALE)
    x, wide = torch.linspace(low, high, 500), high / SPAN
    top.plot(x, Normal(0, 1).log_prob(x).exp(), "k", label="latents, N(0, 1)")
    label = f"what the levels are made for: stretched by {wide:.2f} = {high:g}/{SPAN:g}"
    top.plot(x, Normal(0, wide).log_prob(x).exp(), "--", color=ORANGE, label=label)
    top.set(xlim=(low, high), ylim=(0, 0.53), yticks=[], title=f"{2**SHADED} cells")
    top.legend(frameon=False, fontsize=8)
    for row, bits in enumerate(BITS):
        levels, edges = levels_and_edges(bits)
        below.vlines(edges, row - 0.34, row + 0.34, color=GREY, linewidth=0.6)
        below.plot(levels, [row] * len(levels), "o", color=BLUE, markersize=7 - bits)
    below.set_yticks(range(len(BITS)), [f"{b} bits, {2**b} levels" for b in BITS])
    below.set(ylim=(len(BITS) - 0.4, -0.6), xlabel="scaled latent: levels (dots) and edges")
    return figure


def head_figure() -> Figure:
    """What the head reads and predicts; some of the last channels are left out."""
    order, figure = PUBLISHED.channel_order, new_figure(8, 3.2)
    axes = figure.add_subplot(xlim=(-1.6, 7.6), ylim=(-0.5, 3.4))
    axes.axis("off")
    axes.fill_between([-0.4, 7.4], 1.1, 1.9, color=PALE)
    axes.text(3.5, 1.4, f"causal transformer, {PUBLISHED.channel_depth} blocks", ha="center")
    box(axes, -1.1, 1.5, "z of one\nposition", ORANGE)
    arrow(axes, (-0.7, 1.5), (-0.3, 1.5))
    axes.text(-0.4, 3.2, "channels of the position, low frequencies first")
    for place, number in enumerate([0, 1, 2, 3, 4, len(order) - 2, len(order) - 1]):
        x = place + (number > 4)  # the dots are between
        read = f"level of\n{order[number - 1]}" if number else "z"
        box(axes, x, 0, read, PALE if number else ORANGE)
        box(axes, x, 2.75, f"channel\n{order[number]}", BLUE, "white")
        arrow(axes, (x, 0.35), (x, 1.1))
        arrow(axes, (x, 1.9), (x, 2.4))
    for y in (0, 2.75):
        axes.text(5, y, "…", ha="center", va="center", fontsize=16)
    return figure


def box(axes: Axes, x: float, y: float, words: str, color: str, ink: str = "black") -> None:
    around = dict(boxstyle="round", facecolor=color, edgecolor=GREY)
    axes.text(x, y, words, ha="center", va="center", color=ink, fontsize=8, bbox=around)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.annotate("", end, start, arrowprops=dict(arrowstyle="-|>", color=GREY))


def filled_positions(num_iter: int) -> list[int]:
    """Of each sampling iteration of a published model."""
    return [before - after for before, after, _ in mask_schedule(PUBLISHED.seq_len, num_iter)]


def mask_figure() -> Figure:
    figure = new_figure(8, 2.7)
    axes = figure.subplots(1, len(ITERATIONS) + 1)
    for panel, num_iter in zip(axes, ITERATIONS, strict=False):
        panel.bar(range(1, num_iter + 1), filled_positions(num_iter), width=1.0, color=BLUE)
        panel.set(xlabel="iteration", ylabel="positions filled", title=f"{num_iter} iterations")
        panel.yaxis.get_major_locator().set_params(integer=True, nbins=5)
    counts, chances = zip(*PUBLISHED.mask_ratios.counts(PUBLISHED.seq_len), strict=True)
    axes[-1].bar(counts, [100 * c for c in chances], width=1.0, color=ORANGE)
    axes[-1].set(xlabel="positions masked", ylabel="% of the steps", title="training")
    return figure


def new_figure(width: float, height: float) -> Figure:
    """White behind it, so that it is read on dark pages, too."""
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


FIGURES = {"levels.png": quantizer_figure, "head.png": head_figure, "masks.png": mask_figure}


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--output", type=Path, default=IMAGES, help="folder")
    args = parser.parse()
    args.output.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        draw().savefig(args.output / name, dpi=130)
        print(f"written: {args.output / name}")


if __name__ == "__main__":
    dist.run(main)
