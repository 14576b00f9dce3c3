"""Examine what a training or an evaluation would start from, before it costs GPU-hours.

python -m util.doctor FLAGS OF main_tokenbridge.py
torchrun --nproc_per_node=8 -m util.doctor FLAGS OF main_tokenbridge.py

One line a check: ok, warning or FAILURE, with the remedy. The exit code is 1 if anything failed.
--json prints the same as one object. Nothing is written.

Letters: C latent channels, K levels, B bins.
"""

import argparse
import io
import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlsplit

import torch
from torch import Tensor

from models.generate import to_uint8
from models.quantizer import build_quantizer, entropy
from models.tokenbridge import TokenBridge
from models.tokenizers.kl16 import VAE
from models.tokenizers.tokenizer import Tokenizer
from util import ROOT, dist, setup, stop
from util.args import Parser, train_parser, value
from util.checkpoint import find_checkpoint
from util.data.histogram import BINS, LatentHistogram
from util.data.images import ImageDataset, psnr
from util.data.latent_cache import CachedLatents
from util.data.training_set import TrainingData, is_without_data
from util.device import resolve_precision
from util.errors import UserError
from util.evaluation.extractor import INCEPTION, Extractor, published_weights, registered_name
from util.evaluation.reference import ADM_STATISTICS, check_statistics, load_fid_statistics
from util.files import load_tensors
from util.setup import Inputs
from util.vae import vae_digest

FAILURE, WARNING, OK = STATES = "failure", "warning", "ok"
# Of KL-16 on photographs: 24.1 dB with a standard deviation of 4.2 dB between ImageNet's images
# (Rombach et al., arXiv 2112.10752, table of autoencoders: f = 16, d = 16), less 1.5 of them.
LEAST_PSNR = 18.0
# Of unit-variance latents. KL-16's channels differ; far beyond these, scale or VAE is another one.
STD_OF_ALL, STD_OF_CHANNEL, MEAN_OF_CHANNEL = (0.9, 1.1), (0.5, 2.0), 1.0
MOST_SATURATED, MOST_UNUSED_BITS = 0.001, 1.0
MEASURED_IMAGES = 64  # of --data_path, where no cache says how the latents are distributed
ROOM = 2.0  # times the checkpoints' size, below which the space is called little
# Of an error in what the script opens: the check that reports it, by the flag that it names first.
OWNERS = dict.fromkeys(("--data_path", "--cached_path", "--use_cached"), "data")
OWNERS |= dict.fromkeys(("--resume", "--finetune", "--output_dir"), "checkpoint")


@dataclass(frozen=True)
class Finding:
    """text: what was found, with its values. remedy: what helps, if anything has to.

    by_channel: figures of every channel by name, for --json; the text has their extremes.
    """

    state: str
    text: str
    remedy: str = ""
    name: str = ""
    by_channel: dict[str, list[float]] = field(default_factory=dict)

    def __str__(self) -> str:
        return "; ".join(filter(None, (self.text, self.remedy)))


def judged(text: str, remedy: str, *problems: str | bool, state: str = WARNING) -> Finding:
    """ok, or the problems that are there, with the remedy."""
    if problems := [problem for problem in problems if problem]:
        return Finding(state, f"{text}: {'; '.join(problems)}", remedy)
    return Finding(OK, text)


