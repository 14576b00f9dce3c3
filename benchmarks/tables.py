"""Rows of a benchmark's JSON file in words and numbers."""

from collections.abc import Sequence
from statistics import median

from util.hardware import readable


def row_of(cells: Sequence[str]) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def seconds_text(seconds: float) -> str:
    """Three digits, in the unit that suits."""
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "us")):
        if seconds * factor >= 1 or unit == "us":
            return f"{seconds * factor:.3g} {unit}"
    raise AssertionError


def speed(row: dict) -> str:
    """Items in a second, by the median."""
    return f"{readable(row['items'] / median(row['seconds']), '').strip()} {row['unit']}"


def share(row: dict) -> float | None:
    """Achieved FLOP/s over the matrix rate beside each run, median; None without a count."""
    rates = row["matrix_rates"].get(row["precision"])
    if row["flops"] is None or rates is None:
        return None
    pairs = zip(row["seconds"], rates, strict=True)
    return median(row["flops"] / seconds / rate for seconds, rate in pairs)


def times(slower: dict, faster: dict) -> float:
    """How many times faster, as work in units of the fp32 matrix product: without the drift."""

    def work(row: dict) -> float:
        pairs = zip(row["seconds"], row["matrix_rates"]["fp32"], strict=True)
        return median(seconds * rate for seconds, rate in pairs)

    return work(slower) / work(faster)


def spread(row: dict) -> str:
    """Median and, of several runs, the range."""
    values = row["seconds"]
    if len(values) == 1:
        return f"{seconds_text(values[0])} (one run)"
    low, high = seconds_text(min(values)), seconds_text(max(values))
    return f"{seconds_text(median(values))} ({low} to {high})"


def bytes_text(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.3g} MiB"


def memory(row: dict) -> str:
    """What a run took on top of what was there before it."""
    if row["memory_peak"] is None:
        return ""
    return bytes_text(max(0, row["memory_peak"] - row["memory_before"]))


def row_line(row: dict) -> str:
    """One line for the terminal."""
    found = share(row)
    parts = [f"{row['work']:<10}", f"{row['precision']:<4}", f"{row['variant']:<52}", spread(row)]
    parts.append(f"{speed(row)}/s")
    parts += [f"{found:.0%} of matrix rate"] if found is not None else []
    return "  ".join([*parts, memory(row)])
