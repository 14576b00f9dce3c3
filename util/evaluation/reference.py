"""What generated images are compared with: a file of statistics, or real images themselves.

Statistics are mu [D] and sigma [D, D] of the features of real images, all that FID needs, and
mu_s and sigma_s of sFID's: an npz file as ADM's, one of `python -m util.fid_stats`, or a .pt file
from torch-fidelity's cache, which has no sFID. KID, precision, recall, density and coverage need
the features themselves, so images: a folder, or ADM's npz of them.
Letters: N images, D features, S side in pixels.
"""

import argparse
import hashlib
import json
import math
import zipfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from util import dist, stop
from util.data.images import ImageDataset, center_crop, collate_skipping, reading_flags
from util.data.listing import list_files
from util.errors import UserError, as_user_error
from util.evaluation.extractor import INCEPTION, SPATIAL_WIDTH, load_extractor
from util.evaluation.folder import FeatureFiles, batch_ranges, check_shared, share
from util.evaluation.metrics import RECORDED, Accumulator, Measure, Statistics, few_for_covariance
from util.files import listed, load_tensors, sha256, what_else

ADM_STATISTICS = Path("fid_stats/adm_in256_stats.npz")
ADM_SIZE = 256
BATCH = 64
MOMENTS, SPATIAL_MOMENTS = {"mu", "sigma"}, {"mu_s", "sigma_s"}


def prepare_measure(
    args: argparse.Namespace, size: int, device: torch.device, reference_cache: Path | None = None
) -> Measure | None:
    """What the flags ask to measure of images of that size; all processes take part.

    What cannot be measured is said in one line, with the remedy. Files are checked before the
    first image is made. reference_cache: for the features of --fid_reference, where that is a flag.
    """
    if reference_cache is not None:
        check_shared(reference_cache.parent)
    if args.no_metrics:
        return None
    folder = args.fid_reference if reference_cache is not None else None
    inception, path = args.feature_extractor == INCEPTION, args.fid_stats
    if path is None and inception and folder is None and ADM_STATISTICS.is_file():
        path = str(ADM_STATISTICS)
    if path is not None and inception:  # before the weights, which may be a download
        load_fid_statistics(path)
    extractor = load_extractor(args.feature_extractor, args.inception_weights, device)
    if extractor is None:
        return None
    measure = Measure(extractor)
    if path is not None:
        measure = compare_with_statistics(measure, path, size)
    if folder is not None:
        how = {"num_workers": args.num_workers} | reading_flags(args)
        measure = compare_with_images(measure, folder, size, reference_cache, **how)
    elif path is None:
        dist.print_main(
            "FID is not computed: no statistics; put ADM's adm_in256_stats.npz into fid_stats/ "
            "or name an npz file with mu and sigma with --fid_stats"
        )
    if "sfid" in extractor.layers and "mu_s" not in (measure.stats or SPATIAL_MOMENTS):
        lacks = "mu_s and sigma_s, as ADM's files and those of python -m util.fid_stats have"
        dist.print_main(f"sFID is not computed: the reference has no {lacks}")
    return measure


# --- files of statistics


def compare_with_statistics(measure: Measure, path: str, size: int) -> Measure:
    """The same measure with a file of statistics as its reference. size: of the images."""
    extractor = measure.extractor
    if "fid" not in extractor.layers:
        problem = f"{extractor.name} declares no layer for a Frechet distance; leave it out"
        raise UserError(f"--fid_stats {path}: --feature_extractor {problem}")
    stats = load_fid_statistics(path, extractor.width("fid", size))
    identity = extractor.identity() | {"layer": extractor.layers["fid"]}
    return replace(measure, stats=stats, record=check_statistics(path, stats, identity, size))


def load_fid_statistics(path: str | Path, features: int = 2048) -> Statistics:
    """mu [D] and sigma [D, D], float64, of D features, sFID's, and what the file says of itself.

    An npz file, or torch-fidelity's .pt. Raises UserError on a damaged file, on other shapes and
    on a sigma that is no covariance.
    """
    if not Path(path).is_file():
        raise UserError(f"--fid_stats {path}: no such file")
    saved = load_tensors(path, "--fid_stats") if Path(path).suffix in (".pt", ".pth") else None
    # A damaged file can make its reader fail in any way.
    with as_user_error(f"--fid_stats {path}: not an npz file with mu and sigma", (Exception,)):
        if not saved:
            check_npz(path)
            with np.load(path, allow_pickle=False) as file:  # ADM's files hold 10,000 images, too
                known = {*MOMENTS, *SPATIAL_MOMENTS, *RECORDED}
                saved = {name: file[name] for name in known.intersection(file)}
        stats = {name: np.asarray(array) for name, array in saved.items()}
        for name in stats.keys() & (MOMENTS | SPATIAL_MOMENTS):
            stats[name] = stats[name].astype(np.float64, casting="same_kind")
    if not stats.keys() >= MOMENTS:
        remedy = "of a file of images, util.fid_stats --image_dir makes them, or --fid_reference"
        raise UserError(f"--fid_stats {path}: no mu and sigma in it; {remedy} compares with it")
    for mu, sigma, width in (("mu", "sigma", features), ("mu_s", "sigma_s", SPATIAL_WIDTH)):
        shapes = {name: stats[name].shape for name in (mu, sigma) if name in stats}
        if not shapes:
            continue  # without sFID
        if shapes != {mu: (width,), sigma: (width, width)}:
            differ = f"shapes {shapes} are not those of the extractor's {width} features"
            raise UserError(f"--fid_stats {path}: {differ}; take statistics that were made with it")
        if problem := _defect(stats[mu], stats[sigma]):
            raise UserError(f"--fid_stats {path}: {problem}; the file is damaged or no statistics")
    return stats