class Opened:
    """What the flags of a script lead to; each part is opened when a check first asks for it.

    Flags that only a training has are at their defaults; nothing in its folders is changed.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device):
        known = vars(make_parser().parse([])) | vars(args)
        self.args, self.device = argparse.Namespace(**known), device
        self.size = value(args, "img_size")
        self.owners: dict[str, str] = {}  # the check that reports an error, by its message

    @cached_property
    def vae(self) -> VAE:
        return setup.build_vae(self.args).eval()

    @property
    def inputs(self) -> Inputs:
        """As a training or an evaluation opens them; an error is the same at each use."""
        if isinstance(self._inputs, UserError):
            raise self._inputs
        return self._inputs

    @cached_property
    def _inputs(self) -> Inputs | UserError:
        try:
            if self.args.evaluate:
                return self._evaluated()
            return setup.open_inputs(self.args, read_only=True)
        except UserError as error:
            flag = re.search(r"--\w+|$", str(error))[0]
            self.owners.setdefault(str(error), OWNERS.get(flag, "model"))
            return error

    def _evaluated(self) -> Inputs:
        args = self.args
        if not args.resume:
            raise UserError("--resume is missing: --evaluate needs the folder of a checkpoint")
        checkpoint = find_checkpoint(args.resume, args.output_dir, True, True)
        config = setup.build_config(args, checkpoint, vae=self.vae)
        setup.check_vae(self.vae, config, value(args, "vae_path"))
        self.size = config.img_size
        return Inputs(checkpoint, self.vae, TrainingData([], [], "--evaluate", None), config, None)

    @cached_property
    def model(self) -> TokenBridge:
        """Without its numbers."""
        settings = self.inputs.config.to_dict()  # which may read the VAE, and that with its numbers
        with torch.device("meta"):
            return TokenBridge(**settings)

    @cached_property
    def extractor(self) -> Extractor | None:
        """None where its weights are not at hand: nothing is downloaded here."""
        given, name = self.args.inception_weights, registered_name(self.args.feature_extractor)
        path = Path(given) if given else published_weights()
        if self.args.no_metrics or not given and (name != INCEPTION or not path.is_file()):
            return None
        load_tensors(path, "--inception_weights")
        return Extractor(name, path, torch.device("cpu"))

    @cached_property
    def latents(self) -> tuple[LatentHistogram, Tensor]:
        """How the latents are distributed, and the scaled value of each bin [C, B]."""
        data, scale = self.inputs.data, self.inputs.config.latent_scale
        if data.manifest and data.manifest.get("histogram"):
            histogram = LatentHistogram.from_dict(data.manifest["histogram"])
        else:
            histogram = self._measured(data.dataset)
        middles = torch.arange(BINS) - BINS // 2 + 0.5
        return histogram, middles * histogram.bin_widths(scale)[:, None]

    def _measured(self, dataset: ImageDataset | CachedLatents) -> LatentHistogram:
        """Of some of the images, or of the cached posteriors."""
        tokenizer = Tokenizer(self.inputs.vae, 1.0).to(self.device)
        is_cache = isinstance(dataset, CachedLatents)
        encode = tokenizer.from_moments if is_cache else tokenizer.encode
        histogram = LatentHistogram.empty(self.inputs.config.vae_embed_dim)
        for i in range(0, len(dataset), max(1, len(dataset) // MEASURED_IMAGES)):
            generator = torch.Generator(self.device).manual_seed(value(self.args, "seed"))
            images = torch.as_tensor(dataset[i][0])[None].to(self.device)
            histogram += LatentHistogram.of(encode(images, generator).cpu())
        return histogram


def code(_opened: Opened) -> Finding:
    """No other checkout or package has our names, where Python or pip would find it first."""
    folders = {Path(entry).resolve() for entry in sys.path}
    for distribution in metadata.distributions(name="tokenbridge"):
        record = json.loads(distribution.read_text("direct_url.json") or "{}")
        if record.get("dir_info", {}).get("editable"):
            folders.add(Path(unquote(urlsplit(record["url"]).path)).resolve())
    names = [f"{name}{end}" for name in ("models", "util") for end in ("/__init__.py", ".py")]
    others = [f for f in sorted(folders - {ROOT}) if any((f / name).is_file() for name in names)]
    remedy = "pip install -e . here, pip uninstall the other, or take it off PYTHONPATH"
    return judged(f"of {ROOT}", remedy, *(f"another models or util is in {f}" for f in others))


def device(opened: Opened) -> Finding:
    device, asked = opened.device, opened.args.device
    text = f"torch {torch.__version__}, {device}"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        text += f" ({properties.name}, {properties.total_memory / 2**30:.0f} GiB)"
    missing = asked.partition(":")[0] != device.type and f"--device {asked} is not here"
    return judged(text, "install a torch that sees it, or pass --device cpu", missing)


def precision(opened: Opened) -> Finding:
    """A small product in the training's arithmetic, against the same in double precision."""
    chosen = resolve_precision(opened.args.precision, opened.device)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(64, 64, generator=generator) for _ in range(2))
    with chosen.autocast(opened.device):
        product = (a.to(opened.device) @ b.to(opened.device)).cpu()
    exact = a.double() @ b.double()
    error = ((product.double() - exact).norm() / exact.norm()).item()
    text = f"{chosen.name}, relative error of a product {error:.1e}"
    wrong = not error < 0.02 and "the arithmetic is wrong here"  # also where it is NaN
    return judged(text, "pass another --precision", wrong, state=FAILURE)


