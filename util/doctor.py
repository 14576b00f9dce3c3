"""Examine what a training or an evaluation would start from, before it costs GPU-hours.

python -m util.doctor FLAGS OF main_tokenbridge.py
torchrun --nproc_per_node=8 -m util.doctor FLAGS OF main_tokenbridge.py

One line a check: ok, warning or FAILURE, with the remedy. The exit code is 1 if anything failed.
--json prints the same as one object. Nothing is written.
"""

import json
import sys
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from functools import partial

from util import dist, doctor_checks, stop
from util.dist import run
from util.doctor_patient import FAILURE, OK, WARNING, Finding, Patient, Unknown
from util.errors import UserError
from util.parser import Parser
from util.training_args import training_parser

CHECKS: dict[str, Callable[[Patient], Finding | list[Finding]]] = {
    "code": doctor_checks.code,
    "device": doctor_checks.device,
    "precision": doctor_checks.precision,
    "processes": doctor_checks.processes,
    "VAE": doctor_checks.vae,
    "photograph": doctor_checks.photograph,
    "latents": doctor_checks.latents,
    "quantizer": doctor_checks.quantizer,
    "data": doctor_checks.data,
    "cache": doctor_checks.cache,
    "model": doctor_checks.model,
    "checkpoint": doctor_checks.checkpoint,
    "FID statistics": doctor_checks.fid_statistics,
    "feature weights": doctor_checks.feature_weights,
    "disk space": doctor_checks.disk_space,
}
WORST = (FAILURE, WARNING, OK)


def make_parser() -> Parser:
    parser = training_parser(__doc__)
    group = parser.add_argument_group("doctor")
    group.add_argument("--photo", help="a natural photograph; default: those of scikit-learn")
    return parser


def main() -> None:
    args = make_parser().parse()
    with redirect_stdout(sys.stderr) if args.json else nullcontext():
        device = dist.init(args.device, args.dist_url, args.dist_on_itp)
        findings = examine(Patient(args, device))
    healthy = all(finding.state != FAILURE for finding in findings)
    if dist.is_main():
        if args.json:
            listed = [finding.to_dict() for finding in findings]
            print(json.dumps({"ok": healthy, "checks": listed}, indent=1))
        else:
            tell(findings)
    dist.barrier()
    dist.cleanup()
    if not healthy:
        sys.exit(1)


def examine(patient: Patient) -> list[Finding]:
    """All checks on all processes; what one of them finds worse than the main one is told, too."""
    own = []
    for name, check in CHECKS.items():
        dist.beat(f"examining: {name}")
        own.append(attempt(name, check, patient))
    merged = []
    for findings in zip(*dist.gather_objects(own), strict=True):
        rank = min(range(len(findings)), key=lambda r: (WORST.index(findings[r].state), r))
        merged.append(findings[rank].on_process(rank))
    return merged


def attempt(name: str, check: Callable[[Patient], Finding], patient: Patient) -> Finding:
    """One check; whatever goes wrong in it is its finding, and the next one goes on."""
    try:
        return check(patient).named(name)
    except stop.Stopped:
        raise
    except Unknown as error:
        return Finding(WARNING, f"not checked: {error}").named(name)
    except UserError as error:
        return Finding(FAILURE, str(error)).named(name)
    except Exception as error:  # a check that fails in an unforeseen way must not hide the others
        message = " ".join(str(error).split())[:200]
        return Finding(FAILURE, f"unexpected {type(error).__name__}: {message}").named(name)


def dry_run(args, device, checks: tuple[str, ...], step: Callable[[], dict]) -> dict:
    """--dry_run of a script: one step of it, and what it measured. Nothing is written."""
    figures = step()
    lines = [f"{name.replace('_', ' '):<24} {value}" for name, value in figures.items()]
    dist.print_main("\n".join([*lines, "nothing was written"]))
    return figures


def tell(findings: list[Finding]) -> None:
    for finding in findings:
        mark = finding.state.upper() if finding.state == FAILURE else finding.state
        remedy = f"; {finding.remedy}" if finding.remedy else ""
        print(f"{mark:<8} {finding.name:<16} {finding.text}{remedy}")
    counts = [sum(f.state == state for f in findings) for state in (OK, WARNING, FAILURE)]
    print("{} ok, {} warnings, {} failures".format(*counts))


cli = partial(run, main)

if __name__ == "__main__":
    cli()
