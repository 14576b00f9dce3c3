"""The report's sections of evaluations, their sweeps, and of reconstructions."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from util.evaluation.evaluator import GRID_COLUMNS
from util.evaluation.reconstruction import CONTINUOUS, ORIGINAL
from util.evaluation.settings import SWEPT
from util.evaluation.sweep import PLOTTED, compared
from util.report.charts import Series, chart, colour
from util.report.html import Section, facts, figure, more, note, picture, table, viewer
from util.report.run import Found, Record

TITLES = {
    "fid": "FID",
    "frechet_distance": "Fréchet distance",
    "inception_score_mean": "IS",
    "kernel_inception_distance_mean": "KID",
    "f_score": "F score",
    "num_iter": "iterations",
}
# Settings that few evaluations change.
SPECIAL = {"order": "random", "token_cache": 0, "classes": "all"}
RECONSTRUCTED = {
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "rfid": "rFID",
    "fid": "FID",
    "reconstruction_frechet_distance": "Fréchet distance to the crops",
    "inception_score_mean": "IS",
    "latent_mse": "latent error",
    "entropy_bits": "entropy, bits",
    "levels_used": "levels used",
    "out_of_range_share": "out of range",
}


def title_of(name: str) -> str:
    if name.endswith("_difference"):
        return f"{title_of(name.removesuffix('_difference'))}, from the best"
    return TITLES.get(name, name.removesuffix("_mean").replace("_", " "))


def error_of(name: str) -> str:
    """The figure that tells how sure another one is, where there is one."""
    if name.endswith("_mean"):
        return name.removesuffix("_mean") + "_std"
    return f"{name}_error" if name.endswith("_difference") else f"{name}_standard_error"


def evaluations(found: Found) -> list[Section]:
    """One section for each folder that holds evaluations: a point each, or a sweep."""
    by_parent: dict[Path, list[Record]] = {}
    for record in found.evaluations:
        by_parent.setdefault(record.folder.parent, []).append(record)
    made = []
    for parent, records in by_parent.items():
        name = found.name(parent) if parent.is_relative_to(found.root) else ""
        title = f"Evaluation: {name}" if name and len(by_parent) > 1 else "Evaluation"
        made.append(Section(title, _evaluation(records)))
    return made


def headline(found: Found) -> list[tuple[str, str]]:
    """The best Fréchet distance, for the cards."""
    for name in ("fid", "frechet_distance"):
        values = [
            (record.values["metrics"][name], record.values.get("settings", {}).get("num_images"))
            for record in found.evaluations
            if isinstance(record.values["metrics"].get(name), float)
        ]
        if values:
            value, count = min(values, key=lambda pair: pair[0])
            of = f", {count:,} images" if isinstance(count, int) else ""
            return [(f"{value:.2f}", f"{title_of(name)}, the lowest{of}")]
    return []


def _evaluation(records: Sequence[Record]) -> str:
    rows = _rows(records)
    parts = [_points(rows)]
    if len(rows) > 1:
        parts.append(_sweep_charts(rows))
    warnings = dict.fromkeys(w for record in records for w in record.values.get("warnings", []))
    parts += [note(warning) for warning in warnings]
    grids = [
        (_point_name(row), _file(record.folder / "grid.png"))
        for row, record in zip(rows, records, strict=True)
        if (record.folder / "grid.png").is_file()
    ]
    if grids:
        columns = {_columns(record) for record in records}
        named = f": {escape(*columns)}" if len(columns) == 1 and any(columns) else ""
        parts.append(f"<h3>Images, a column a class{named}</h3>{viewer(grids, first=_best(rows))}")
    parts.append(more("with what it was measured", "".join(map(_provenance, records))))
    return "".join(parts)


def _columns(record: Record) -> str:
    """The classes in grid.png, where the evaluation says which."""
    classes = record.values.get("classes")
    return ", ".join(map(str, classes[:GRID_COLUMNS])) if isinstance(classes, list) else ""


def _rows(records: Sequence[Record]) -> list[dict]:
    """Settings and figures of each point; with differences from the best where they compare."""
    rows = []
    settings_of = [record.values.get("settings", {}) for record in records]
    special = [
        name
        for name, usual in SPECIAL.items()
        if any(settings.get(name, usual) != usual for settings in settings_of)
    ]
    for record, settings in zip(records, settings_of, strict=True):
        if "classes" in settings:
            settings = settings | {"classes": _columns(record)}
        metrics = record.values["metrics"]
        rows.append(
            {name: settings.get(name) for name in SWEPT}
            | {name: settings.get(name, SPECIAL[name]) for name in special}
            | {"images": settings.get("num_images"), "weights": settings.get("weights", "ema")}
            | metrics
            | {"folder": record.folder.name, "replicates": record.values.get("replicates", {})}
        )
    same = len({tuple(sorted(record.values["metrics"])) for record in records}) == 1
    same &= len({str(settings.get("classes")) for settings in settings_of}) == 1
    return compared(rows) if same and len(rows) > 1 else rows


def _points(rows: Sequence[dict]) -> str:
    hidden = {"replicates", "best", "folder"}
    names = list(dict.fromkeys(name for row in rows for name in row if name not in hidden))
    errors = {error_of(name) for name in names}
    names = [name for name in names if name not in errors]
    head = [escape(title_of(name)) for name in names]
    cells = [[escape(_with_error(row, name)) for name in names] for row in rows]
    best = [i for i, row in enumerate(rows) if row.get("best")]
    told = "" if any(name in rows[0] for name in PLOTTED) else note("Nothing was measured.")
    return told + table(head, cells, marked=best)


def _with_error(row: dict, name: str) -> str:
    value, error = row.get(name), row.get(error_of(name))
    if value is None or (name.endswith("_difference") and row.get("best")):
        return ""
    return figure(value) if error is None else f"{figure(value)} ± {error:.2g}"


def _best(rows: Sequence[dict]) -> int:
    return next((i for i, row in enumerate(rows) if row.get("best")), 0)


def _point_name(row: dict) -> str:
    known = [name for name in (*SWEPT, *SPECIAL) if row.get(name) is not None]
    return ", ".join(f"{title_of(name)} {figure(row[name])}" for name in known)


def _sweep_charts(rows: Sequence[dict]) -> str:
    """Each figure over the setting with the most values; a line for each choice of the others."""
    if any(not isinstance(row[name], int | float) for row in rows for name in SWEPT):
        return ""
    axis = max(SWEPT, key=lambda name: len({row[name] for row in rows}))
    names = (*SWEPT, *SPECIAL, "images", "weights")
    others = [name for name in names if len({r.get(name) for r in rows}) > 1 and name != axis]
    charts = []
    for name in (n for n in PLOTTED if all(isinstance(row.get(n), float) for row in rows)):
        lines: dict[str, list[dict]] = {}
        for row in sorted(rows, key=lambda row: row[axis]):
            label = ", ".join(f"{title_of(other)} {figure(row[other])}" for other in others)
            lines.setdefault(label, []).append(row)
        series = [
            Series(
                label,
                [(row[axis], row[name]) for row in line],
                colour(i),
                errors=[row.get(PLOTTED[name], 0.0) for row in line],
                dots=True,
            )
            for i, (label, line) in enumerate(lines.items())
        ]
        charts.append(chart(title_of(name), series, title_of(axis)))
    return f'<div class="grid">{"".join(charts)}</div>'


def _provenance(record: Record) -> str:
    names = ("precision", "device", "processes", "git_revision", "finished", "seconds")
    known = {name: record.values[name] for name in names if name in record.values}
    known |= record.values.get("versions", {})
    for name, file in record.values.get("files", {}).items():
        known[name] = f"{file.get('path')}, SHA-256 {file.get('sha256')}"
    return f"<h3>{escape(record.folder.name)}</h3>{facts(known)}"


def _file(path: Path) -> str:
    """A picture of the folder, or why there is none."""
    try:
        return picture(path.read_bytes(), path.stem, "picture")
    except (OSError, ValueError) as error:
        return note(f"{path.name} cannot be shown: {error}")


# --- reconstruction


def reconstructions(found: Found) -> list[Section]:
    made = []
    for record in found.reconstructions:
        name = found.name(record.folder)
        title = f"Reconstruction: {name}" if name and len(found.reconstructions) > 1 else ""
        made.append(Section(title or "Reconstruction", _reconstruction(record)))
    return made


def _reconstruction(record: Record) -> str:
    results = sorted(record.values["results"], key=_by_bits)
    names = [name for name in RECONSTRUCTED if any(name in result for result in results)]
    head = ["", *(escape(RECONSTRUCTED[name]) for name in names)]
    rows = [
        [_bits(result), *(figure(result[name]) if name in result else "" for name in names)]
        for result in results
    ]
    settings = {k: v for k, v in record.values.items() if k not in ("results", "measured")}
    grid, shown = record.folder / "grid.png", ""
    if grid.is_file():
        rows_of = [ORIGINAL, CONTINUOUS]
        rows_of += [r["name"] for r in record.values["results"] if r["name"] != CONTINUOUS]
        told = "; ".join(f"row {i} {name}" for i, name in enumerate(rows_of, start=1))
        shown = f"<h3>The same images</h3><p>{escape(told)}.</p>{_file(grid)}"
    return (
        "<p>What quantization alone costs: images through the VAE, every latent channel rounded "
        "to 2<sup>bits</sup> levels.</p>"
        + table(head, rows)
        + _quality(results, names)
        + shown
        + more("with what it was measured", facts(settings))
    )


def _by_bits(result: dict) -> float:
    return result["bits"] if result["bits"] > 0 else float("inf")


def _bits(result: dict) -> str:
    return f"{result['bits']} bits" if result["bits"] > 0 else "not quantized"


def _quality(results: Sequence[dict], names: Sequence[str]) -> str:
    """Figures over bits, the continuous VAE a dashed line; entropy channel by channel."""
    quantized = [result for result in results if result["bits"] > 0]
    continuous = [result for result in results if result["bits"] < 0]
    charts = []
    for name in [n for n in names if n in ("psnr", "ssim", "rfid", "fid", "entropy_bits")]:
        points = [(r["bits"], r[name]) for r in quantized if name in r]
        if len(points) < 2:
            continue
        series = [Series("quantized", points, colour(0), dots=True)]
        ends = (points[0][0], points[-1][0])
        series += [
            Series("not quantized", [(x, r[name]) for x in ends], colour(5), dashed=True)
            for r in continuous
            if name in r
        ]
        charts.append(chart(RECONSTRUCTED[name], series, "bits"))
    by_channel = [
        Series(_bits(r), list(enumerate(r["entropy_bits_by_channel"])), colour(i), dots=True)
        for i, r in enumerate(r for r in quantized if "entropy_bits_by_channel" in r)
    ]
    if by_channel:
        channels = [str(i) for i in range(len(by_channel[0].points))]
        charts.append(chart("entropy by channel, bits", by_channel, "channel", channels))
    return f'<div class="grid">{"".join(charts)}</div>' if charts else ""
