"""Draw the figures of docs/method.md: quantizer, channel head, mask schedule.

python tools/figures.py [--output docs/images]
Every number is asked of models/: levels and edges of the quantizer, order of the channels,
positions of the schedule, distribution of the training mask.
Letters: K levels, L positions, S iterations.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from torch.distributions import Normal

from models.config import TokenBridgeConfig
from models.masking import mask_schedule, masked_counts
from models.quantizer import SPAN, GaussianQuantizer
from util.dist import run
from util.files import atomic_write, check_writable
from util.parser import Parser

ROOT = Path(__file__).resolve().parent.parent
BLUE, PALE, ORANGE, GREY, INK = "#2b6cb0", "#bcd4ee", "#dd6b20", "#8a94a3", "#1f2933"
BITS = (2, 3, 4, 5, 6)
SHADED = 4  # bits whose cells are drawn under the density
ITERATIONS = (8, 64, 256)
PUBLISHED = TokenBridgeConfig()


# --- quantizer


def levels_and_edges(bits: int) -> tuple[list[float], list[float]]:
    """Of the published range: K levels, and the K - 1 places where the nearest level changes."""
    quantizer = GaussianQuantizer(2**bits, PUBLISHED.quant_min, PUBLISHED.quant_max)
    levels = quantizer.decode(torch.arange(quantizer.levels)).tolist()
    width = quantizer.high - quantizer.low
    edges = (quantizer.midpoints + SPAN) / (2 * SPAN) * width + quantizer.low
    return levels, edges.tolist()


def quantizer_figure() -> Figure:
    figure = new_figure(8, 4.4)
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=(1.35, 1))
    draw_density(top)
    for row, bits in enumerate(BITS):
        levels, edges = levels_and_edges(bits)
        below.vlines(edges, row - 0.34, row + 0.34, color=GREY, linewidth=0.6)
        below.plot(levels, [row] * len(levels), "o", color=BLUE, markersize=7 - bits)
    below.set(ylim=(len(BITS) - 0.4, -0.6), xlabel="scaled latent")
    below.set_yticks(range(len(BITS)), [f"{b} bits, {2**b} levels" for b in BITS])
    below.tick_params(left=False)
    bare(below, "left")
    below.set_title("levels (dots) and the edges between them", loc="left", fontsize=9)
    return figure


def draw_density(axes: Axes) -> None:
    """N(0, 1) cut into cells, and the wider normal for which all levels would be equally likely."""
    low, high = PUBLISHED.quant_min, PUBLISHED.quant_max
    _, edges = levels_and_edges(SHADED)
    borders = [low, *edges, high]
    for i, (left, right) in enumerate(zip(borders, borders[1:], strict=False)):
        x = torch.linspace(left, right, 60)
        shade = BLUE if i % 2 else PALE
        axes.fill_between(x, Normal(0, 1).log_prob(x).exp(), color=shade, alpha=0.75, linewidth=0)
    x = torch.linspace(low, high, 500)
    wide = high / SPAN
    axes.plot(x, Normal(0, 1).log_prob(x).exp(), color=INK, linewidth=1.2)
    axes.plot(x, Normal(0, wide).log_prob(x).exp(), "--", color=ORANGE, linewidth=1.4)
    axes.annotate("latents, N(0, 1)", (1.0, 0.3), color=INK, fontsize=9)
    axes.annotate(
        f"what the levels are made for:\nN(0, 1) stretched by {wide:.2f} = {high:g}/{SPAN:g}",
        (2.3, 0.13),
        color=ORANGE,
        fontsize=9,
    )
    axes.set(xlim=(low, high), ylim=(0, 0.43), yticks=[])
    axes.tick_params(bottom=False)
    axes.set_title(f"{2**SHADED} cells of the nearest level", loc="left", fontsize=9)
    bare(axes, "left")


# --- channel head


def head_figure() -> Figure:
    """The last channels are left out where the dots are."""
    order = PUBLISHED.channel_order
    shown = [*range(5), *range(len(order) - 2, len(order))]
    figure = new_figure(8, 3.2)
    axes = figure.add_subplot(xlim=(-1.62, 7.5), ylim=(-0.05, 3.5))
    axes.axis("off")
    places = [i if i < 5 else i + 1 for i in range(len(shown))]
    box(axes, -0.42, 1.12, 7.84, 0.78, PALE)
    axes.text(
        3.5, 1.51, f"causal transformer, {PUBLISHED.channel_depth} blocks", ha="center", va="center"
    )
    for place, number in zip(places, shown, strict=True):
        draw_step(axes, place, number, order)
    for y in (0.31, 2.72):
        axes.text(5, y, "…", ha="center", va="center", fontsize=16, color=GREY)
    for place, following in zip(places, places[1:], strict=False):
        feed_back(axes, place, following)
    draw_condition(axes)
    rows = ((0.31, "reads"), (2.72, f"predicts which\nof {PUBLISHED.quant_levels} levels"))
    for y, words in rows:
        axes.text(-0.52, y, words, ha="right", va="center", fontsize=8.5, color=INK)
    words = f"the {len(order)} channels of the position, low frequencies first  →"
    axes.text(-0.4, 3.3, words, va="center", fontsize=9, color=INK)
    return figure


def draw_step(axes: Axes, place: int, number: int, order: tuple[int, ...]) -> None:
    """What the head reads at its place `number`, and the channel that it predicts there."""
    box(axes, place - 0.4, 0.03, 0.8, 0.56, ORANGE if number == 0 else "white")
    words = "z" if number == 0 else f"level of\n{order[number - 1]}"
    looks = dict(color="white", weight="bold") if number == 0 else dict(fontsize=8)
    axes.text(place, 0.3, words, ha="center", va="center", **looks)
    box(axes, place - 0.4, 2.44, 0.8, 0.56, BLUE)
    axes.text(place, 2.71, f"channel\n{order[number]}", ha="center", va="center", color="white")
    axes.texts[-1].set_fontsize(7.5)
    for low, high in ((0.62, 1.09), (1.93, 2.41)):
        arrow(axes, (place, low), (place, high), INK)


def feed_back(axes: Axes, place: int, following: int) -> None:
    """From what was predicted to what is read next; into the dots and out of them."""
    if following - place > 1:
        return
    arrow(axes, (place + 0.43, 2.6), (following - 0.43, 0.34), GREY)
    axes.patches[-1].set_zorder(0.5)


def draw_condition(axes: Axes) -> None:
    box(axes, -1.55, 1.12, 0.86, 0.78, ORANGE)
    axes.text(-1.12, 1.51, "z of one\nposition", ha="center", va="center", color="white")
    axes.texts[-1].set_fontsize(8.5)
    arrow(axes, (-0.67, 1.51), (-0.45, 1.51), ORANGE)


def box(axes: Axes, x: float, y: float, width: float, height: float, color: str) -> None:
    style = "round,pad=0,rounding_size=0.08"
    axes.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=color, edgecolor=INK)
    )
    axes.patches[-1].set_linewidth(0.8)


def arrow(axes: Axes, start: tuple, end: tuple, color: str) -> None:
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=9,
            color=color,
            linewidth=1,
        )
    )


# --- masks


def filled_positions(num_iter: int) -> list[int]:
    """Of each sampling iteration of a published model, how many positions it fills."""
    return [before - after for before, after, _ in mask_schedule(PUBLISHED.seq_len, num_iter)]


def masked_shares() -> tuple[list[int], list[float]]:
    """How many positions training masks, and how often."""
    counts, chances = zip(*masked_counts(PUBLISHED.seq_len, PUBLISHED.mask_ratio_min), strict=True)
    return list(counts), list(chances)


def mask_figure() -> Figure:
    figure = new_figure(8, 2.7)
    axes = figure.subplots(1, len(ITERATIONS) + 1, width_ratios=(1, 1, 1, 1.15))
    for panel, num_iter in zip(axes, ITERATIONS, strict=False):
        filled = filled_positions(num_iter)
        panel.bar(range(1, num_iter + 1), filled, width=0.85 if num_iter < 9 else 1.0, color=BLUE)
        panel.set(xlabel="iteration", xlim=(0.4, num_iter + 0.6))
        panel.set_title(f"{num_iter} iterations", fontsize=9)
        panel.set_xticks([1, num_iter // 2, num_iter])
        panel.yaxis.get_major_locator().set_params(integer=True, nbins=5)
        bare(panel)
    axes[0].set_ylabel("positions filled")
    counts, chances = masked_shares()
    axes[-1].bar(counts, [100 * c for c in chances], width=1.0, color=ORANGE)
    axes[-1].set(xlabel=f"positions masked, of {PUBLISHED.seq_len}", ylabel="% of the steps")
    axes[-1].set_title("training", fontsize=9)
    axes[-1].set_xticks([counts[0], (counts[0] + counts[-1]) // 2, counts[-1]])
    bare(axes[-1])
    return figure


# --- all


def new_figure(width: float, height: float) -> Figure:
    """White behind it, so that it is read on dark pages, too."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def bare(axes: Axes, *more: str) -> None:
    axes.spines[["top", "right", *more]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.xaxis.label.set_size(9)
    axes.yaxis.label.set_size(9)


FIGURES: dict[str, Callable[[], Figure]] = {
    "levels.png": quantizer_figure,
    "head.png": head_figure,
    "masks.png": mask_figure,
}


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images", help="folder")
    args = parser.parse()
    check_writable(args.output, "--output")
    args.output.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        with atomic_write(args.output / name) as file:
            draw().savefig(file, format="png", dpi=130)
        print(f"written: {args.output / name}")


if __name__ == "__main__":
    run(main)
