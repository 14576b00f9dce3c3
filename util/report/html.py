"""Pieces of a self-contained HTML page: tables, images, tabs, and the page around them.

Everything is inline: style, script and images; nothing is loaded from elsewhere. Functions take
text unless they say HTML.
"""

import base64
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import count
from string import Template

import numpy as np
from PIL import Image

from util.report.style import PAGE, SCRIPT, STYLE

LARGEST_PNG = 120_000  # bytes; larger pictures become JPEG
WIDEST = 1400  # pixels
_numbers = count()


@dataclass(frozen=True)
class Section:
    """A part of the page. body: HTML."""

    title: str
    body: str

    @property
    def anchor(self) -> str:
        return "".join(c if c.isalnum() else "-" for c in self.title.lower())


def figure(value) -> str:
    """A number as people read it, other values as they are."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or (value == int(value) and abs(value) < 1e15):
        return f"{int(value):,}"
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 1e5 or abs(value) < 1e-3:
        return f"{value:.3g}"
    return f"{value:.4g}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], marked: Sequence[int] = ()) -> str:
    """head and cells: HTML. marked: numbers of the rows that stand out."""
    cells = "".join(f"<th>{text}</th>" for text in head)
    lines = ("".join(f"<td>{cell}</td>" for cell in row) for row in rows)
    starts = {True: '<tr class="best">', False: "<tr>"}
    body = "".join(f"{starts[i in marked]}{line}</tr>" for i, line in enumerate(lines))
    content = f"<thead><tr>{cells}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="wide"><table>{content}</table></div>'


def facts(pairs: dict[str, object]) -> str:
    """A table of names and values."""
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(shown(value))}</td></tr>"
        for name, value in pairs.items()
    )
    return f'<div class="wide"><table class="facts"><tbody>{rows}</tbody></table></div>'


def shown(value) -> str:
    """A setting in a table."""
    if value is None or value == "":
        return "–"
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value))
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def more(summary: str, body: str) -> str:
    """HTML that is folded away."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def cards(values: Iterable[tuple[str, str]]) -> str:
    """Headline figures: (figure, what it is), HTML."""
    return "".join(
        f"<div><strong>{big}</strong><span>{small}</span></div>" for big, small in values
    )


def tabs(parts: Sequence[tuple[str, str]]) -> str:
    """(name, HTML) of which one is seen at a time; without a script, too."""
    if len(parts) == 1:
        return parts[0][1]
    group = f"tabs{next(_numbers)}"
    made = []
    for i, (name, body) in enumerate(parts):
        chosen = " checked" if i == 0 else ""
        made.append(
            f'<input type="radio" name="{group}" id="{group}-{i}"{chosen}>'
            f'<label for="{group}-{i}">{escape(name)}</label><div class="tab">{body}</div>'
        )
    return f'<div class="tabs">{"".join(made)}</div>'


def picture(content: bytes | np.ndarray, alt: str, shown_as: str = "") -> str:
    """An <img> of a file's bytes, or of pixels uint8 [H, W] or [H, W, 3].

    Large ones are packed as JPEG, very large ones shrunk first. shown_as: its class in the style.
    Raises ValueError or OSError if the bytes are no picture.
    """
    image = Image.fromarray(content) if isinstance(content, np.ndarray) else None
    if image is None:
        image = Image.open(io.BytesIO(content), formats=("PNG", "JPEG"))
    data, kind = _packed(image)
    encoded = base64.b64encode(data).decode()
    attributes = f' class="{shown_as}"' if shown_as else ""
    return (
        f'<img src="data:image/{kind};base64,{encoded}" alt="{escape(alt)}" width="{image.width}" '
        f'height="{image.height}"{attributes}>'
    )


def _packed(image: Image.Image) -> tuple[bytes, str]:
    if image.width > WIDEST:
        height = round(image.height * WIDEST / image.width)
        image = image.convert("RGB").resize((WIDEST, height), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, format="PNG", optimize=True)
    if len(file.getvalue()) <= LARGEST_PNG:
        return file.getvalue(), "png"
    file = io.BytesIO()
    image.convert("RGB").save(file, format="JPEG", quality=88)
    return file.getvalue(), "jpeg"


def viewer(frames: Sequence[tuple[str, str]], first: int = -1) -> str:
    """(label, HTML of an image) one at a time, with a slider. first: the one that is seen."""
    last, seen = len(frames) - 1, first % len(frames)
    hidden = {True: " hidden", False: ""}
    shown_frames = "".join(
        f'<div class="frame" data-label="{escape(label)}"{hidden[i != seen]}>{image}</div>'
        for i, (label, image) in enumerate(frames)
    )
    slider = (
        f'<input type="range" min="0" max="{last}" value="{seen}" aria-label="which images">'
        if last
        else ""
    )
    return (
        f'<div class="viewer">{slider}<p class="now">{escape(frames[seen][0])}</p>'
        f"{shown_frames}</div>"
    )


def as_json(value) -> str:
    """For a <script> element, which nothing in it can end."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def page(title: str, lead: str, cards_html: str, sections: Sequence[Section], foot: str) -> str:
    """The whole page. lead, cards_html, foot: HTML."""
    links = "".join(f'<a href="#{s.anchor}">{escape(s.title)}</a>' for s in sections)
    body = "".join(
        f'<section id="{s.anchor}"><h2>{escape(s.title)}</h2>{s.body}</section>' for s in sections
    )
    return Template(PAGE).substitute(
        title=escape(title),
        style=STYLE,
        script=SCRIPT,
        lead=lead,
        cards=f'<div class="cards">{cards_html}</div>' if cards_html else "",
        links=links,
        body=body,
        foot=foot,
    )
