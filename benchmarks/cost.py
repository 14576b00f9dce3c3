"""What training and sampling cost on GPUs: a calculator.

Counts the arithmetic (util/flops.py), estimates the memory traffic (benchmarks/roofline.py), and
divides them by rates: shares of the data sheet's that are assumed, or, with --rates, those that
python -m benchmarks.run measured on such a device. Every rate is printed with where it comes from.

python -m benchmarks.cost --model tokenbridge_large
python -m benchmarks.cost --model tokenbridge_huge --nodes 4 --img_size 512
python -m benchmarks.cost --table

The last one writes the tables of docs/performance.md.
"""

import json
from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from benchmarks.estimate import BATCH, BOUNDS, MATRIX_SHARE, MEMORY_SHARE, Setup, cost
from models.config import PRESETS
from util.args import bit_width, non_negative_float, positive_float, positive_int
from util.dist import run
from util.hardware import HARDWARE, readable
from util.memory import ACTIVATION
from util.parser import Parser
from util.provenance import ROOT


def told(found: dict) -> str:
    """For people."""
    setup = Setup(**found["setup"])
    trained, sampled = found["training"], found["sampling"]
    rates = (
        f"  {name:<12}{rate_text(name, rate['value']):<14}{rate['from']}"
        for name, rate in found["rates"].items()
    )
    parts = ", ".join(f"{name} {share:.1%}" for name, share in trained["shares"].items())
    return "\n".join(
        [
            f"{setup.model}, {found['parameters']:,} parameters, {setup.img_size} px, "
            f"{setup.quant_bits} bits, {setup.vae_embed_dim} channels; {setup.nodes} x "
            f"{setup.devices} {setup.hardware}, {setup.precision}",
            *rates,
            f"training, {trained['epochs']} epochs of {setup.images:,} images",
            *hours_text(trained, setup),
            f"  {readable(trained['flops_per_image'], 'FLOP')} an image: {parts}; "
            f"{trained['batch_size']} images at once, about "
            f"{trained['bytes_per_device'] / 1e9:.0f} GB",
            *parts_text(trained, f"{setup.global_batch:,} images"),
            f"  caching the latents before: {figure(trained['caching_device_hours'])} GPU-hours",
            f"sampling {sampled['images']:,} images, {setup.num_iter} iterations, guidance "
            f"{setup.cfg:g}",
            *hours_text(sampled, setup),
            f"  {readable(sampled['flops_per_image'], 'FLOP')} an image, and its VAE",
            *parts_text(sampled, f"{setup.eval_bsz:,} images"),
        ]
    )


def rate_text(name: str, value: float) -> str:
    if name == "launch":
        return f"{value * 1e6:g} us"
    if name == "fusion":
        return f"{value:g}"
    return readable(value, "FLOP/s" if name in ("matrix", "convolution") else "B/s")


