"""Charts as inline SVG that keep the size of their text: lines, bands, dots over steps or names.

The drawing is stretched to the page's width, strokes and text are not. Values are shown under the
pointer by the page's script, from a JSON element beside the drawing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from util.report.html import as_json, figure

Point = tuple[float, float]
SIDE = 1000  # units of a drawing, both ways
POINTS = 300  # of a line; more would not be seen
LABELS = 5  # of an axis, about


@dataclass(frozen=True)
class Series:
    """points: (x, y) in ascending x. band: (x, low, high) drawn behind. errors: of each point."""

    name: str
    points: list[Point]
    colour: str
    band: list[tuple[float, float, float]] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    dots: bool = False
    dashed: bool = False
    filled: bool = False


def colour(number: int) -> str:
    """Of one of a few series, as the page's style has it in light and dark."""
    return f"var(--s{number % 6})"


def ramp(place: int, of: int) -> str:
    """Of one of many series in an order, from blue to orange."""
    share = place / max(1, of - 1)
    return f"hsl({225 - 200 * share:.0f} 62% 55%)"


def thinned(points: list[Point]) -> tuple[list[Point], list[tuple[float, float, float]]]:
    """Means of neighbours, and the band of their extremes where there are many."""
    if len(points) <= POINTS:
        return points, []
    kept, band = [], []
    for i in range(POINTS):
        part = points[i * len(points) // POINTS : (i + 1) * len(points) // POINTS]
        values = [y for _, y in part]
        x = part[-1][0]
        kept.append((x, sum(values) / len(values)))
        band.append((x, min(values), max(values)))
    return kept, band


def ticks(low: float, high: float, wanted: int = LABELS) -> list[float]:
    """Round numbers from low to high, about as many as wanted."""
    if not high > low:
        return [low]
    rough = (high - low) / wanted
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def limits(values: Sequence[float], zero: bool) -> tuple[float, float]:
    """Of an axis that holds the values, with some room."""
    low, high = min(values), max(values)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high == low:
        margin = abs(high) * 0.1 or 1.0
        return low - (0 if zero else margin), high + margin
    margin = (high - low) * 0.06
    return low - (0 if zero and low == 0 else margin), high + margin


def chart(
    title: str,
    series: Sequence[Series],
    x_name: str = "step",
    names: Sequence[str] = (),
    zero: bool = False,
    tall: bool = False,
) -> str:
    """HTML of a chart. names: of x = 0, 1, ..., where x is no number. zero: y begins there.

    Values that are not finite are left out; without any, the chart says so.
    """
    series = [_finite(one) for one in series]
    series = [one for one in series if one.points]
    if not series:
        empty = f"<figcaption>{escape(title)}</figcaption><p>no values</p>"
        return f'<figure class="chart">{empty}</figure>'
    x0, x1 = _span(series, names)
    extremes = [y for one in series for _, y in one.points]
    extremes += [y for one in series for _, low, high in one.band for y in (low, high)]
    extremes += [
        y + sign * error
        for one in series
        for (_, y), error in zip(one.points, one.errors, strict=False)
        for sign in (-1, 1)
    ]
    y0, y1 = limits(extremes, zero)
    scale = _Scale(x0, x1, y0, y1)
    drawn = "".join(_draw(i, one, scale) for i, one in enumerate(series))
    rules = "".join(f'<path class="rule" d="M0 {scale.y(v):.1f}h{SIDE}"/>' for v in ticks(y0, y1))
    legend = "".join(
        f'<button type="button" data-series="{i}"><i style="background:{one.colour}"></i>'
        f"{escape(one.name)}</button>"
        for i, one in enumerate(series)
        if one.name
    )
    data = {
        "x": [x0, x1],
        "xName": x_name,
        "names": list(names),
        "series": [
            {"name": one.name, "colour": one.colour, "points": [_short(p) for p in one.points]}
            for one in series
        ],
    }
    ends = "; ".join(f"{one.name} {figure(one.points[-1][1])}" for one in series[:8])
    alternative, kind = escape(f"{title}: {ends}"), "chart tall" if tall else "chart"
    return (
        f'<figure class="{kind}"><figcaption>{escape(title)}</figcaption>'
        f'<div class="legend">{legend}</div>'
        f'<div class="axes"><div class="ys">{_y_labels(scale)}</div>'
        f'<div class="plot"><svg viewBox="0 0 {SIDE} {SIDE}" preserveAspectRatio="none" role="img" '
        f'aria-label="{alternative}">{rules}{drawn}</svg><div class="cross" hidden></div></div>'
        f'<div class="xs">{_x_labels(scale, names, 20 if tall else 12)}</div></div>'
        f'<div class="x-name">{escape(x_name)}</div><div class="tip" hidden></div>'
        f'<script type="application/json">{as_json(data)}</script></figure>'
    )


@dataclass(frozen=True)
class _Scale:
    x0: float
    x1: float
    y0: float
    y1: float

    def x(self, value: float) -> float:
        return SIDE * (value - self.x0) / (self.x1 - self.x0)

    def y(self, value: float) -> float:
        return SIDE * (self.y1 - value) / (self.y1 - self.y0)


def _finite(one: Series) -> Series:
    kept = [i for i, (_, y) in enumerate(one.points) if math.isfinite(y)]
    errors = [one.errors[i] for i in kept] if one.errors else []
    points, band = [one.points[i] for i in kept], [b for b in one.band if math.isfinite(sum(b))]
    return Series(one.name, points, one.colour, band, errors, one.dots, one.dashed, one.filled)


def _span(series: Sequence[Series], names: Sequence[str]) -> tuple[float, float]:
    if names:
        return -0.5, len(names) - 0.5
    xs = [x for one in series for x, _ in one.points]
    low, high = min(xs), max(xs)
    return (low, high) if high > low else (low - 1, high + 1)


def _short(point: Point) -> list[float]:
    return [float(f"{value:.6g}") for value in point]


def _draw(number: int, one: Series, scale: _Scale) -> str:
    """A series: its band, area, line, error bars and dots."""
    at = [(scale.x(x), scale.y(y)) for x, y in one.points]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
    parts = []
    if one.band:
        upper = [f"{scale.x(x):.1f},{scale.y(high):.1f}" for x, _, high in one.band]
        lower = [f"{scale.x(x):.1f},{scale.y(low):.1f}" for x, low, _ in reversed(one.band)]
        parts.append(f'<polygon class="band" points="{" ".join(upper + lower)}"/>')
    if one.filled:
        floor = scale.y(max(scale.y0, 0.0))
        parts.append(
            f'<polygon class="area" points="{at[0][0]:.1f},{floor:.1f} {line} '
            f'{at[-1][0]:.1f},{floor:.1f}"/>'
        )
    if len(at) > 1:
        dash = ' stroke-dasharray="5 4"' if one.dashed else ""
        parts.append(f'<polyline points="{line}"{dash}/>')
    for (_, y), (px, py), error in zip(one.points, at, one.errors, strict=False):
        length = scale.y(y - error) - scale.y(y + error)
        parts.append(f'<path class="error" d="M{px:.1f} {py - length / 2:.1f}v{length:.1f}"/>')
    if one.dots or len(at) == 1:
        path = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in at)
        parts.append(f'<path class="dots" d="{path}"/>')
    return f'<g data-series="{number}" style="--c:{one.colour}">{"".join(parts)}</g>'


def _y_labels(scale: _Scale) -> str:
    return "".join(
        f'<span style="top:{scale.y(value) / SIDE:.2%}">{figure(_round(value))}</span>'
        for value in ticks(scale.y0, scale.y1)
    )


def _x_labels(scale: _Scale, names: Sequence[str], most: int) -> str:
    if names:
        every = math.ceil(len(names) / most)
        marks = [(i, name) for i, name in enumerate(names) if i % every == 0]
    else:
        marks = [(value, figure(_round(value))) for value in ticks(scale.x0, scale.x1, 4)]
    return "".join(
        f'<span style="left:{scale.x(x) / SIDE:.2%}">{escape(str(text))}</span>'
        for x, text in marks
    )


def _round(value: float) -> float:
    """Without the last digits of binary fractions, so that 0.30000000000000004 is 0.3."""
    return float(f"{value:.10g}")
