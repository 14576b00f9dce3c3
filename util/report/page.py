"""A page of one file that loads nothing from elsewhere and needs no script: page.html.jinja.

Charts are drawn by matplotlib as SVG.
"""

import base64
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

LARGEST_PNG = 120_000  # bytes; larger pictures become JPEG
WIDEST = 1400  # pixels of a picture as shown
POINTS, MARKED = 500, 30  # most of a curve; of one whose points are marked
LISTED = 32  # values of a list
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",  # the same page of the same figures
    "text.parse_math": False,
    "font.size": 9,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "lines.markersize": 4,
}
# What a page has no use for, or would take for its own.
REDUNDANT = r'<metadata>.*</metadata>|<style.*?</style>| (xmlns\S*="[^"]*|\w+="[\d.]+pt)"'


@dataclass(frozen=True)
class Section:
    """A part of the page. Cells may be texts, numbers and pictures.

    best: a row that stands out. strip: (name, chart or picture) side by side, to scroll through.
    folds: names and values by the title under which they are folded away.
    """

    title: str
    text: str = ""
    notes: Sequence[str] = ()
    head: Sequence[str] = ()
    rows: Sequence[Sequence] = ()
    best: int | None = None
    charts: Sequence[Markup] = ()
    strip: Sequence[tuple[str, Markup | str]] = ()
    folds: dict[str, dict] = field(default_factory=dict)


def render(title: str, sections: Sequence[Section], lead: str = "") -> str:
    """The page. lead: below the title."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.get_template("page.html.jinja")
    return page.render(title=title, sections=sections, figure=figure, lead=lead)


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

    Returns why not if there is no such file, or it holds more pixels than Pillow takes.
    """
    try:
        given = isinstance(source, Image.Image)
        image = source if given else Image.open(source, formats=("PNG", "JPEG"))
        image = image.convert("L" if image.mode == "L" else "RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return f"{alt} cannot be shown: {error}"
    image.thumbnail((WIDEST, image.height))
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 88})):
        file = io.BytesIO()
        image.save(file, kind, **options)
        if file.tell() <= LARGEST_PNG:
            break
    data = f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
    tag = Markup('<img src="{}" alt="{}" width="{}" height="{}">')
    return tag.format(data, alt, *image.size)


def chart(
    title: str, curves: dict[str, Sequence[tuple]], x: str = "step", wide: bool = False
) -> Markup:
    """An <svg>. curves: points (x, y) or (x, y, error) by name, in ascending x.

    Over steps, the last values stand beside the curves' names.
    """
    curves = {k: points for k, points in curves.items() if any(math.isfinite(p[1]) for p in points)}
    with matplotlib.rc_context(STYLE):
        drawing = Figure(figsize=(9, 3.6) if wide else (4.4, 2.7), layout="constrained")
        axes = drawing.add_subplot(xlabel=x, title=title if curves else f"{title}: no values")
        if len(curves) > 4:  # they stand in an order
            axes.set_prop_cycle(color=matplotlib.colormaps["turbo"](np.linspace(0, 1, len(curves))))
        for name, points in curves.items():
            every = math.ceil(len(points) / POINTS)
            columns = zip(*points[::-every], strict=True)
            last = f": {figure(points[-1][1])}" if x == "step" else ""
            marker = "o" if len(points) <= MARKED else ""
            axes.errorbar(*columns, label=name + last, marker=marker)
        if any(curves):
            drawing.legend(loc="outside lower left", ncols=6 if wide else 2)
        text = io.StringIO()
        drawing.savefig(text, format="svg", transparent=True)
    svg = re.sub(REDUNDANT, "", text.getvalue(), flags=re.DOTALL).partition("<svg")[2]
    return Markup(f'<svg class="{"wide" * wide}"' + svg)
