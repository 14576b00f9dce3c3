"""The checks of util.doctor, one function each: what it looks at, what is right, what helps.

A check takes the patient, the flags of a training and what they lead to, and returns a Finding. It
may raise UserError, which becomes a failure, and Unknown, where something it needs is missing.
Letters: N images, C latent channels, h, w positions, K levels, B bins.
"""

import json
import shutil
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.generate import to_uint8
from models.quantizer import build_quantizer, entropy
from models.tokenizers.tokenizer import Tokenizer
from util import ROOT, dist
from util.build import cache_histogram, calibrated_levels, check_vae
from util.data.histogram import BINS, LatentHistogram
from util.data.images import center_crop, psnr, read_image
from util.data.latent_cache import open_cache
from util.data.listing import list_images, print_class_notes
from util.device import resolve_precision
from util.doctor_patient import FAILURE, OK, WARNING, Finding, Patient, Unknown, judged
from util.errors import UserError
from util.evaluation.extractor import INCEPTION, published_weights, registered_name
from util.evaluation.reference import ADM_STATISTICS, check_statistics, load_fid_statistics
from util.inputs import check_same_classes

# KL-16 reconstructs ImageNet's validation images at 24.1 dB, with a standard deviation of 4.2 dB
# between images (Rombach et al., arXiv 2112.10752, appendix, table of autoencoders: f = 16,
# d = 16). 18 dB is 1.5 of them lower; random weights give 8 to 9 dB.
LEAST_PSNR = 18.0
# Of unit-variance latents. KL-16's channels differ; far beyond these, scale or VAE is another one.
STD_OF_ALL, STD_OF_CHANNEL, MEAN_OF_CHANNEL = (0.9, 1.1), (0.5, 2.0), 1.0
MOST_SATURATED, MOST_UNUSED_BITS = 0.001, 1.0
INCEPTION_FEATURES = 2048
ROOM = 2.0  # times the checkpoints' size, below which the space is called little


# --- machine


def code(_patient: Patient) -> Finding:
    """No other checkout or package has our names, where Python or pip would find it first."""
    places = {Path(entry).resolve() for entry in sys.path} | _editable_checkouts()
    others = [place for place in sorted(places - {ROOT}) if _has_our_names(place)]
    problems = [f"another models or util is in {place}" for place in others]
    remedy = "pip install -e . here, pip uninstall the other, or take it off PYTHONPATH"
    return judged(problems, f"of {ROOT}", remedy)


def _has_our_names(place: Path) -> bool:
    files = (f"{name}{end}" for name in ("models", "util") for end in ("/__init__.py", ".py"))
    return any((place / file).is_file() for file in files)


def _editable_checkouts() -> set[Path]:
    """Those that pip install -e . has registered under our name."""
    found = (d.read_text("direct_url.json") for d in metadata.distributions(name="tokenbridge"))
    records = [json.loads(text) for text in found if text]
    editable = [r["url"] for r in records if r.get("dir_info", {}).get("editable")]
    return {Path(unquote(urlsplit(url).path)).resolve() for url in editable}


def device(patient: Patient) -> Finding:
    found, asked = patient.device, patient.args.device
    text = f"torch {torch.__version__}, {found}"
    if found.type == "cuda":
        properties = torch.cuda.get_device_properties(found)
        text += f" ({properties.name}, {properties.total_memory / 2**30:.0f} GiB)"
    missing = [f"--device {asked} is not here"] if asked.partition(":")[0] != found.type else []
    return judged(missing, text, "install a torch that sees it, or pass --device cpu")


def precision(patient: Patient) -> Finding:
    """A small product in the training's arithmetic, against the same in double precision."""
    chosen = resolve_precision(patient.args.precision, patient.device)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(64, 64, generator=generator) for _ in range(2))
    with chosen.autocast(patient.device):
        product = (a.to(patient.device) @ b.to(patient.device)).cpu()
    exact = a.double() @ b.double()
    error = ((product.double() - exact).norm() / exact.norm()).item()
    text = f"{chosen.name}, relative error of a product {error:.1e}"
    problems = [] if error < 0.02 else ["the arithmetic is wrong here"]  # NaN compares as false
    return judged(problems, text, "pass another --precision", FAILURE)


def processes(patient: Patient) -> Finding:
    """A sum over all processes, where there are several."""
    size = dist.world_size()
    if size == 1:
        return Finding(OK, "one process; under torchrun this tries the backend, too")
    total = dist.all_reduce_sum(torch.tensor([dist.rank() + 1.0], device=patient.device)).item()
    text = f"{size} processes by {dist.backend()}, their sum is {total:g}"
    expected = size * (size + 1) / 2
    problems = [] if total == expected else [f"it should be {expected:g}"]
    return judged(problems, text, "see NCCL_DEBUG=INFO", FAILURE)


