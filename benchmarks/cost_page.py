"""The tables of "Cost of scale" in docs/performance.md: see benchmarks/cost.py."""

import math
from pathlib import Path
from statistics import median

from benchmarks.cost import bounds_text, figure, rate_text
from benchmarks.estimate import Setup, cost
from benchmarks.render import NOT_MEASURED, headline, read, row_of
from benchmarks.roofline import Rates, Roofline
from benchmarks.run import RESULTS
from benchmarks.tables import seconds_text
from benchmarks.targets import find
from benchmarks.work import FAST
from models.config import TokenBridgeConfig, preset
from models.tokenizers.kl16 import KL16
from util.hardware import HARDWARE, find_hardware, readable
from util.page import write_between

MARK = "benchmarks.cost"  # of the place in the page
MODELS = ("tokenbridge_large", "tokenbridge_huge")
# What is changed, and how. Only these settings differ from the published training and sampling.
VARIANTS: dict[str, dict] = {
    "as published; one node": {},
    "512 px": {"img_size": 512},
    "4 bits": {"quant_bits": 4},
    "5 bits": {"quant_bits": 5},
    "7 bits": {"quant_bits": 7},
    "8 bits": {"quant_bits": 8},
    "32 channels": {"vae_embed_dim": 32},
    "2 nodes": {"nodes": 2},
    "4 nodes": {"nodes": 4},
    "8 nodes": {"nodes": 8},
    "4 nodes, network of 100 Gbit/s": {"nodes": 4, "network": 12.5},
    "64 iterations": {"num_iter": 64},
    "8 iterations": {"num_iter": 8},
    "no guidance": {"cfg": 1.0},
    "one image at once": {"eval_bsz": 1},
    "images, not cached latents": {"encode": True},
    "`--grad_checkpointing`": {"grad_checkpointing": True},
    "products at 0.4 of the peak": {"matrix_share": 0.4},
    "products at 0.8 of the peak": {"matrix_share": 0.8},
    "half of the traffic fused away": {"fusion": 0.5},
}


def write_page(page: Path) -> None:
    write_between(page, MARK, page_lines())
    print(f"written: {page}")


def page_lines() -> list[str]:
    results = {path: read(path) for path in sorted(RESULTS.glob("*.json"))}
    rates = next((path for path, found in results.items() if is_of(found, "H100")), None)
    base = {name: cost(Setup(model=name, rates=rates)) for name in MODELS}
    lines = [*rates_table(base[MODELS[0]], rates), *cost_table(base), *parts_table(base)]
    for name in MODELS:
        lines += variants_table(name, rates)
    return [*lines, *check_table(list(results.values()))]


def is_of(result: dict, hardware: str) -> bool:
    gpu = result["machine"].get("gpu")
    return gpu is not None and find_hardware(gpu) is HARDWARE[hardware]


def table(*rows: list[str]) -> list[str]:
    """The first row is the head."""
    return [row_of(rows[0]), "|" + "---|" * len(rows[0]), *map(row_of, rows[1:]), ""]


def rates_table(found: dict, rates: Path | None) -> list[str]:
    measured = (
        f"measured ones from `{rates.name}`" if rates else f"{NOT_MEASURED}, none was at hand"
    )
    return [
        f"**Rates of one H100**: {measured}.",
        "",
        *table(
            ["rate", "used here", "where from"],
            *(
                [name, rate_text(name, rate["value"]), rate["from"]]
                for name, rate in found["rates"].items()
            ),
        ),
    ]


def cost_table(base: dict[str, dict]) -> list[str]:
    head = ["model", "work", "arithmetic of an image", "GPU-hours at the peak", "GPU-hours"]
    rows = [[*head, "8 x H100", "images/s a GPU", "of the peak"]]
    for name, found in base.items():
        epochs, images = found["training"]["epochs"], found["sampling"]["images"]
        works = {"training": f"training, {epochs} epochs", "sampling": f"{images:,} samples"}
        for work, title in works.items():
            part = found[work]
            hours = part["hours"]
            rows.append(
                [
                    *(f"`{name}`", title, readable(part["flops_per_image"], "FLOP")),
                    *(figure(part["floor_device_hours"]), f"**{figure(part['device_hours'])}**"),
                    f"{hours / 24:.1f} days" if hours > 48 else f"{hours * 60:.0f} minutes",
                    figure(part["images_per_second_per_device"]),
                    f"{part['share_of_peak']:.0%}",
                ]
            )
    shares = base[MODELS[0]]["training"]["shares"]
    parts = ", ".join(f"the {name} {share:.1%}" for name, share in shares.items())
    return [*table(*rows), f"Of the arithmetic of a `{MODELS[0]}` training step: {parts}.", ""]


