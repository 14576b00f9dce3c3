"""Examine what a training or an evaluation would start from, before it costs GPU-hours.

python -m util.doctor FLAGS OF main_tokenbridge.py
torchrun --nproc_per_node=8 -m util.doctor FLAGS OF main_tokenbridge.py

One line a check: ok, warning or FAILURE, with the remedy. The exit code is 1 if anything failed.
--json prints the same as one object. Nothing is written.

Letters: N images, C latent channels, K levels.
"""

import argparse
import io
import math
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch

from models.quantizer import GaussianQuantizer, entropy, level_counts
from models.tokenbridge import TokenBridge
from models.tokenizers.tokenizer import Tokenizer, to_uint8
from util import dist
from util.args import Parser, train_parser, value
from util.data.images import ImageDataset, psnr
from util.data.training_set import needs_vae
from util.device import resolve_precision
from util.errors import UserError
from util.logging import figures_on_stdout
from util.optim import WIDTHS
from util.setup import Inputs, build_vae, open_evaluated, open_inputs
from util.vae import vae_digest
from util.validation import evenly_spread, read_latents

FAILURE, WARNING, OK = STATES = "failure", "warning", "ok"
# Of KL-16 on photographs: 24.1 dB with a standard deviation of 4.2 dB between ImageNet's images
# (Rombach et al., arXiv 2112.10752, table of autoencoders: f = 16, d = 16), less 1.5 of them.
LEAST_PSNR = 18.0
# Of unit-variance latents. KL-16's channels differ; far beyond these, scale or VAE is another one.
STD_OF_ALL, STD_OF_CHANNEL, MEAN_OF_CHANNEL = (0.9, 1.1), (0.5, 2.0), 1.0
MOST_SATURATED, MOST_UNUSED_BITS = 0.001, 1.0
MEASURED = 64  # images, or cached latents of so many
ROOM = 2.0  # times the checkpoints' size, below which the space is called little


@dataclass(frozen=True)
class Finding:
    """text: what was found, with its values. remedy: what helps, if anything has to."""

    state: str
    text: str
    remedy: str = ""
    name: str = ""

    def __str__(self) -> str:
        return "; ".join(filter(None, (self.text, self.remedy)))


def judged(text: str, remedy: str, *problems: str | bool, state: str = WARNING) -> Finding:
    """ok, or the problems that are there, with the remedy."""
    if problems := [problem for problem in problems if problem]:
        return Finding(state, f"{text}: {'; '.join(problems)}", remedy)
    return Finding(OK, text)


class Opened:
    """What the flags lead to; each part is opened when a check first asks for it.

    Flags that only a training has are at their defaults. Nothing in the folders of a run is
    changed.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device):
        known = vars(make_parser().parse([])) | vars(args)
        self.args, self.device = argparse.Namespace(**known), device

    @cached_property
    def inputs(self) -> Inputs:
        """As a training or an evaluation opens them."""
        opening = open_evaluated if self.args.evaluate else open_inputs
        return opening(self.args, read_only=True)

    @cached_property
    def model(self) -> TokenBridge:
        """Without its numbers."""
        settings = self.inputs.config.to_dict()  # which may read the VAE, and that with its numbers
        with torch.device("meta"):
            return TokenBridge(**settings)


def device(opened: Opened) -> Finding:
    device, args = opened.device, opened.args
    text = f"torch {torch.__version__}, {device}"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        text += f" ({properties.name}, {properties.total_memory / 2**30:.0f} GiB)"
    text += f", --precision {resolve_precision(args.precision, device, args.tf32).name}"
    missing = args.device.partition(":")[0] != device.type and f"--device {args.device} is not here"
    return judged(text, "install a torch that sees it, or pass --device cpu", missing)


def processes(opened: Opened) -> Finding:
    size = dist.world_size()
    total = dist.all_reduce_sum(torch.ones(1, device=opened.device)).item()
    wrong = total != size and f"the sum of their ones is {total:g}"
    text = f"{size} by {dist.backend()}" if size > 1 else "one; torchrun tries the backend, too"
    return judged(text, "see NCCL_DEBUG=INFO", wrong, state=FAILURE)


def vae(opened: Opened) -> Finding:
    """It fits, and a natural photograph comes back from it about as well as from KL-16."""
    args, path = opened.args, value(opened.args, "vae_path")
    if not Path(path).exists() and not (needs_vae(args) or args.evaluate):
        return Finding(OK, f"--vae_path {path} is not there, and no image has to be encoded")
    vae = build_vae(args).eval()
    kind = "KL-16" if vae.is_kl16 else "a VAE that is not KL-16"
    text = f"{kind}, {vae.channels} channels, stride {vae.stride}, all tensors match"
    text += f", sha256 {vae_digest(path)}"
    if not (photos := [args.photo] if args.photo else sample_photos()):
        remedy = "pip install scikit-learn, which has two photographs, or name one by --photo"
        return Finding(WARNING, f"{text}; not tried", remedy)
    tokenizer, values = Tokenizer(vae, 1.0).to(opened.device), {}
    for photo in photos:
        crop, _ = ImageDataset([(photo, 0)], value(args, "img_size"))[0]
        pixels = crop[None]  # uint8 [1, 3, S, S]
        posterior = tokenizer.posterior(pixels.to(opened.device))
        decoded = to_uint8(tokenizer.decode(tokenizer.mode(posterior))).cpu()
        values[Path(photo).name] = psnr(decoded, pixels).item()
    text += "".join(f", {name} {value:.1f} dB" for name, value in values.items())
    poor = min(values.values()) < LEAST_PSNR and f"below {LEAST_PSNR:g} dB"
    if vae.is_kl16:
        return judged(text, "this is not kl16.ckpt as published: fetch it", poor, state=FAILURE)
    return judged(text, "right only if it was trained for other images than photographs", poor)


def sample_photos() -> list[str]:
    with suppress(ImportError):
        from sklearn.datasets import load_sample_images

        return load_sample_images().filenames
    return []


def inputs(opened: Opened) -> Finding:
    """Flags, data, checkpoint, cache and VAE agree on the model's settings."""
    config, data = opened.inputs.config, opened.inputs.data
    millions = sum(p.numel() for p in opened.model.parameters()) / 1e6
    images = f"{len(data.dataset)} images in {len(data.classes)} classes"
    levels = f"{config.codebook_size or config.quant_levels} levels ({config.quantizer})"
    levels = levels if config.quantizer else "continuous"
    text = (
        f"{data.source}{'' if opened.args.evaluate else f': {images}'}; {millions:.1f} M "
        f"parameters, {config.seq_len} positions of {config.token_dim} scalars, "
        f"{levels}, head {config.head}, {config.class_num} classes"
    )
    form = "a cache of the published form does not say by which VAE"
    published = opened.args.use_cached and not data.manifest and form
    return judged(text, "make sure that it was this one", published)


