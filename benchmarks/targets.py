"""What is to be reached, and the published code's seconds that it is measured against.

Measured with `tokenbridge_base`, batch 2, fp32, torch 2.14, on 2 cores of a machine that made the
rates below in the same run. Its seconds here are estimated by the rates: seconds x rate there /
rate here, the matrix rate in fp32, the arithmetic that it ran in. A bf16 run is compared with them
a second time as if they grew with the matrix rate in bf16: a stricter ratio where this machine's
bf16 is the faster one.
"""

from dataclasses import dataclass
from statistics import median

from benchmarks.tables import times

PUBLISHED_SECONDS = {"train": 27.2, "forward": 4.8, "head": 5.5, "sample8": 65.0}
PUBLISHED_RATES = {"fp32": 181e9, "bf16": 624e9}
# Times faster than the published code.
TARGETS = {
    ("train", "fp32"): 1.7,
    ("train", "bf16"): 4.5,
    ("head", "fp32"): 7.0,
    ("head", "bf16"): 12.0,
    ("sample8", "fp32"): 2.8,
    ("sample8", "bf16"): 8.0,
}
QUANTIZER_TARGET = 10.0  # times faster than plain
KEPT_TARGET, STEP_TARGET = 1 / 4, 1.3  # bytes kept for backward and step time, of plain
H100_IMAGES, H100_BYTES = 190.0, 60e9  # a second, in training; at most in memory


@dataclass(frozen=True)
class Comparison:
    """One row of the table. Seconds: medians. target: times faster, None if there is none.

    published: seconds of the published code on this machine, estimated for each run by the matrix
    rate beside it. plain: seconds of benchmarks/plain.py in fp32, None if it was not timed.
    Speed-ups are of work in units of the matrix product beside each run; own_rate is the one
    over the published seconds scaled by the rate in this row's precision.
    """

    title: str
    precision: str
    seconds: float
    published: float
    speedup: float
    own_rate: float
    plain: float | None
    plain_speedup: float | None
    target: float | None


def find(rows: list[dict], work: str, variant: str, precision: str) -> dict | None:
    wanted = (work, variant, precision)
    return next((r for r in rows if (r["work"], r["variant"], r["precision"]) == wanted), None)


def comparisons(rows: list[dict]) -> list[Comparison]:
    """Of all works whose published seconds are known; for runs under those conditions alone."""
    found = []
    for work, published in PUBLISHED_SECONDS.items():
        for precision in PUBLISHED_RATES:
            row = find(rows, work, "fast", precision)
            if row is not None:
                found.append(_compare(row, find(rows, work, "plain", "fp32"), published))
    return found


def _compare(row: dict, plain: dict | None, published: float) -> Comparison:
    scaled = _scaled(row, published, "fp32")
    return Comparison(
        title=row["title"],
        precision=row["precision"],
        seconds=median(row["seconds"]),
        published=median(scaled),
        speedup=_speedup(row, scaled),
        own_rate=_speedup(row, _scaled(row, published, row["precision"])),
        plain=median(plain["seconds"]) if plain is not None else None,
        plain_speedup=times(plain, row) if plain is not None else None,
        target=TARGETS.get((row["work"], row["precision"])),
    )


def _scaled(row: dict, published: float, precision: str) -> list[float]:
    """The published seconds, on the machine as it was beside each run."""
    return [published * PUBLISHED_RATES[precision] / r for r in row["matrix_rates"][precision]]


def _speedup(row: dict, scaled: list[float]) -> float:
    return median(there / here for there, here in zip(scaled, row["seconds"], strict=True))
