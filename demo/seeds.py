"""The accuracy of the demo's digits over several seeds: the whole demo for each, then a table.

python -m demo.seeds

The README reports seeds 21, 22 and 23. All settings, those of configs/digits.yaml and of sampling
in demo/run.sh, were chosen by the accuracy of seeds 11 to 14, and the VAE before any of them. Seed
1 was seen once, at a higher temperature, so it is none of the reported ones.
"""

import json
import subprocess

from util import ROOT, dist
from util.args import Parser
from util.errors import UserError


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[21, 22, 23], help="one demo each")
    parser.add_argument("--quick", action="store_true", help="few steps, to try this script")
    args = parser.parse()
    accuracies, rows = [], []
    for number in args.seeds:
        quick = ["--quick"] if args.quick else []
        command = ["bash", str(ROOT / "demo" / "run.sh"), *quick, "--seed", str(number)]
        if subprocess.run(command).returncode:
            raise UserError(f"the demo of --seeds {number} failed, see above")
        name = f"demo{'-quick' * args.quick}-seed{number}"
        scores = json.loads((ROOT / "output" / name / "scores.json").read_text())["generated"]
        accuracies.append(scores["accuracy"])
        rows.append(f"| {number} | {accuracies[-1]:.1%} | {scores['frechet_to_train']:.2f} |")
    print("\n| seed | accuracy | Fréchet distance |", "|---|---|---|", *rows, sep="\n")
    mean = sum(accuracies) / len(accuracies)
    print(f"\nmean {mean:.1%}, lowest {min(accuracies):.1%}")


if __name__ == "__main__":
    dist.run(main)