def _defect(mu: np.ndarray, sigma: np.ndarray) -> str | None:
    """Why these are not a mean and a covariance, or None."""
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        return "mu or sigma holds numbers that are not finite"
    if np.abs(sigma - sigma.T).max() > 1e-4 * np.abs(sigma).max():
        return "sigma is not symmetric"
    try:  # positive semidefinite but for rounding: features may be dependent, or saved in float32
        np.linalg.cholesky((sigma + sigma.T) / 2 + 1e-5 * np.trace(sigma) * np.eye(len(sigma)))
    except np.linalg.LinAlgError:
        return "sigma has negative eigenvalues"
    return None


def check_statistics(
    path: str | Path, stats: Statistics, identity: dict[str, str], size: int | None
) -> dict:
    """What a file of statistics says of itself, for metrics.json; warnings are printed.

    identity: the extractor's, and the layer of FID. size: of the images in pixels, if known.
    Raises UserError if a distance to these statistics would mean nothing.
    """
    features = len(stats["mu"])
    with as_user_error(f"--fid_stats {path}: what it says of itself is no single value"):
        record = {name: stats[name].item() for name in RECORDED if name in stats}
    for name, own in identity.items():
        if record.get(name, own) != own:
            raise UserError(
                f"--fid_stats {path} was made with {name} {record[name]!s:.20}, this run has "
                f"{own:.20}: a distance between features of two networks means nothing"
            )
    if size is not None and record.get("img_size", size) != size:
        raise UserError(
            f"--fid_stats {path} is of images of {record['img_size']} px, these are of {size} px: "
            f"make statistics with python -m util.fid_stats --img_size {size}"
        )
    if Path(path).name == ADM_STATISTICS.name and size not in (None, ADM_SIZE):
        sizes = f"of {ADM_SIZE} px images and these are of {size} px"
        note = f"--fid_stats {path} is {sizes}: FID measures the difference in size too"
        dist.print_main(f"warning: {note}")
    if "count" in record and (few := few_for_covariance(record["count"], features)):
        dist.print_main(f"warning: --fid_stats {path}: {few}")
    return {"fid_stats": str(path), "fid_stats_sha256": sha256(path)} | record


# --- npz files of others: what is wrong with one is told by an exception of any kind, and callers
# catch all and name the file; nothing in them is unpickled


def check_npz(path: str | Path) -> None:
    if not zipfile.is_zipfile(path):
        raise ValueError(f"this is {what_else(Path(path)) or 'damaged'}")


@dataclass(frozen=True)
class ImageArray:
    """The images of an npz file as ADM's evaluator takes them: arr_0, uint8 [N, H, W, 3].

    size: S. Such files may be larger than memory, so a batch is read at a time.
    """

    path: Path
    shape: tuple[int, ...]
    size: int

    def __len__(self) -> int:
        return self.shape[0]

    def crops(self, batches: list[range], mine: list[int]) -> Iterator[tuple[list[int], Tensor]]:
        """(ids, images uint8 [n, 3, S, S]) of those numbers of batches, which cover the array."""
        damaged = as_user_error(f"{self.path} is damaged", (Exception,))
        with damaged, _opened_images(self.path) as (file, (_, *shape)):
            for number, ids in enumerate(batches):
                content = file.read(len(ids) * math.prod(shape))  # at its end, its checksum
                if number in mine:
                    images = np.frombuffer(content, np.uint8).reshape(len(ids), *shape)
                    crops = [np.array(center_crop(Image.fromarray(i), self.size)) for i in images]
                    yield list(ids), torch.from_numpy(np.stack(crops)).movedim(3, 1)


