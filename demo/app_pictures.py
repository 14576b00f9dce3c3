"""The page's pictures as HTML: images with what is not filled yet left open, maps, a histogram.

Everything is in the text itself: PNG as data, maps as SVG. Names are escaped.
Letters: L = G * G positions, S side of an image in pixels, K levels.
"""

import base64
import html
import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from demo.app_drawing import Frame, columns_of

ORDER = ("#e3f0f3", "#9fcbd8", "#4a97ae", "#1f6f8b", "#0f3d4e")  # first to last
CONFIDENCE = ("#3d2a66", "#3b528b", "#21918c", "#5ec962", "#fde725")  # unsure to certain
NUMBERED = 12  # positions side by side up to which the numbers can be read
SMALL = 96  # pixels a side up to which single pixels are shown as squares
STATUS = '<p class="tb-status" role="status">'
SPECIAL = str.maketrans({c: f"&#{ord(c)};" for c in "{}$`"})  # of gradio's own templates


def text(value: object) -> str:
    """As it stands between tags or in an attribute."""
    return html.escape(str(value)).translate(SPECIAL)


def colour(stops: Sequence[str], t: float) -> str:
    """#rrggbb between evenly spaced stops; t is clamped to [0, 1]."""
    place = min(max(t, 0.0), 1.0) * (len(stops) - 1)
    low = min(int(place), len(stops) - 2)
    first, second = (rgb(stop) for stop in stops[low : low + 2])
    mixed = first + (second - first) * (place - low)
    return "#" + "".join(f"{round(value):02x}" for value in mixed)


def rgb(name: str) -> np.ndarray:
    return np.array([int(name[i : i + 2], 16) for i in (1, 3, 5)])


def ink(background: str) -> str:
    """Black or white, whichever is read more easily on a colour."""
    return "#111" if rgb(background) @ (0.3, 0.59, 0.11) > 140 else "#fff"


def filled_only(pixels: np.ndarray, filled: np.ndarray) -> np.ndarray:
    """uint8 [S, S, 3], bool [L] -> [S, S, 4], transparent where a position is not filled yet."""
    side = math.isqrt(len(filled))
    factor = len(pixels) // side
    alpha = filled.reshape(side, side).repeat(factor, 0).repeat(factor, 1)
    return np.dstack([pixels, alpha.astype(np.uint8) * 255])


