"""Write the tables and the figure of docs/performance.md from the files of benchmarks/results/.

python -m benchmarks.render
"""

import json
from pathlib import Path
from statistics import median

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.run import FORMAT, RESULTS
from benchmarks.tables import (
    bytes_text,
    memory,
    row_of,
    seconds_text,
    share,
    speed,
    spread,
    times,
)
from benchmarks.targets import (
    H100_BYTES,
    H100_IMAGES,
    KEPT_TARGET,
    QUANTIZER_TARGET,
    STEP_TARGET,
    Comparison,
    comparisons,
    find,
)
from benchmarks.work import FAST, PLAIN
from util.dist import run
from util.errors import UserError, as_user_error
from util.files import atomic_write
from util.hardware import readable
from util.page import write_between
from util.parser import Parser
from util.provenance import ROOT

MARK = "benchmarks.render"  # of the place in the page
NOT_MEASURED = "not measured"


def read(path: Path, flag: str = "--results") -> dict:
    """A file of benchmarks.run, named by a flag. Raises UserError on any other."""
    with as_user_error(f"{flag} {path}", (OSError, ValueError)):
        result = json.loads(path.read_text())
        if not isinstance(result, dict) or result.get("format") != FORMAT:
            raise UserError("not a file of this version's python -m benchmarks.run")
    return result


def page_lines(results: dict[str, dict]) -> list[str]:
    """results: {name of the file: its content}. What stands in the page."""
    lines = []
    for name, result in results.items():
        lines += [f"### {headline(result)}", "", provenance(name, result), ""]
        lines += target_table(result)
        lines += work_table(result["rows"])
        lines += kept_table(result)
    return [*lines, *gpu_table(results)]


def headline(result: dict) -> str:
    machine, settings = result["machine"], result["settings"]
    where = machine.get("gpu") or f"{machine['processor']}, {machine['cores']} cores"
    return f"{where}: `{settings['model']}`, batch {settings['batch_size']}"


def provenance(name: str, result: dict) -> str:
    machine = result["machine"]
    rates = {
        precision: [rate for row in result["rows"] for rate in row["matrix_rates"][precision]]
        for precision in ("fp32", "bf16")
    }
    products = ", ".join(
        f"{precision} {readable(median(found), 'FLOP/s')} "
        f"({readable(min(found), 'FLOP/s')} to {readable(max(found), 'FLOP/s')})"
        for precision, found in rates.items()
    )
    return (
        f"`benchmarks/results/{name}`: {machine['threads']} threads, {machine['system']}, Python "
        f"{machine['python']}, torch {result['versions']['torch']}, {result['date']}, commit "
        f"{result['git_revision']}, {result['seconds'] / 60:.0f} minutes. Beside the runs, a "
        f"{result['matrix']}^3 product made {products}, median and range; memory was copied at "
        f"{readable(median(result['copy_rates']), 'B/s')}, reading and writing together."
    )


def target_table(result: dict) -> list[str]:
    """Against the published code and against benchmarks/plain.py."""
    lines = []
    if result["settings"]["published_conditions"]:
        lines = [
            "| work | precision | here | published code, scaled | faster | by its own rate "
            "| target | `plain.py`, fp32 | faster |",
            "|---|---|---|---|---|---|---|---|---|",
            *map(comparison_line, comparisons(result["rows"])),
            "",
        ]
    fast, slow = (find(result["rows"], "quantizer", name, "fp32") for name in (FAST, PLAIN))
    if fast and slow:
        lines += [
            f"Quantizer: {times(slow, fast):.1f} times faster than by a distance to each level "
            f"(target {QUANTIZER_TARGET:g}), {memory(fast) or '?'} instead of {memory(slow) or '?'}"
            " on top of its input.",
            "",
        ]
    return lines


def comparison_line(found: Comparison) -> str:
    cells = [found.title, found.precision, seconds_text(found.seconds)]
    cells += [seconds_text(found.published), f"{found.speedup:.2f} x", f"{found.own_rate:.2f} x"]
    cells += ["" if found.target is None else f"{found.target:g} x"]
    cells += ["", ""]
    if found.plain is not None:
        cells[-2:] = [seconds_text(found.plain), f"{found.plain_speedup:.2f} x"]
    return row_of(cells)


