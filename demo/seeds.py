"""The accuracy of the demo's digits over several seeds: the whole demo for each, then a table.

python -m demo.seeds

The README reports seeds 21, 22 and 23. All settings, those of configs/digits.yaml and of sampling
in demo/run.sh, were chosen by the accuracy of seeds 11 to 14, and the VAE before any of them. Seed
1 was seen once, at a higher temperature, so it is none of the reported ones.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from demo.report import read_timings
from util.args import seed
from util.dist import run
from util.parser import Parser
from util.provenance import git_revision, processor, versions

ROOT = Path(__file__).resolve().parent.parent


def table(folders: dict[int, Path]) -> str:
    """Markdown of the folders of demo/run.sh by seed: a row for each, the mean and the lowest."""
    rows, accuracies = ["| seed | accuracy | Fréchet distance | time |", "|---|---|---|---|"], []
    for number, folder in folders.items():
        found = json.loads((folder / "scores.json").read_text())["generated"]
        seconds = sum(took for _, took in read_timings(folder / "timings.tsv"))
        accuracies.append(found["accuracy"])
        rows.append(
            f"| {number} | {found['accuracy']:.1%} | {found['frechet_to_train']:.2f} | "
            f"{seconds // 60:.0f} min {seconds % 60:02.0f} s |"
        )
    mean = sum(accuracies) / len(accuracies)
    return "\n".join([*rows, f"\nmean {mean:.1%}, lowest {min(accuracies):.1%}"])


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--seeds", type=seed, nargs="+", default=[21, 22, 23], help="one demo each")
    parser.add_argument("--quick", action="store_true", help="few steps, to try this script")
    return parser.parse()


def main() -> None:
    args = parse_args()
    quick = ["--quick"] if args.quick else []
    for number in args.seeds:
        command = ["bash", str(ROOT / "demo" / "run.sh"), *quick, "--seed", str(number)]
        if subprocess.run(command).returncode:
            sys.exit(f"error: the demo of seed {number} failed, see above")
    name = "demo-quick-seed" if args.quick else "demo-seed"
    print(f"\n{processor()}, torch {versions()['torch']}, revision {git_revision()}\n")
    print(table({number: ROOT / "output" / f"{name}{number}" for number in args.seeds}))


if __name__ == "__main__":
    run(main)
