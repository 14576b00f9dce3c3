"""A page of one file that loads nothing from elsewhere and needs no script: page.html.jinja.

Charts are drawn by matplotlib as SVG; their colours become those of the page, light or dark.
"""

import base64
import colorsys
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

LARGEST_PNG = 120_000  # bytes; larger pictures become JPEG
WIDEST, MOST_PIXELS = 1400, 100_000_000  # of a picture as shown, and of one that is read
POINTS = 500  # most of a curve
LISTED = 32  # values of a list
SERIES = ("#1f6f8b", "#d0702a", "#5a8f3c", "#7a7f87")
TEXT, SOFT, LINE = "#1d2430", "#5c6675", "#e2e5e9"
VARIABLES = {TEXT: "text", SOFT: "soft", LINE: "line"}  # of the page's style
VARIABLES |= {colour: f"s{i}" for i, colour in enumerate(SERIES)}
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "text.parse_math": False,
    "font.size": 9,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": LINE,
    "axes.edgecolor": LINE,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "text.color": TEXT,
    "axes.labelcolor": SOFT,
    "legend.frameon": False,
    "xtick.color": LINE,
    "xtick.labelcolor": SOFT,
    "ytick.color": LINE,
    "ytick.labelcolor": SOFT,
    **{f"axes.spines.{side}": False for side in ("top", "right", "left")},
}


@dataclass(frozen=True)
class Section:
    """A part of the page. Cells may be texts, numbers and pictures.

    tabs: (name, chart or picture), one seen at a time, at first `chosen`. best: a row that stands
    out. folds: names and values by the title under which they are folded away.
    """

    title: str
    text: str = ""
    notes: Sequence[str] = ()
    head: Sequence[str] = ()
    rows: Sequence[Sequence] = ()
    best: int | None = None
    charts: Sequence[Markup] = ()
    tabs: Sequence[tuple[str, Markup | str]] = ()
    chosen: int = 0
    folds: dict[str, dict] = field(default_factory=dict)


@dataclass(frozen=True)
class Curve:
    """points: (x, y) in ascending x. style: of matplotlib's errorbar, such as yerr and marker."""

    name: str
    points: Sequence[tuple[float, float]]
    style: dict = field(default_factory=dict)


def render(title: str, sections: Sequence[Section], **parts) -> str:
    """The page. parts: cards, (figure, what it is); source, of what it was made; perhaps a lead."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["figure"] = figure
    page = environment.get_template("page.html.jinja")
    return page.render(title=title, sections=sections, **parts)


def figure(value: object) -> str:
    """A number as people read it, other values as they are; a dash for nothing."""
    if isinstance(value, dict):
        return ", ".join(f"{name}: {figure(inner)}" for name, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(figure, value[:LISTED])) + ", ..." * (len(value) > LISTED)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value in (None, "") else value if isinstance(value, str) else str(value)
    if not math.isfinite(value) or 0 < abs(value) < 1e-3 or (abs(value) >= 1e5 and value % 1):
        return f"{value:.3g}"
    return f"{value:.4g}" if value % 1 else f"{int(value):,}"


def picture(source: Path | io.BytesIO | Image.Image, alt: str) -> Markup | str:
    """An <img> of a PNG or JPEG file, or of an image; large ones are shrunk and packed.

    Returns why not if there is no such file, or it holds too many pixels.
    """
    try:
        image = source
        if not isinstance(source, Image.Image):
            image = Image.open(source, formats=("PNG", "JPEG"))
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are too many")
        image = image if image.mode == "L" else image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return f"{alt} cannot be shown: {error}"
    if image.width > WIDEST:
        image = image.resize((WIDEST, round(image.height * WIDEST / image.width)))
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 88})):
        file = io.BytesIO()
        image.save(file, kind, **options)
        if file.tell() <= LARGEST_PNG:
            break
    data = f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
    tag = Markup('<img src="{}" alt="{}" width="{}" height="{}">')
    return tag.format(data, alt, *image.size)


def chart(title: str, curves: Sequence[Curve], x: str = "step", wide: bool = False) -> Markup:
    """An <svg>. Many curves, which stand in an order, are coloured from blue to orange.

    Over steps, the last values stand beside the curves' names.
    """
    curves = [one for one in curves if any(math.isfinite(y) for _, y in one.points)]
    with matplotlib.rc_context(STYLE):
        drawing = Figure(figsize=(9, 3.6) if wide else (4.4, 2.7), layout="constrained")
        axes = drawing.add_subplot(xlabel=x, title=title if curves else f"{title}: no values")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: figure(float(f"{value:.10g}")))
        for i, one in enumerate(curves):
            colour = SERIES[i] if len(curves) <= len(SERIES) else hue(i / (len(curves) - 1))
            last = f": {figure(one.points[-1][1])}" if x == "step" else ""
            every = math.ceil(len(one.points) / POINTS)
            x_values, y_values = zip(*one.points[::-every], strict=True)
            style = {"color": colour, "label": one.name + last} | one.style
            axes.errorbar(x_values, y_values, **style)
        if any(one.name for one in curves):
            drawing.legend(loc="outside lower left", ncols=6 if wide else 2)
        text = io.StringIO()
        drawing.savefig(text, format="svg", transparent=True)
    svg = re.sub(r"<metadata>.*</metadata>|<style.*?</style>", "", text.getvalue(), flags=re.DOTALL)
    svg = re.sub(r' xmlns\S*="[^"]*"| (width|height)="[\d.]+pt"|(?<=<g) id="[^"]*"', "", svg)
    for colour, name in VARIABLES.items():
        svg = svg.replace(colour, f"var(--{name})")
    return Markup(f'<svg class="{"wide" * wide}"' + svg.partition("<svg")[2])


def hue(share: float) -> str:
    """From blue, 0, to orange, 1, as light as shows on white and on black."""
    return matplotlib.colors.to_hex(colorsys.hls_to_rgb((225 - 200 * share) / 360, 0.55, 0.62))