@contextmanager
def _opened_images(path: str | Path) -> Iterator[tuple[BinaryIO, tuple[int, ...]]]:
    """The file at the first pixel of arr_0, and the array's shape."""
    check_npz(path)
    with zipfile.ZipFile(path) as archive:
        if "arr_0.npy" not in archive.namelist():
            raise ValueError(f"it has no arr_0, but {listed(archive.namelist())}")
        with archive.open("arr_0.npy") as file:
            version = np.lib.format.read_magic(file)
            read_header = getattr(np.lib.format, "read_array_header_{}_{}".format(*version))
            shape, is_fortran, dtype = read_header(file)
            if len(shape) != 4 or dtype != np.uint8 or is_fortran or shape[3] != 3:
                raise ValueError(f"arr_0 is {dtype} {shape}, not uint8 [N, H, W, 3]")
            yield file, shape


# --- real images


ImageSource = ImageDataset | ImageArray


def compare_with_images(
    measure: Measure, source: str | Path, size: int, cache: Path, num_workers: int = 0, **reading
) -> Measure:
    """The same measure with real images, a folder or an npz file, as its reference.

    All processes take part. FID stays the distance to the file of statistics if there is one.
    cache: a folder for the features, which a restart reads again. reading: of `reading_flags`.
    """
    images, extractor = open_images(source, size, **reading), measure.extractor
    key = listing_digest(Path(source), images)
    place = cache / f"{extractor.label}-{size}px-{key[:12]}"
    files = FeatureFiles(place, batch_ranges(len(images), BATCH))
    layers = {metric: layer for metric, layer in extractor.layers.items() if metric != "isc"}
    missing = dist.gather_objects(files.missing())[0]  # as the main process finds it
    for number, ids, pixels in image_batches(images, files.batches, missing, num_workers):
        files.write(number, ids, extractor(pixels))
    dist.barrier()
    record = measure.record | {"fid_reference": str(source), "listing_sha256": key}
    if not dist.is_main():
        return replace(measure, record=record)
    stats = measure.stats
    sums = Accumulator(layers, len(images), keep=True, groups=1).add(files)
    if sums.count < 2:
        raise UserError(f"--fid_reference {source}: {sums.count} readable images, two are needed")
    record["images"] = sums.count
    if stats is None and "fid" in layers:
        stats = sums.statistics()
        if few := few_for_covariance(sums.count, len(stats["mu"])):
            print(f"warning: --fid_reference {source}: {few}", flush=True)
    return Measure(extractor, stats, record, sums.features)


def open_images(
    source: str | Path, size: int | None, flag: str = "--fid_reference", **reading
) -> ImageSource:
    """The files of a folder and the folders in it, in order, or the images of an npz file.

    size: in pixels; None is that of the images in an npz file, of others 256. reading: of
    `reading_flags`.
    """
    if Path(source).suffix != ".npz" or not Path(source).is_file():
        samples = [(path, 0) for path in list_files(source, flag)]
        return ImageDataset(samples, size or 256, **reading)
    damaged = as_user_error(f"{flag} {source}: not an npz file of images", (Exception,))
    with damaged, _opened_images(source) as (_, shape):
        return ImageArray(Path(source), shape, size or min(shape[1:3]))


def listing_digest(root: Path, images: ImageSource) -> str:
    """SHA-256 of the names, sizes and times of change of files: enough to notice another folder."""
    is_array = isinstance(images, ImageArray)
    paths = [images.path] if is_array else [Path(path) for path, _ in images.samples]
    stats = ((path.relative_to(root), path.stat()) for path in paths)
    facts = [(str(name), stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def image_batches(
    images: ImageSource,
    batches: list[range],
    todo: Collection[int],
    num_workers: int,
    what: str = "real images",
) -> Iterator[tuple[int, list[int], Tensor]]:
    """(number, ids, images uint8 [n, 3, S, S]) of this process's share of the batches to do.

    Images are cropped as the training's are; ids are those that could be read.
    """
    mine = share(todo, len(batches), what)
    if isinstance(images, ImageArray):
        parts = images.crops(batches, mine)
    else:
        parts = read_batches(images, [batches[k] for k in mine], num_workers)
    progress = tqdm(parts, desc=what, total=len(mine), disable=not (mine and dist.is_main()))
    for number, (ids, pixels) in zip(mine, progress, strict=True):
        dist.beat(f"{what}, batch {number + 1} of {len(batches)}")
        yield number, ids, pixels


def read_batches(
    dataset: ImageDataset, batches: Sequence[Sequence[int]], num_workers: int, pin: bool = False
) -> Iterator[tuple[list[int], Tensor]]:
    """(ids, images uint8 [n, 3, S, S]) of each batch: those that could be read."""
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=collate_skipping,
        pin_memory=pin,
        generator=torch.Generator(),  # else it would draw from the global one, which is training's
        worker_init_fn=stop.ignore_in_worker,
    )
    nothing = torch.empty(0, 3, dataset.size, dataset.size, dtype=torch.uint8)
    for ids, batch in zip(batches, loader, strict=True):
        yield [i for i in ids if not dataset.bad[i]], batch[0] if batch else nothing