# --- tokenizer


def vae(patient: Patient) -> Finding:
    args = patient.args
    if isinstance(patient.vae_or_error, UserError):
        if not patient.needs_vae and not Path(args.vae_path).exists():
            return Finding(
                OK, f"--vae_path {args.vae_path} is not there, and cached latents do without it"
            )
        raise patient.vae_or_error
    kind = "KL-16" if patient.vae.is_kl16 else "a VAE that is not KL-16"
    millions = sum(p.numel() for p in patient.vae.parameters()) / 1e6
    text = (
        f"{kind}, {patient.vae.channels} channels, stride {patient.vae.stride}, {millions:.1f} M "
        f"parameters, all tensors match, sha256 {patient.vae_sha256}"
    )
    others = []
    try:
        if patient.manifest is not None:
            others.append(("--cached_path", patient.manifest["vae_sha256"]))
    except Unknown:
        pass  # the cache's own check says why
    try:
        trained = patient.found_checkpoint.saved if patient.found_checkpoint is not None else {}
    except UserError:  # its own check says why
        trained = {}
    if trained.get("vae_sha256"):
        others.append(("--resume", trained["vae_sha256"]))
    problems = [f"{flag} was made with {d[:12]}" for flag, d in others if d != patient.vae_sha256]
    return judged(problems, text, "name the file it was made with by --vae_path", FAILURE)


def photograph(patient: Patient) -> Finding:
    """A natural photograph must come back from the VAE about as well as KL-16's do."""
    photos = _photos(patient.args.photo, patient.args.max_image_pixels)
    tokenizer = Tokenizer(patient.vae, 1.0).to(patient.device)
    values = {}
    for name, image in photos.items():
        pixels = torch.from_numpy(_pixels(image, patient.args.img_size))  # [3, S, S]
        posterior = tokenizer.posterior((pixels / 127.5 - 1)[None].to(patient.device))
        decoded = to_uint8(tokenizer.decode(tokenizer.mode(posterior))).cpu()
        values[name] = psnr(decoded, pixels[None].to(torch.uint8)).item()
    text = ", ".join(f"{name} {value:.1f} dB" for name, value in values.items())
    problems = [] if min(values.values()) >= LEAST_PSNR else [f"below {LEAST_PSNR:g} dB"]
    if patient.vae.is_kl16:
        return judged(problems, text, "this is not kl16.ckpt as published: fetch it", FAILURE)
    remedy = "right only if it was trained for other images than photographs"
    return judged(problems, f"{text} (not KL-16)", remedy)


def _photos(given: str | None, max_pixels: int) -> dict[str, Image.Image]:
    """Pillow images by name."""
    if given is not None:
        return {Path(given).name: read_image(given, max_pixels)}
    try:
        from sklearn.datasets import load_sample_image
    except ImportError:
        raise Unknown("pip install scikit-learn, which has two photographs, or --photo") from None
    names = ("china.jpg", "flower.jpg")
    return {name: Image.fromarray(load_sample_image(name)) for name in names}


def _pixels(image: Image.Image, size: int) -> np.ndarray:
    """float32 [3, S, S] in 0..255."""
    return np.moveaxis(np.asarray(center_crop(image, size), dtype=np.float32), -1, 0).copy()


def latents(patient: Patient) -> Finding:
    """Mean and std of each channel after scaling: about 0 and 1."""
    histogram, source = patient.latents
    middles, counts = _middles(histogram, patient.config.latent_scale), histogram.counts.double()
    share = counts / counts.sum(dim=1, keepdim=True)  # [C, B]
    mean = (share * middles).sum(dim=1)
    std = (share * (middles - mean[:, None]).square()).sum(dim=1).sqrt()
    total = ((share * middles.square()).sum(dim=1).mean() - mean.mean() ** 2).sqrt().item()
    text = (
        f"of {source}, scaled by {patient.config.latent_scale:.4g}: std {total:.3f}, by channel "
        f"{std.min():.2f} to {std.max():.2f}, mean {mean.min():.2f} to {mean.max():.2f}"
    )
    problems = [] if STD_OF_ALL[0] <= total <= STD_OF_ALL[1] else ["std is not near 1"]
    low, high = STD_OF_CHANNEL
    wide = [c for c, s in enumerate(std.tolist()) if not low <= s <= high]
    shifted = [c for c, m in enumerate(mean.tolist()) if abs(m) > MEAN_OF_CHANNEL]
    problems += [f"std of channels {wide} is far from 1"] if wide else []
    problems += [f"mean of channels {shifted} is far from 0"] if shifted else []
    found = judged(
        problems, text, "check --vae_path and --latent_scale; --quantizer calibrated adapts"
    )
    return replace(found, by_channel={"mean": mean.tolist(), "std": std.tolist()})