def checkpoint(opened: Opened) -> Finding:
    checkpoint = opened.inputs.checkpoint
    if not checkpoint:
        return Finding(OK, "none yet: training starts from scratch")
    expected = {name: tuple(p.shape) for name, p in opened.model.published_parameters()}
    state = checkpoint.weights("model")
    wrong = [n for n, shape in expected.items() if n not in state or state[n].shape != shape]
    return judged(
        f"{checkpoint.path}, checksums agree, {len(expected)} tensors",
        "it is of another model: see --model and --patch_size",
        bool(wrong) and f"{len(wrong)} are missing or of another shape, as {wrong[0]}",
        state=FAILURE,
    )


def latents(opened: Opened) -> Finding:
    """Mean and std of each channel after scaling: about 0 and 1; and use of the levels by them."""
    if opened.args.evaluate:
        return Finding(OK, "not read: --evaluate draws them")
    if opened.inputs.config.head == "codebook":
        return Finding(OK, "entries of the codebook, scaled to a mean square of 1")
    inputs, config = opened.inputs, opened.inputs.config
    numbers = evenly_spread(len(inputs.data.dataset), MEASURED)
    tokenizer = Tokenizer(inputs.vae, *config.latent_norm).to(opened.device)
    latents, _ = read_latents(inputs.data.dataset, numbers, tokenizer, opened.device)
    scalars = latents.movedim(1, -1).flatten(0, 2)  # [N h w, C]
    total, (std, mean) = scalars.std().item(), torch.std_mean(scalars, dim=0)
    far = (std < STD_OF_CHANNEL[0]) | (std > STD_OF_CHANNEL[1]) | (mean.abs() > MEAN_OF_CHANNEL)
    found, wrong = {"std": std, "mean": mean}, {"std far from 1, or mean from 0": far}
    remedy = f"check --vae_path and {'--latent_stats' if config.latent_std else '--latent_scale'}"
    if config.quantizer == "published":  # calibrated levels are fitted to these latents
        levels, full = config.quant_levels, math.log2(config.quant_levels)
        quantizer = GaussianQuantizer(levels, config.quant_min, config.quant_max)
        bits = entropy(level_counts(quantizer.encode(scalars), levels))
        outside = quantizer.outside(scalars).double().mean(dim=0)
        found |= {f"entropy in bits, of {full:g}": bits, "% out of range": 100 * outside}
        wrong["less than half of the levels used"] = bits < full - MOST_UNUSED_BITS
        wrong["saturated"] = outside > MOST_SATURATED
        remedy += ", --quant_min and --quant_max; --quantizer calibrated adapts"
    ranges = (f"{name} {x.min():.2f} to {x.max():.2f}" for name, x in found.items())
    return judged(
        f"of {len(latents)} images, std {total:.3f}; by channel {', '.join(ranges)}",
        remedy,
        not STD_OF_ALL[0] <= total <= STD_OF_ALL[1] and "std is not near 1",
        *(
            f"{what} in channels {channels.nonzero().flatten().tolist()}"
            for what, channels in wrong.items()
            if channels.any()
        ),
    )


