"""Figures over a setting, as a PNG file."""

import math
from collections.abc import Iterable
from pathlib import Path

from util.files import atomic_write


def plot(path: Path, rows: list[dict], axis: str, names: Iterable[str]) -> None:
    """A panel for each figure that the rows have, a line for each "label", errors where known.

    A row whose value of the axis is infinite is a horizontal line.
    """
    from matplotlib.figure import Figure

    panels = [name for name in names if any(name in row for row in rows)]
    figure = Figure(figsize=(3.6 * len(panels), 3.2), layout="constrained")
    rows = sorted(rows, key=lambda row: row[axis])
    for name, panel in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
        for text in dict.fromkeys(row["label"] for row in rows):
            line = [row for row in rows if row["label"] == text and name in row]
            error = f"{name}_standard_error"
            x, y, errors = ([row.get(key, 0) for row in line] for key in (axis, name, error))
            if math.inf in x:
                panel.axhline(y[0], color="gray", linestyle="--", label=text)
            else:
                panel.errorbar(x, y, yerr=errors, marker="o", capsize=2, label=text)
        panel.set(xlabel=axis, ylabel=name.removesuffix("_mean").replace("_", " "))
        if panel.get_legend_handles_labels()[1]:
            panel.legend(fontsize="small")
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)