def processes(opened: Opened) -> Finding:
    size = dist.world_size()
    total = dist.all_reduce_sum(torch.ones(1, device=opened.device)).item()
    wrong = total != size and f"the sum of their ones is {total:g}"
    text = f"{size} by {dist.backend()}" if size > 1 else "one; torchrun tries the backend, too"
    return judged(text, "see NCCL_DEBUG=INFO", wrong, state=FAILURE)


def vae(opened: Opened) -> Finding:
    path, args = value(opened.args, "vae_path"), opened.args
    needed = not (args.use_cached or is_without_data(args)) or args.online_eval or args.evaluate
    if not needed and not Path(path).exists():
        return Finding(OK, f"--vae_path {path} is not there, and no image has to be encoded")
    kind = "KL-16" if opened.vae.is_kl16 else "a VAE that is not KL-16"
    text = f"{kind}, {opened.vae.channels} channels, stride {opened.vae.stride}, all tensors match"
    return Finding(OK, f"{text}, sha256 {vae_digest(path)}")


def photograph(opened: Opened) -> Finding:
    """A natural photograph must come back from the VAE about as well as KL-16's do."""
    args, paths = opened.args, [opened.args.photo]
    if args.photo is None:
        try:
            from sklearn import datasets
        except ImportError:
            remedy = "pip install scikit-learn, which has two photographs, or name one by --photo"
            return Finding(WARNING, "not checked", remedy)
        folder = Path(datasets.__file__).parent / "images"
        paths = [str(folder / name) for name in ("china.jpg", "flower.jpg")]
    tokenizer, values = Tokenizer(opened.vae, 1.0).to(opened.device), {}
    for path in paths:
        photo = ImageDataset([(path, 0)], opened.size, "raise", args.max_image_pixels)
        pixels = photo[0][0][None]  # uint8 [1, 3, S, S]
        posterior = tokenizer.posterior(pixels.to(opened.device))
        decoded = to_uint8(tokenizer.decode(tokenizer.mode(posterior))).cpu()
        values[Path(path).name] = psnr(decoded, pixels).item()
    text = ", ".join(f"{name} {value:.1f} dB" for name, value in values.items())
    poor = min(values.values()) < LEAST_PSNR and f"below {LEAST_PSNR:g} dB"
    if opened.vae.is_kl16:
        return judged(text, "this is not kl16.ckpt as published: fetch it", poor, state=FAILURE)
    remedy = "right only if it was trained for other images than photographs"
    return judged(f"{text} (not KL-16)", remedy, poor)


def _channels(problem: Tensor, text: str) -> str | bool:
    """problem: [C] bool. The text with those channels, if there are any."""
    return bool(problem.any()) and text.format(problem.nonzero().flatten().tolist())


def latents(opened: Opened) -> Finding:
    """Mean and std of each channel after scaling: about 0 and 1."""
    if opened.args.evaluate:
        return Finding(OK, "not read: --evaluate draws them")
    histogram, values = opened.latents
    share = histogram.counts / histogram.counts.sum(dim=1, keepdim=True).double()  # [C, B]
    mean = (share * values).sum(dim=1)
    std = (share * (values - mean[:, None]).square()).sum(dim=1).sqrt()
    total = ((share * values.square()).sum(dim=1).mean() - mean.mean() ** 2).sqrt().item()
    text = (
        f"scaled by {opened.inputs.config.latent_scale:.4g}: std {total:.3f}, "
        f"by channel {std.min():.2f} to {std.max():.2f}, mean {mean.min():.2f} to {mean.max():.2f}"
    )
    far = (std < STD_OF_CHANNEL[0]) | (std > STD_OF_CHANNEL[1])
    finding = judged(
        text,
        "check --vae_path and --latent_scale; --quantizer calibrated adapts",
        not STD_OF_ALL[0] <= total <= STD_OF_ALL[1] and "std is not near 1",
        _channels(far, "std of channels {} is far from 1"),
        _channels(mean.abs() > MEAN_OF_CHANNEL, "mean of channels {} is far from 0"),
    )
    return replace(finding, by_channel={"mean": mean.tolist(), "std": std.tolist()})