def disk_space(opened: Opened) -> Finding:
    """fp32 weights, their averages and AdamW's two moments, for every file that is kept."""
    args = opened.args
    if args.evaluate:
        return Finding(OK, "not needed: an evaluation saves no checkpoint")
    tracks = len(WIDTHS) if args.posthoc_ema else 0
    copy = 4 * sum(p.numel() for p in opened.model.parameters())
    size = copy * (3 + len(args.ema_rate) + tracks)
    snapshots = copy * tracks * (args.epochs // max(1, args.posthoc_ema))
    milestones = args.epochs // args.save_every if args.save_every else 0
    files = args.keep_checkpoints + milestones + 1  # the one being written
    path = Path(args.output_dir).absolute()
    folder = next(parent for parent in (path, *path.parents) if parent.exists())
    free, needed = shutil.disk_usage(folder).free, size * files + snapshots
    return judged(
        f"{free / 2**30:.1f} GiB free in {folder}, {files} checkpoints of {size / 2**30:.2f} GiB "
        f"{'and snapshots ' if snapshots else ''}take {needed / 2**30:.1f}",
        "free some, name another --output_dir, or keep fewer (--keep_checkpoints)",
        free < ROOM * needed and ("too little" if free < needed else "little is left for images"),
        state=FAILURE if free < needed else WARNING,
    )


# Those after "inputs" need them.
CHECKS: dict[str, Callable[[Opened], Finding]] = {
    "device": device,
    "processes": processes,
    "VAE": vae,
    "inputs": inputs,
    "checkpoint": checkpoint,
    "latents": latents,
    "disk space": disk_space,
}
# Of a training's --dry_run, before its step.
TRAINING_CHECKS = ("device", "processes", "VAE", "inputs", "checkpoint", "disk space")


def attempt(name: str, opened: Opened) -> Finding:
    """One of those checks; whatever goes wrong in it is its finding, and the next one goes on."""
    with io.StringIO() as notes, redirect_stdout(notes), redirect_stderr(notes):
        try:
            finding = CHECKS[name](opened)
        except UserError as error:
            finding = Finding(FAILURE, str(error))
        except Exception as error:  # an unforeseen failure must not hide the other checks
            message = " ".join(str(error).split())[:200]
            finding = Finding(FAILURE, f"unexpected {type(error).__name__}: {message}")
        lines = notes.getvalue().splitlines()
    if finding.state == OK and any(line.startswith(("note: ", "warning: ")) for line in lines):
        finding = replace(finding, state=WARNING)
    return replace(finding, name=name, text="; ".join([finding.text, *lines]))


def examine(opened: Opened, names: tuple[str, ...] = tuple(CHECKS)) -> list[Finding]:
    """Those checks on all processes; what one of them finds worse than the main one counts."""
    own, merged = [], []
    for name in names:
        dist.beat(f"examining: {name}")
        if ("inputs", FAILURE) in [(finding.name, finding.state) for finding in own]:
            own.append(Finding(WARNING, "not checked: see inputs", name=name))
        else:
            own.append(attempt(name, opened))
    for findings in zip(*dist.gather_objects(own), strict=True):
        worst = min(findings, key=lambda finding: STATES.index(finding.state))
        rank = findings.index(worst)
        merged.append(replace(worst, text=f"process {rank}: {worst.text}") if rank else worst)
    return merged


def report(findings: list[Finding]) -> str:
    lines = []
    for finding in findings:
        mark = finding.state.upper() if finding.state == FAILURE else finding.state
        lines.append(f"{mark:<8} {finding.name:<16} {finding}")
    counts = [sum(f.state == state for f in findings) for state in reversed(STATES)]
    return "\n".join([*lines, "{} ok, {} warnings, {} failures".format(*counts)])


def dry_run(
    args: argparse.Namespace, device: torch.device, checks: tuple[str, ...], step: Callable
) -> dict:
    """Those checks, then one step and what it measured.

    step: makes one step, returns figures by name (dict), writes nothing.
    Raises UserError if a check fails.
    """
    findings = examine(Opened(args, device), checks)
    dist.print_main(report(findings))
    if failures := [str(finding) for finding in findings if finding.state == FAILURE]:
        raise UserError(failures[0])
    figures = step()
    lines = [f"{name.replace('_', ' '):<24} {_shown(name, x)}" for name, x in figures.items()]
    dist.print_main("\n".join([*lines, "nothing was written"]))
    return figures


def _shown(name: str, value) -> str:
    """A figure with its unit."""
    if name.startswith("bytes"):
        return f"{value / 2**30:.3g} GiB"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def make_parser() -> Parser:
    parser = train_parser(__doc__)
    group = parser.add_argument_group("doctor")
    group.add_argument("--photo", help="a natural photograph; default: those of scikit-learn")
    return parser


def main() -> None:
    args = make_parser().parse()
    with figures_on_stdout(args.json) as figures:
        device = dist.init(args.device, args.dist_url, args.dist_on_itp, args.dist_timeout)
        findings = examine(Opened(args, device))
        healthy = all(finding.state != FAILURE for finding in findings)
        figures.update(ok=healthy, checks=list(map(asdict, findings)))
    if not args.json:
        dist.print_main(report(findings))
    dist.cleanup()
    if not healthy:
        sys.exit(1)


cli = partial(dist.run, main)

if __name__ == "__main__":
    cli()
