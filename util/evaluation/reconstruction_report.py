"""What reconstruction.py leaves to be looked at: results.json and .csv, quality.png, grid.png."""

import csv
import io
import json
from pathlib import Path

import torch
from torch import Tensor

from util.data.images import grid, save_png
from util.files import atomic_write

# Shown where they were measured, from left to right: name of the figure, title of its panel.
PANELS = (
    ("psnr", "PSNR (dB)"),
    ("ssim", "SSIM"),
    ("rfid", "rFID"),
    ("reconstruction_frechet_distance", "Fréchet distance to the crops"),
    ("fid", "FID"),
    ("inception_score_mean", "Inception Score"),
    ("entropy_bits", "entropy (bits of a latent scalar)"),
)


def write_results(folder: Path, settings: dict, results: list[dict]) -> None:
    """settings: what they were measured with. results: of each variant."""
    with atomic_write(folder / "results.json") as file:
        file.write((json.dumps(settings | {"results": results}, indent=1) + "\n").encode())
    with atomic_write(folder / "results.csv") as file:
        file.write(as_csv(results).encode())
    with atomic_write(folder / "quality.png") as file:
        plot(file, results)


def scalars(results: list[dict]) -> list[str]:
    """Names of the figures that are one number, in the order in which they come up."""
    names = [name for result in results for name, v in result.items() if not isinstance(v, list)]
    return list(dict.fromkeys(names))


def as_scalars(results: list[dict]) -> dict[str, float]:
    """The figures of every variant under names of their own, for --metrics_file."""
    return {
        f"reconstruction/{result['name']}/{name}": value
        for result in results
        for name, value in result.items()
        if isinstance(value, float)
    }


def as_csv(results: list[dict]) -> str:
    """A row for each variant, from few bits to many; what was not measured is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, scalars(results), restval="", lineterminator="\n")
    writer.writeheader()
    for result in sorted(results, key=by_bits):
        writer.writerow({k: v for k, v in result.items() if not isinstance(v, list)})
    return text.getvalue()


def by_bits(result: dict) -> float:
    return result["bits"] if result["bits"] > 0 else float("inf")  # continuous: no end of them


def plot(file, results: list[dict]) -> None:
    """Every figure over the number of bits; without quantization it is a dashed line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    quantized = sorted((r for r in results if r["bits"] > 0), key=by_bits)
    continuous = [r for r in results if r["bits"] < 0]
    panels = [(name, title) for name, title in PANELS if any(name in r for r in results)]
    figure = Figure(figsize=(3.2 * len(panels), 2.8), layout="constrained")
    FigureCanvasAgg(figure)
    for number, (name, title) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), number + 1, title=title, xlabel="bits")
        axes.plot([r["bits"] for r in quantized], [r.get(name) for r in quantized], "o-")
        axes.set_xticks([r["bits"] for r in quantized])
        for result in continuous:
            if name in result:
                axes.axhline(result[name], color="gray", linestyle="--", label="not quantized")
                axes.legend(fontsize="small")
    figure.savefig(file, format="png", dpi=120)


def write_grid(folder: Path, rows: list[Tensor]) -> None:
    """rows: uint8 [N, 3, H, W], the same images in each."""
    save_png(grid(torch.cat(rows), columns=len(rows[0])), folder / "grid.png")


def tell(folder: Path, images: int, rows: list[str], results: list[dict]) -> None:
    print(f"{images} images, rows of {folder / 'grid.png'}: {', '.join(rows)}")
    for result in results:
        figures = {k: v for k, v in result.items() if isinstance(v, float)}
        print(f"{result['name']:>10}  " + "  ".join(f"{k} {v:.5g}" for k, v in figures.items()))