def _middles(histogram: LatentHistogram, scale: float) -> Tensor:
    """Scaled latents in the middle of each bin, [C, B]."""
    return (torch.arange(BINS) - BINS // 2 + 0.5) * histogram.bin_widths(scale)[:, None]


def quantizer(patient: Patient) -> Finding:
    """Use of the levels by the latents, and how much of them lies beyond the range."""
    histogram, source = patient.latents
    config, channels = patient.config, len(histogram.counts)
    kind, levels = config.quantizer, config.quant_levels
    made = build_quantizer(kind, levels, config.quant_min, config.quant_max, channels)
    if kind == "calibrated":
        made.set_levels(*_calibrated(patient, histogram, levels, channels))
    scalars = _middles(histogram, patient.config.latent_scale).T.float()  # [B, C]
    indices = made.encode(scalars)
    counts = torch.zeros(channels, levels, dtype=torch.int64)
    counts.scatter_add_(1, indices.T, histogram.counts)
    bits, full = entropy(counts), torch.log2(torch.tensor(float(levels))).item()
    outside = (made.outside(scalars).T * histogram.counts).sum(dim=1) / histogram.counts.sum(dim=1)
    text = (
        f"{kind}, entropy {bits.min():.2f} to {bits.max():.2f} of {full:g} bits by channel, "
        f"out of range {outside.min():.2%} to {outside.max():.2%} ({source})"
    )
    poor = [c for c, b in enumerate(bits.tolist()) if b < full - MOST_UNUSED_BITS]
    saturated = [c for c, s in enumerate(outside.tolist()) if s > MOST_SATURATED]
    problems = [f"channels {poor} use less than half of the levels"] if poor else []
    problems += [f"channels {saturated} saturate"] if saturated else []
    remedy = "check --latent_scale, --quant_min and --quant_max, or pass --quantizer calibrated"
    shares = {"entropy_bits": bits.tolist(), "out_of_range_share": outside.tolist()}
    return replace(judged(problems, text, remedy), by_channel=shares)


def _calibrated(patient: Patient, histogram: LatentHistogram, levels: int, channels: int):
    """Boundaries and values: the checkpoint's, else fitted as a training would."""
    checkpoint = patient.found_checkpoint
    if checkpoint is not None:
        weights = checkpoint.weights("model")
        return weights["boundaries"], weights["reconstruction_values"]
    fitted_to = cache_histogram(patient.args.cached_path, channels, patient.vae_sha256)
    return calibrated_levels(fitted_to, levels, patient.config.latent_scale)


# --- data


def data(patient: Patient) -> Finding:
    args = patient.args
    if args.use_cached:
        return Finding(OK, "not read: --use_cached reads the cache")
    if args.evaluate:
        return Finding(OK, "not read: --evaluate needs none")
    images = list_images(args.data_path)
    source = f"--data_path {args.data_path}"
    return _classes(source, images.classes, len(images.samples), patient)


def _classes(source: str, classes: list[str], count: int, patient: Patient) -> Finding:
    """Whether the model has these classes, and what else is to be said of them."""
    try:
        known = patient.config.class_num
    except Unknown:  # its own check says why
        known = patient.args.class_num if "class_num" in patient.args.explicit else len(classes)
    text = f"{source}: {count} images in {len(classes)} classes, the model has {known}"
    remedy = f"pass --class_num {len(classes)} or leave it out; with --resume, name its data"
    if len(classes) > known:
        return Finding(FAILURE, f"{text}: more classes than the model has", remedy)
    problems = ["the others are never trained"] if len(classes) < known else []
    print_class_notes(classes)
    return judged(problems, text, remedy)


def cache(patient: Patient) -> Finding:
    args = patient.args
    if not args.cached_path:
        if args.use_cached:
            raise UserError("--use_cached needs --cached_path, the folder that main_cache.py wrote")
        return Finding(OK, "none: images are encoded on the way")
    found = open_cache(args.cached_path, args.img_size, patient.vae_sha256)
    if tuple(found.latent_shape) != patient.config.latent_shape:
        raise UserError(
            f"--cached_path {args.cached_path} holds latents {tuple(found.latent_shape)}, not the "
            f"model's {patient.config.latent_shape}; see --img_size, --vae_stride, --vae_embed_dim"
        )
    source = f"--cached_path {args.cached_path}"
    finding = _classes(source, found.classes, len(found), patient)
    if found.manifest is None and finding.state == OK:
        text = f"{finding.text}: of the published form, which does not say by which VAE"
        return Finding(WARNING, text, "make sure that it was this one")
    return finding


# --- model and evaluation


def model(patient: Patient) -> Finding:
    """Flags, checkpoint, cache and VAE agree on the model's settings."""
    config = patient.config_or_error
    if isinstance(config, UserError):
        raise config
    if not isinstance(patient.vae_or_error, UserError):
        check_vae(patient.vae, config, patient.args.vae_path)
    millions = sum(p.numel() for p in patient.model.parameters()) / 1e6
    return Finding(
        OK,
        f"{millions:.1f} M parameters, {config.seq_len} positions of {config.token_dim} scalars, "
        f"{config.quant_levels} levels ({config.quantizer}), {config.class_num} classes",
    )


def checkpoint(patient: Patient) -> Finding:
    found = patient.found_checkpoint
    if found is None:
        if patient.args.evaluate:
            raise UserError("--evaluate needs --resume, the folder of the checkpoint to evaluate")
        return Finding(OK, "none yet: training starts from scratch")
    said: list[str] = []
    if found.begins:
        found, said = found.fitted(patient.config, patient.classes, patient.args.seed)
    elif patient.classes and not patient.args.evaluate:
        check_same_classes(found, patient.classes, "the data")
    expected = {name: tuple(p.shape) for name, p in patient.model.published_parameters()}
    state = found.weights("model")
    wrong = [n for n, shape in expected.items() if n not in state or state[n].shape != shape]
    text = "; ".join([f"{found.path}, checksums agree, {len(expected)} tensors", *said])
    return judged(
        [f"{len(wrong)} are missing or of another shape, as {wrong[0]}"] if wrong else [],
        text,
        "it is of another model: see --model and --patch_size",
        FAILURE,
    )


def fid_statistics(patient: Patient) -> Finding:
    args, given = patient.args, patient.args.fid_stats
    if args.no_metrics:
        return Finding(OK, "not wanted: --no_metrics")
    name = registered_name(args.feature_extractor)
    inception = name == INCEPTION
    path = given or (str(ADM_STATISTICS) if inception and ADM_STATISTICS.is_file() else None)
    if path is None:
        if args.fid_reference:
            return Finding(OK, f"taken from --fid_reference {args.fid_reference}")
        remedy = "put ADM's adm_in256_stats.npz into fid_stats/, or name a file with --fid_stats"
        return Finding(WARNING, "no statistics, so FID cannot be computed", remedy)
    try:
        extractor = patient.extractor
    except UserError:
        raise Unknown("it needs the extractor") from None
    if extractor is None and not inception:
        raise Unknown(f"it needs a file of {name}'s weights, --inception_weights")
    identity, features = {"extractor": name}, INCEPTION_FEATURES
    if extractor is not None:
        features = extractor.width("fid", args.img_size)
        identity = extractor.identity() | {"layer": extractor.layers["fid"]}
    load_fid_statistics(path, features)
    record, doubts = check_statistics(path, identity, patient.config.img_size, features)
    text = f"{path}, {features} features, sha256 {record['fid_stats_sha256']}"
    return judged(doubts, text, "python -m util.fid_stats makes statistics of your own images")


def feature_weights(patient: Patient) -> Finding:
    args = patient.args
    if args.no_metrics:
        return Finding(OK, "not wanted: --no_metrics")
    found = patient.extractor
    if found is None and registered_name(args.feature_extractor) != INCEPTION:
        return Finding(OK, f"{args.feature_extractor} finds its own weights")
    path = args.inception_weights or published_weights()
    if found is None:
        remedy = f"put torch-fidelity's file at {path}, or name it with --inception_weights"
        return Finding(WARNING, "no Inception weights here; they would be downloaded", remedy)
    widths = {metric: found.width(metric, args.img_size) for metric in found.layers}
    return Finding(OK, f"{path}, features {widths}, sha256 {found.weights_sha256}")


def disk_space(patient: Patient) -> Finding:
    """fp32 weights, their average and AdamW's two moments, for every file that is kept."""
    args = patient.args
    if args.evaluate:
        return Finding(OK, "not needed: an evaluation saves no checkpoint")
    size = 4 * 4 * sum(p.numel() for p in patient.model.parameters())
    milestones = args.epochs // args.save_every if args.save_every else 0
    files = args.keep_checkpoints + milestones + 1  # the one being written
    folder = Path(args.output_dir).absolute()
    place = next(path for path in (folder, *folder.parents) if path.exists())
    free, needed = shutil.disk_usage(place).free, size * files
    text = (
        f"{free / 2**30:.1f} GiB free in {place}, {files} checkpoints of {size / 2**30:.2f} GiB "
        f"take {needed / 2**30:.1f}"
    )
    remedy = "free some, name another --output_dir, or keep fewer (--keep_checkpoints)"
    if free < needed:
        return Finding(FAILURE, f"{text}: too little", remedy)
    return judged(
        ["little is left for images and logs"] if free < ROOM * needed else [], text, remedy
    )