def figure(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"


def hours_text(found: dict, setup: Setup) -> list[str]:
    return [
        f"  {figure(found['device_hours'])} GPU-hours, {figure(found['hours'])} hours on "
        f"{setup.processes} GPUs, {figure(found['images_per_second_per_device'])} images/s each; "
        f"bound by {found['bound']}",
        f"  {found['share_of_peak']:.0%} of the peak, at which it would be "
        f"{figure(found['floor_device_hours'])} GPU-hours",
    ]


def parts_text(found: dict, of: str) -> list[str]:
    return [
        f"  {name:<12}{figure(part['total'])} s for {of}: {bounds_text(part)}"
        for name, part in found["parts"].items()
        if part["total"]
    ]


def bounds_text(part: dict) -> str:
    """What the time of a part goes to, the most first."""
    shares = {text: part[kind] / part["total"] for kind, text in BOUNDS.items()}
    kept = sorted(
        (text for text in shares if shares[text] >= 0.005), key=lambda text: -shares[text]
    )
    return ", ".join(f"{text} {shares[text]:.0%}" for text in kept)


def share(text: str) -> float:
    value = positive_float(text)
    if value > 1:
        raise ArgumentTypeError(f"{text} is more than 1")
    return value


def up_to(most: int) -> Callable[[str], int]:
    """A positive number that small."""

    def number(text: str) -> int:
        value = positive_int(text)
        if value > most:
            raise ArgumentTypeError(f"{text[:20]} is more than {most}")
        return value

    return number


count = up_to(10**15)  # all of which a float tells apart
side = up_to(4096)  # positions of an image are listed one by one, and so are the iterations


FLAGS: dict[str, list[tuple[str, Callable, str]]] = {
    "model": [
        ("img_size", side, "pixels a side"),
        ("vae_stride", side, "pixels a latent position"),
        ("vae_embed_dim", side, "latent channels"),
        ("quant_bits", bit_width, "bits a latent scalar"),
    ],
    "training": [
        ("epochs", count, "[as published: huge 800, others 400]"),
        ("images", count, "of the training set"),
        ("global_batch", count, "images a step, of all devices"),
        ("batch_size", count, f"images of a device at once [{BATCH}, or as many as fit]"),
    ],
    "sampling": [
        ("num_images", count, "in all"),
        ("num_iter", side, "iterations an image"),
        ("cfg", non_negative_float, "guidance; 1 is none, and half the backbone's work"),
        ("eval_bsz", count, "images a batch"),
    ],
    "machine": [
        ("devices", count, "of a node"),
        ("nodes", count, "of so many devices each"),
        ("network", positive_float, "GB/s that a node sends to the others, all adapters together"),
    ],
    "rates": [
        ("matrix_share", share, f"of the peak, in products [{MATRIX_SHARE}; of --rates 1]"),
        ("memory_share", share, f"of the memory's bandwidth [{MEMORY_SHARE}; of --rates 1]"),
        ("link_share", share, "of the bandwidth between devices, and between nodes"),
        ("launch", non_negative_float, "microseconds that a kernel costs at least"),
        ("fusion", share, "share of the memory traffic that is left; below 1 with --compile"),
    ],
}


def make_parser() -> Parser:
    parser = Parser(__doc__)
    groups = {name: parser.add_argument_group(name) for name in FLAGS}
    groups["model"].add_argument("--model", choices=PRESETS, default=Setup.model, help="size")
    for name, flags in FLAGS.items():
        for flag, kind, text in flags:
            default = getattr(Setup, flag)
            groups[name].add_argument(f"--{flag}", type=kind, default=default, help=text)
    groups["model"].add_argument(
        "--vae_path",
        type=Path,
        metavar="FOLDER",
        help="a VAE of diffusers, which then decides stride and channels; else KL-16's form",
    )
    switches = (("grad_checkpointing", "as in training"), ("encode", "images, not cached latents"))
    for name, text in switches:
        groups["training"].add_argument(f"--{name}", action="store_true", help=text)
    machine = groups["machine"].add_argument
    machine("--hardware", choices=HARDWARE, default=Setup.hardware, help="of util/hardware.py")
    machine("--precision", choices=ACTIVATION, default=Setup.precision, help="arithmetic")
    groups["rates"].add_argument(
        "--rates", type=Path, metavar="FILE", help="of benchmarks.run on that device: measured"
    )
    add = parser.add_argument_group("output").add_argument
    add("--json", action="store_true", help="all figures, to standard output")
    add("--table", action="store_true", help="write the tables of --page instead")
    add("--page", type=Path, default=ROOT / "docs" / "performance.md", help="with --table")
    return parser


def main() -> None:
    args = make_parser().parse()
    if args.table:
        from benchmarks.cost_page import write_page

        return write_page(args.page)
    found = cost(Setup(**{field.name: getattr(args, field.name) for field in fields(Setup)}))
    print(json.dumps(found, indent=2) if args.json else told(found))


if __name__ == "__main__":
    run(main)