def image(pixels: np.ndarray, alt: str) -> str:
    """uint8 [S, S, 3 or 4] -> <img> with the PNG in it."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG", compress_level=1)
    data = base64.b64encode(file.getvalue()).decode("ascii")
    style = ' class="tb-small"' if len(pixels) <= SMALL else ""
    return f'<img{style} src="data:image/png;base64,{data}" alt="{text(alt)}">'


def grid_map(
    colours: list[str | None], written: list[str], tips: list[str], alt: str, columns: int
) -> str:
    """A square of L positions, row by row; None is not filled.

    written: into the positions, where few enough are side by side in as many columns of maps.
    """
    side = math.isqrt(len(colours))
    cells = []
    for i, fill in enumerate(colours):
        if fill is None:
            continue
        x, y = i % side, i // side
        tip = f"<title>{text(tips[i])}</title>"
        cells.append(f'<rect x="{x}" y="{y}" width="1.01" height="1.01" fill="{fill}">{tip}</rect>')
        if side * columns <= NUMBERED:
            place = f'x="{x + 0.5}" y="{y + 0.5}" fill="{ink(fill)}"'
            cells.append(f"<text {place}>{text(written[i])}</text>")
    return (
        f'<svg viewBox="0 0 {side} {side}" role="img" aria-label="{text(alt)}">'
        f"{''.join(cells)}</svg>"
    )


def order_map(order: np.ndarray, steps: int, name: str, columns: int = 1) -> str:
    """order: int [L], 0 where nothing is filled."""
    shares = [(n - 1) / max(1, steps - 1) for n in order]
    colours = [colour(ORDER, t) if n else None for n, t in zip(order, shares, strict=True)]
    tips = [f"{place(i, order)}: filled in iteration {n} of {steps}" for i, n in enumerate(order)]
    return grid_map(colours, [str(n) for n in order], tips, f"{name}: order of filling", columns)


def confidence_map(confidence: np.ndarray, levels: int, name: str, columns: int = 1) -> str:
    """confidence: float [L], nan where nothing is. Guessing among K levels is -ln K."""
    guess = math.log(levels)
    known = np.isfinite(confidence)
    shares = np.where(known, 1 + confidence / guess, 0)
    colours = [colour(CONFIDENCE, t) if k else None for t, k in zip(shares, known, strict=True)]
    written = [f"{value:.1f}".replace("-0.0", "0.0").replace("-", "−") for value in confidence]
    tips = [
        f"{place(i, confidence)}: mean log-probability of a channel {value:.2f} nats, "
        f"probability {math.exp(value):.0%}"
        if k
        else ""
        for i, (value, k) in enumerate(zip(confidence, known, strict=True))
    ]
    return grid_map(colours, written, tips, f"{name}: confidence", columns)


def place(i: int, positions: np.ndarray) -> str:
    side = math.isqrt(len(positions))
    return f"row {i // side + 1}, column {i % side + 1}"


def legend(stops: Sequence[str], left: str, right: str, note: str) -> str:
    ramp = f"background: linear-gradient(to right, {', '.join(stops)})"
    ends = f"<span>{text(left)}</span><i style='{ramp}'></i><span>{text(right)}</span>"
    return f'<div class="tb-legend">{ends}</div><p>{text(note)}</p>'


def panel(title: str, tiles: list[str], names: Sequence[str], below: str) -> str:
    columns = columns_of(len(tiles))
    cells = [
        f'<div class="tb-tile"><div>{tile}</div><span>{text(name)}</span></div>'
        for tile, name in zip(tiles, names, strict=True)
    ]
    return (
        f'<figure><figcaption>{text(title)}</figcaption><div class="tb-tiles" '
        f'style="grid-template-columns: repeat({columns}, minmax(0, 1fr))">{"".join(cells)}</div>'
        f"{below}</figure>"
    )


def stage(frame: Frame, names: Sequence[str], levels: int, status: str, below: str = "") -> str:
    """Images, order and confidence side by side. names: of the images' classes."""
    share = frame.step / frame.steps
    images = [
        image(filled_only(pixels, order > 0), f"{name}, iteration {frame.step} of {frame.steps}")
        for pixels, order, name in zip(frame.pixels, frame.order, names, strict=True)
    ]
    pairs = [(o, c, n) for o, c, n in zip(frame.order, frame.confidence, names, strict=True)]
    columns = columns_of(len(pairs))
    orders = [order_map(order, frame.steps, name, columns) for order, _, name in pairs]
    sure = [confidence_map(confidence, levels, name, columns) for _, confidence, name in pairs]
    note = "Striped: not filled yet." if not frame.done else "Right-click one to save it alone."
    guess = f"{-math.log(levels):.2f}".replace("-", "−")
    return (
        f'<div class="tb-stage" data-step="{frame.step}" data-steps="{frame.steps}">'
        f"{STATUS}{text(status)}</p>"
        f'<div class="tb-bar"><i style="width: {share:.1%}"></i></div><div class="tb-panels">'
        + panel("Image", images, names, f"<p>{note}</p>")
        + panel(
            "Order",
            orders,
            names,
            legend(ORDER, "1", str(frame.steps), "The iteration in which a position was filled."),
        )
        + panel(
            "Confidence",
            sure,
            names,
            legend(
                CONFIDENCE,
                f"{guess} guess",
                "0 certain",
                "Log-probability of what was drawn, in nats, mean over a position's channels.",
            ),
        )
        + f"</div>{below}</div>"
    )


def histogram(shares: np.ndarray, expected: np.ndarray, values: np.ndarray) -> str:
    """How often each level comes up, as bars, and what a Gaussian would give, as a line.

    shares, expected, values: [K]; the last are the levels themselves, in scaled latents.
    """
    top = max(shares.max(), expected.max())
    count, width = len(shares), 1000 / len(shares)
    bars, points = [], []
    for i, (share, share_expected, value) in enumerate(zip(shares, expected, values, strict=True)):
        high, x = 100 * share / top, i * width
        tip = f"level {i + 1} of {count}, {value:.2f}: {share:.2%}, Gaussian {share_expected:.2%}"
        # An empty bar has a tip as well, so the area above it is part of it.
        bars.append(
            f'<g><title>{text(tip)}</title><rect class="tb-over" x="{x:.2f}" y="0" '
            f'width="{width:.2f}" height="100"/><rect x="{x + width * 0.08:.2f}" '
            f'y="{100 - high:.2f}" width="{width * 0.84:.2f}" height="{high:.2f}"/></g>'
        )
        points.append(f"{x + width / 2:.2f},{100 - 100 * share_expected / top:.2f}")
    marks = [values[0], values[count // 4], np.median(values), values[-1 - count // 4], values[-1]]
    ticks = "".join(f"<span>{round(mark, 1) + 0.0:.1f}</span>".replace("-", "−") for mark in marks)
    return (
        '<figure class="tb-histogram"><figcaption>Use of the levels</figcaption>'
        '<div class="tb-key"><span><i></i>this photo</span>'
        '<span><i class="tb-line"></i>expected of a Gaussian</span></div>'
        f'<div class="tb-top">{top:.1%}</div>'
        '<svg viewBox="0 0 1000 100" preserveAspectRatio="none" role="img" '
        f'aria-label="share of each of the {count} levels">{"".join(bars)}'
        f'<polyline points="{" ".join(points)}"/></svg><div class="tb-ticks">{ticks}</div>'
        "<p>From the lowest level to the highest, named by their values as scaled latents "
        "(about unit variance).</p></figure>"
    )