def quantizer(opened: Opened) -> Finding:
    """Use of the levels by the latents, and how much of them lies beyond the range."""
    if opened.args.evaluate:
        return Finding(OK, "not measured: --evaluate reads no latents")
    histogram, values = opened.latents
    inputs, config, channels = opened.inputs, opened.inputs.config, len(histogram.counts)
    kind, levels = config.quantizer, config.quant_levels
    made = build_quantizer(kind, levels, config.quant_min, config.quant_max, channels)
    if kind == "calibrated" and inputs.checkpoint is not None:
        weights = inputs.checkpoint.weights("model")
        made.set_levels(weights["boundaries"], weights["reconstruction_values"])
    elif kind == "calibrated":
        digest = inputs.data.vae_sha256
        known = setup.cache_histogram(opened.args.cached_path, channels, digest)
        made.set_levels(*setup.calibrated_levels(known, levels, config.latent_scale))
    scalars = values.T.float()  # [B, C]
    counts = torch.zeros(channels, levels, dtype=torch.int64)
    counts.scatter_add_(1, made.encode(scalars).T, histogram.counts)
    bits, full = entropy(counts), math.log2(levels)
    outside = (made.outside(scalars).T * histogram.counts).sum(dim=1) / histogram.counts.sum(dim=1)
    finding = judged(
        f"{kind}, entropy {bits.min():.2f} to {bits.max():.2f} of {full:g} bits by channel, "
        f"out of range {outside.min():.2%} to {outside.max():.2%}",
        "check --latent_scale, --quant_min and --quant_max, or pass --quantizer calibrated",
        _channels(bits < full - MOST_UNUSED_BITS, "channels {} use less than half of the levels"),
        _channels(outside > MOST_SATURATED, "channels {} saturate"),
    )
    figures = {"entropy_bits": bits.tolist(), "out_of_range_share": outside.tolist()}
    return replace(finding, by_channel=figures)


def data(opened: Opened) -> Finding:
    if opened.inputs and opened.args.evaluate:
        return Finding(OK, "not read: --evaluate needs none")
    data = opened.inputs.data
    text = f"{data.source}: {len(data.dataset)} images in {len(data.classes)} classes"
    form = "of the published form, which does not say by which VAE"
    published = opened.args.use_cached and not data.manifest and form
    return judged(text, "make sure that it was this one", published)


def model(opened: Opened) -> Finding:
    """Flags, checkpoint, cache and VAE agree on the model's settings."""
    config = opened.inputs.config
    millions = sum(p.numel() for p in opened.model.parameters()) / 1e6
    return Finding(
        OK,
        f"{millions:.1f} M parameters, {config.seq_len} positions of {config.token_dim} scalars, "
        f"{config.quant_levels} levels ({config.quantizer}), {config.class_num} classes",
    )


def checkpoint(opened: Opened) -> Finding:
    checkpoint = opened.inputs.checkpoint
    if checkpoint is None:
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


def fid_statistics(opened: Opened) -> Finding:
    args, extractor = opened.args, opened.extractor
    name = registered_name(args.feature_extractor)
    path = args.fid_stats
    if not path and name == INCEPTION and ADM_STATISTICS.is_file():
        path = str(ADM_STATISTICS)
    if args.no_metrics or (not path and args.fid_reference):
        return Finding(OK, "not needed: --no_metrics or --fid_reference")
    if not path:
        remedy = "put ADM's adm_in256_stats.npz into fid_stats/, or name a file with --fid_stats"
        return Finding(WARNING, "no statistics, so FID cannot be computed", remedy)
    if extractor is None and name != INCEPTION:
        remedy = f"name a file of {name}'s weights by --inception_weights"
        return Finding(WARNING, "not checked without the extractor", remedy)
    features, identity = 2048, {"extractor": name}
    if extractor is not None:
        features = extractor.width("fid", opened.size)
        identity = extractor.identity() | {"layer": extractor.layers["fid"]}
    stats = load_fid_statistics(path, features)
    record, doubts = check_statistics(path, stats, identity, opened.size)
    text = f"{path}, {features} features, sha256 {record['fid_stats_sha256']}"
    return judged(text, "python -m util.fid_stats makes statistics of your own images", *doubts)