def work_table(rows: list[dict]) -> list[str]:
    lines = [
        "| work | variant | precision | seconds, median (range) | a second | of matrix rate "
        "| memory | fast is faster |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        found, fast = share(row), find(rows, row["work"], FAST, row["precision"])
        gain = f"{times(row, fast):.2f} x" if fast is not None and row is not fast else ""
        lines.append(
            row_of(
                [
                    *(row["title"], row["variant"], row["precision"], spread(row), speed(row)),
                    *("" if found is None else f"{found:.0%}", memory(row), gain),
                ]
            )
        )
    return [*lines, ""]


def kept_table(result: dict) -> list[str]:
    """Bytes kept for backward: of one image more, and of the batch."""
    if not result["kept"]:
        return []
    lines = [
        "| kept for backward | precision | saved tensors, per image | of plain "
        "| all that is alive, per image | of plain | batch | step time of plain |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["kept"]:
        precision = row["precision"]
        plain = next(
            other
            for other in result["kept"]
            if other["variant"] == PLAIN and other["precision"] == precision
        )
        cells = [row["variant"], precision]
        for kind in ("hooks", "alive"):
            cells += [bytes_text(per_image(row, kind))]
            cells += [f"{per_image(row, kind) / per_image(plain, kind):.3f}"]
        step, slow = (
            find(result["rows"], "train", name, precision) for name in (row["variant"], PLAIN)
        )
        ratio = f"{times(step, slow):.2f}" if step and slow else NOT_MEASURED
        lines.append(row_of([*cells, bytes_text(row["alive"][0]), ratio]))
    note = f"Targets: at most {KEPT_TARGET:g} of plain in bytes, {STEP_TARGET:g} in step time."
    return [*lines, "", note, ""]


def per_image(row: dict, kind: str) -> float:
    """What one image more costs; of a batch of one, its whole."""
    sizes, found = row["images"], row[kind]
    if len(found) < 2:
        return found[0] / sizes[0]
    return (found[0] - found[1]) / (sizes[0] - sizes[1])


def gpu_table(results: dict[str, dict]) -> list[str]:
    """The row of the H100; what was measured on any CUDA device, or that nothing was."""
    goal = f"at least {H100_IMAGES:g} images/s, under {H100_BYTES / 1e9:g} GB"
    lines = [
        "| training on a GPU, bf16, cached latents | target | images/s | peak memory |",
        "|---|---|---|---|",
    ]
    found = [r for r in results.values() if r["settings"]["device"] == "cuda"]
    for result in found:
        row = find(result["rows"], "train", FAST, "bf16")
        if row is not None:
            peak = f"{row['memory_peak'] / 1e9:.1f} GB"
            lines.append(row_of([headline(result), goal, speed(row), peak]))
    if not found:
        where = "one H100: `tokenbridge_large`, batch 64"
        lines.append(row_of([where, goal, NOT_MEASURED, NOT_MEASURED]))
    return [*lines, ""]


def draw(path: Path, result: dict) -> None:
    """Left: times faster than the published code and the targets; right: share of matrix rate."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    found = [c for c in comparisons(result["rows"]) if result["settings"]["published_conditions"]]
    names = [f"{c.title.split(',')[0]}, {c.precision}" for c in found]
    left.barh(names, [c.speedup for c in found], color=[COLORS[c.precision] for c in found])
    for i, c in enumerate(found):
        if c.target is not None:
            left.plot([c.target] * 2, [i - 0.4, i + 0.4], color="black", linewidth=2)
    left.axvline(1, color="grey", linewidth=0.8)
    left.set(xlabel="times faster than the published code (line: target)")
    rows = [r for r in result["rows"] if r["variant"] in (FAST, PLAIN) and share(r) is not None]
    labels = [f"{r['work']}, {r['precision']}, {r['variant']}" for r in rows]
    colors = [COLORS[r["precision"]] if r["variant"] == FAST else "lightgrey" for r in rows]
    right.barh(labels, [100 * share(r) for r in rows], color=colors)
    right.set(xlabel="achieved FLOP/s, % of the matrix rate beside it")
    for axes in (left, right):
        axes.invert_yaxis()
        axes.tick_params(labelsize=7)
        axes.xaxis.label.set_size(8)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)


COLORS = {"fp32": "tab:blue", "bf16": "tab:orange"}


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--results", type=Path, nargs="+", help="[all of benchmarks/results/]")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "performance.md")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs" / "images" / "performance.png")
    return parser


def main() -> None:
    args = make_parser().parse()
    paths = args.results or sorted(RESULTS.glob("*.json"))
    if not paths:
        raise UserError("--results: benchmarks/results/ is empty; run python -m benchmarks.run")
    results = {path.name: read(path) for path in paths}
    write_between(args.page, MARK, page_lines(results))
    if args.results is None:
        from benchmarks import cost_page  # which reads these files by this module

        write_between(args.page, cost_page.MARK, cost_page.page_lines())
    draw(args.figure, next(iter(results.values())))
    print(f"written: {args.page}, {args.figure}")


if __name__ == "__main__":
    run(main)