def parts_table(base: dict[str, dict]) -> list[str]:
    """Seconds of a step and of a batch, and what they go to."""
    of = {"training": "a step of 2048 images on 8", "sampling": "256 samples on one"}
    rows = [["model", "work", "part", "seconds", "bound by"]]
    for name, found in base.items():
        for work, what in of.items():
            for part, seconds in found[work]["parts"].items():
                text = bounds_text(seconds) if seconds["total"] else "hidden behind the backward"
                cells = [f"`{name}`", what, part, figure(seconds["total"]), text]
                rows.append(cells)
    return table(*rows)


def variants_table(name: str, rates: Path | None) -> list[str]:
    """A cell is empty where a change changes nothing."""
    rows = [
        [
            *(f"`{name}`", "images at once", "TFLOP an image", "training, GPU-hours", "days"),
            *("bound by", "TFLOP a sample", "50,000 samples, GPU-hours", "minutes", "bound by"),
        ]
    ]
    published = None
    for title, changes in VARIANTS.items():
        found = cost(Setup(model=name, rates=rates, **changes))
        trained, sampled = training_cells(found["training"]), sampling_cells(found["sampling"])
        if published is None:
            published = trained, sampled
        elif trained == published[0]:
            trained = [""] * len(trained)
        if published[1] == sampled and changes:
            sampled = [""] * len(sampled)
        rows.append([title, *trained, *sampled])
    return table(*rows)


def training_cells(found: dict) -> list[str]:
    return [
        *(str(found["batch_size"]), figure(found["flops_per_image"] / 1e12)),
        *(figure(found["device_hours"]), figure(found["hours"] / 24), found["bound"]),
    ]


def sampling_cells(found: dict) -> list[str]:
    return [
        *(figure(found["flops_per_image"] / 1e12), figure(found["device_hours"])),
        *(figure(found["hours"] * 60), found["bound"]),
    ]


def check_table(results: list[dict]) -> list[str]:
    """The same arithmetic for machines that were measured, with their own rates and no shares."""
    rows = [["machine", "work", "precision", "measured", "by these counts", "measured / counted"]]
    ratios = []
    for result in results:
        for work in ("train", "head"):
            for precision in ("fp32", "bf16"):
                row = find(result["rows"], work, FAST, precision)
                if row is not None:
                    seconds, counted = median(row["seconds"]), counted_seconds(result, row)
                    ratios.append(seconds / counted)
                    rows.append(
                        [
                            *(headline(result), row["title"], precision, seconds_text(seconds)),
                            *(seconds_text(counted), f"{seconds / counted:.2f}"),
                        ]
                    )
    if not ratios:
        return []
    note = (
        "**Check.** The same counts, at rates measured in the same run as the work, without any "
        f"share: the work took {min(ratios):.1f} to {max(ratios):.1f} times as long."
    )
    return [note, "", *table(*rows)]


def counted_seconds(result: dict, row: dict) -> float:
    settings, precision = result["settings"], row["precision"]
    rates = Rates(
        matrix=median(row["matrix_rates"][precision]),
        convolution=1.0,  # neither work has any
        memory=median(result["copy_rates"]),
        launch=5e-6 if settings["device"] == "cuda" else 0.0,
    )
    config = TokenBridgeConfig(**preset(settings["model"]), img_size=settings["img_size"])
    roofline = Roofline(config, precision, rates, KL16, settings["device"])
    if row["work"] == "head":
        return roofline.head(row["items"]).total
    masked = math.ceil(settings["mask_ratio"] * config.seq_len)
    parts = roofline.micro_batch(settings["batch_size"], masked=masked)
    return sum(part.total for part in (*parts.values(), roofline.update()))
