"""Figures over a setting, as a PNG file: a panel for each of them, side by side."""

import math
from collections.abc import Sequence
from pathlib import Path

from util.files import atomic_write


def plot(
    path: Path, names: Sequence[str], axis: str, lines: dict[str, list[dict]], flat: Sequence = ()
) -> None:
    """names: of the figures; rows lack those that were not measured, and panels those of no row.

    lines: rows by a line's label, in the order of their `axis`, a name, too. flat: rows that have
    no place on it, (label, row), as dashed lines.
    """
    from matplotlib.figure import Figure  # slow to import

    every = [*sum(lines.values(), []), *(row for _, row in flat)]
    names = [name for name in names if any(name in row for row in every)]
    if not names:
        return
    figure = Figure(figsize=(3.6 * len(names), 3), layout="constrained")
    for name, panel in zip(names, figure.subplots(1, len(names), squeeze=False)[0], strict=True):
        for label, line in lines.items():
            x, y = ([row.get(key, math.nan) for row in line] for key in (axis, name))
            errors = [row.get(f"{name}_standard_error", 0) for row in line]
            panel.errorbar(x, y, yerr=errors, marker="o", capsize=2, label=label)
            panel.xaxis.get_major_locator().set_params(integer=all(value % 1 == 0 for value in x))
        for label, row in flat:
            panel.axhline(row.get(name, math.nan), color="gray", linestyle="--", label=label)
        panel.set(xlabel=axis, ylabel=name.removesuffix("_mean").replace("_", " "))
        panel.grid(alpha=0.3)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize="small")
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)