def feature_weights(opened: Opened) -> Finding:
    args, extractor = opened.args, opened.extractor
    if extractor is not None:
        widths = {metric: extractor.width(metric, opened.size) for metric in extractor.layers}
        return Finding(
            OK, f"{extractor.name}, features {widths}, sha256 {extractor.weights_sha256}"
        )
    if args.no_metrics or registered_name(args.feature_extractor) != INCEPTION:
        return Finding(OK, "not needed: --no_metrics, or an extractor that finds its own")
    remedy = f"put torch-fidelity's at {published_weights()}, or name them by --inception_weights"
    return Finding(WARNING, "no Inception weights here; they would be downloaded", remedy)


def disk_space(opened: Opened) -> Finding:
    """fp32 weights, their average and AdamW's two moments, for every file that is kept."""
    args = opened.args
    if args.evaluate:
        return Finding(OK, "not needed: an evaluation saves no checkpoint")
    size = 4 * 4 * sum(p.numel() for p in opened.model.parameters())
    milestones = args.epochs // args.save_every if args.save_every else 0
    files = args.keep_checkpoints + milestones + 1  # the one being written
    path = Path(args.output_dir).absolute()
    folder = next(parent for parent in (path, *path.parents) if parent.exists())
    free, needed = shutil.disk_usage(folder).free, size * files
    return judged(
        f"{free / 2**30:.1f} GiB free in {folder}, {files} checkpoints of {size / 2**30:.2f} GiB "
        f"take {needed / 2**30:.1f}",
        "free some, name another --output_dir, or keep fewer (--keep_checkpoints)",
        free < ROOM * needed and ("too little" if free < needed else "little is left for images"),
        state=FAILURE if free < needed else WARNING,
    )


CHECKS: dict[str, Callable[[Opened], Finding]] = {
    "code": code,
    "device": device,
    "precision": precision,
    "processes": processes,
    "VAE": vae,
    "photograph": photograph,
    "data": data,
    "checkpoint": checkpoint,
    "model": model,
    "latents": latents,
    "quantizer": quantizer,
    "FID statistics": fid_statistics,
    "feature weights": feature_weights,
    "disk space": disk_space,
}
# Of a training's --dry_run, before its step.
TRAINING_CHECKS = ("code", "device", "precision", "processes", "VAE", "data", "checkpoint", "model")
TRAINING_CHECKS += ("disk space",)


def attempt(name: str, opened: Opened, names: tuple[str, ...] = tuple(CHECKS)) -> Finding:
    """One of those checks; whatever goes wrong in it is its finding, and the next one goes on."""
    with io.StringIO() as notes, redirect_stdout(notes), redirect_stderr(notes):
        try:
            finding = CHECKS[name](opened)
        except stop.Stopped:
            raise
        except UserError as error:
            owner = opened.owners.setdefault(str(error), name)
            finding = Finding(FAILURE, str(error))
            if owner != name and owner in names:
                finding = Finding(WARNING, f"not checked: see {owner}")
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
        own.append(attempt(name, opened, names))
    for findings in zip(*dist.gather_objects(own), strict=True):
        rank = min(range(len(findings)), key=lambda r: (STATES.index(findings[r].state), r))
        text = f"process {rank}: {findings[rank].text}" if rank else findings[rank].text
        merged.append(replace(findings[rank], text=text))
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
    """--dry_run of a script: those checks, then one step and what it measured.

    step: makes one step of the script at hand, returns figures by name (dict), writes nothing.
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
    if name.startswith("bytes") and value is not None:
        return f"{value / 2**30:.3g} GiB"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "not known" if value is None else f"{value:,}" if type(value) is int else str(value)


def make_parser() -> Parser:
    parser = train_parser(__doc__)
    group = parser.add_argument_group("doctor")
    group.add_argument("--photo", help="a natural photograph; default: those of scikit-learn")
    return parser


def main() -> None:
    args = make_parser().parse()
    with redirect_stdout(sys.stderr) if args.json else nullcontext():
        device = dist.init(args.device, args.dist_url, args.dist_on_itp)
        findings = examine(Opened(args, device))
    healthy = all(finding.state != FAILURE for finding in findings)
    figures = {"ok": healthy, "checks": [asdict(finding) for finding in findings]}
    dist.print_main(json.dumps(figures, indent=1) if args.json else report(findings))
    dist.cleanup()
    if not healthy:
        sys.exit(1)


cli = partial(dist.run, main)

if __name__ == "__main__":
    cli()
