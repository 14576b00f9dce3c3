"""What generated images are compared with: a file of statistics, or real images themselves.

Statistics are mu [D] and sigma [D, D] of the features of real images, all that FID needs: an npz
file as ADM's, one of `python -m util.fid_stats`, or a .pt file from torch-fidelity's cache. KID,
precision and recall need the features themselves, so images: a folder, or ADM's npz of them.
Letters: N images, D features.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from util.data.arrays import ImageArray, read_npz
from util.data.listing import list_files
from util.errors import UserError, as_user_error
from util.files import atomic_write, load_tensors, sha256
from util.stop import Stopped

ADM_STATISTICS = Path("fid_stats/adm_in256_stats.npz")
ADM_SIZE = 256
# Written by `util.fid_stats` beside mu and sigma; files of others have none of them.
RECORDED = ("count", "img_size", "extractor", "layer", "weights_sha256")


@dataclass(frozen=True)
class Reference:
    """stats: mu and sigma, float64. record: for metrics.json: where they come from.

    features: {layer: [N, D]} of a reference folder, on the main process; else None.
    """

    stats: dict[str, np.ndarray] | None
    record: dict
    features: dict[str, Tensor] | None = None


def load_fid_statistics(path: str | Path, features: int = 2048) -> dict[str, np.ndarray]:
    """mu [D] and sigma [D, D], float64.

    features: D. Raises UserError, naming --fid_stats, on a damaged file, on another number of
    features and on a sigma that is no covariance.
    """
    stats = {k: v for k, v in _read(path).items() if k in ("mu", "sigma")}
    if set(stats) != {"mu", "sigma"}:
        raise UserError(f"--fid_stats {path}: not an npz file with mu and sigma{_images_in(path)}")
    shapes = {key: value.shape for key, value in stats.items()}
    if shapes != {"mu": (features,), "sigma": (features, features)}:
        raise UserError(
            f"--fid_stats {path}: shapes {shapes} are not those of {features} features, which the "
            "extractor makes; take statistics that were made with it"
        )
    problem = _defect(stats["mu"], stats["sigma"])
    if problem:
        raise UserError(f"--fid_stats {path}: {problem}; the file is damaged or no statistics")
    return stats


def _images_in(path: str | Path) -> str:
    """What to do with a file that holds images in the place of statistics; or nothing."""
    try:
        count = len(ImageArray.of(path))
    except Stopped:
        raise
    except Exception:  # a damaged file can make its reader fail in any way
        return ""
    made = Path(path).with_name(f"{Path(path).stem}_stats.npz")
    return (
        f", but of {count} images; compare with them by --fid_reference {path}, or make statistics "
        f"with python -m util.fid_stats --image_dir {path} --output {made}"
    )


def _read(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of an npz file or of torch-fidelity's .pt; mu and sigma in float64."""
    if not Path(path).is_file():
        raise UserError(f"--fid_stats {path}: no such file")
    saved = load_tensors(path, "--fid_stats") if Path(path).suffix in (".pt", ".pth") else None
    # A damaged file can make its reader fail in any way.
    with as_user_error(f"--fid_stats {path}: not an npz file with mu and sigma", (Exception,)):
        if saved is not None:
            found = {key: np.asarray(value) for key, value in saved.items()}
        else:  # ADM's files hold 10,000 images besides
            found = read_npz(path, ("mu", "sigma", *RECORDED))
        wide = {k: _wide(found[k]) for k in ("mu", "sigma") if k in found}
        return found | wide


def _wide(array: np.ndarray) -> np.ndarray:
    if array.dtype.kind not in "fiu":
        raise ValueError(f"numbers of type {array.dtype}")
    return array.astype(np.float64)


def _defect(mu: np.ndarray, sigma: np.ndarray) -> str | None:
    """Why these are not a mean and a covariance, or None."""
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        return "mu or sigma holds numbers that are not finite"
    size = max(float(np.abs(sigma).max()), 1e-300)
    if np.abs(sigma - sigma.T).max() > 1e-4 * size:
        return "sigma is not symmetric"
    try:  # positive semidefinite but for rounding: features may be dependent, or saved in float32
        np.linalg.cholesky((sigma + sigma.T) / 2 + 1e-5 * np.trace(sigma) * np.eye(len(sigma)))
    except np.linalg.LinAlgError:
        return "sigma has negative eigenvalues"
    return None


def statistics_record(path: str | Path) -> dict:
    """What a file says of itself, as plain values: the names in RECORDED that it has."""
    found = _read(path)
    with as_user_error(f"--fid_stats {path}: what it says of itself is no single value"):
        return {name: found[name].item() for name in RECORDED if name in found}


def check_statistics(
    path: str | Path, identity: dict[str, str], size: int | None, features: int
) -> tuple[dict, list[str]]:
    """What is known of a file of statistics, for metrics.json; and warnings.

    identity: the extractor's, and the layer of FID. size: of the images in pixels, if known.
    features: of that layer.
    Raises UserError if a distance to these statistics would mean nothing.
    """
    told = statistics_record(path)
    for name, own in identity.items():
        if told.get(name, own) != own:
            raise UserError(
                f"--fid_stats {path} was made with {name} {str(told[name])[:20]}, this run has "
                f"{own[:20]}: a distance between features of two networks means nothing"
            )
    if size is not None and told.get("img_size", size) != size:
        raise UserError(
            f"--fid_stats {path} is of images of {told['img_size']} px, these are of {size} px: "
            "the distance would measure the size; make statistics with "
            f"python -m util.fid_stats --img_size {size}"
        )
    warnings = []
    if Path(path).name == ADM_STATISTICS.name and size not in (None, ADM_SIZE):
        warnings.append(
            f"--fid_stats {path} is of {ADM_SIZE} px images and these are of {size} px: "
            "FID measures the difference in size too, and is comparable with nothing"
        )
    if told.get("count", features + 1) <= features:
        warnings.append(
            f"--fid_stats {path} is of {told['count']} images, not more than the {features} "
            "features: their covariance is singular and FID to them far too large"
        )
    return {"fid_stats": str(path), "fid_stats_sha256": sha256(path)} | told, warnings


def list_folder(folder: str | Path, flag: str = "--fid_reference") -> list[Path]:
    """All images in a folder and the folders in it, in the order torch-fidelity takes them in."""
    return [Path(name) for name in list_files(folder, flag)]


def open_images(source: str | Path, flag: str = "--fid_reference") -> list[Path] | ImageArray:
    """The files of a folder, or the images of an npz file."""
    if Path(source).suffix != ".npz" or not Path(source).is_file():
        return list_folder(source, flag)
    with as_user_error(f"{flag} {source}: not an npz file of images", (Exception,)):
        return ImageArray.of(source)


def listing_digest(root: Path, files: list[Path] | ImageArray) -> str:
    """SHA-256 of the names, sizes and times of change of files: enough to notice another folder."""
    files = [files.path] if isinstance(files, ImageArray) else files
    facts = [(str(path.relative_to(root)), *_facts(path)) for path in files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _facts(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def write_statistics(path: str | Path, stats: dict[str, np.ndarray], facts: dict) -> None:
    """mu and sigma as --fid_stats reads them. facts: the values of RECORDED."""
    with atomic_write(path) as file:
        np.savez(file, **stats, **{name: np.array(facts[name]) for name in RECORDED})
