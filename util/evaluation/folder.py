"""The folder of one evaluation: what is in it, whose it is, and what is still to do.

    settings.json              what decides the images, written first; another run's is refused
    images/00000_bee.png ...   image i and its class; removed unless they were asked for
    features/EXTRACTOR/        the features of every batch, util/evaluation/features.py
    statistics.npz             mu and sigma of the images' features, as --fid_stats reads them
    samples.npz                --save_npz: all images in one array, for ADM's evaluator
    grid.png, metrics.json     a first look; the figures, written when all is done

All files are whole or absent, so whatever is there counts.
"""

import json
import re
import socket
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from util import dist
from util.data.images import save_png
from util.errors import UserError
from util.evaluation.extractor import Extractor
from util.evaluation.features import FeatureStore, batch_ranges, wait_for
from util.files import atomic_write

THREADS = 8  # that read and write PNG files; a GPU draws faster than one of them packs


@dataclass(frozen=True)
class EvaluationFolder:
    """count: images in all, numbered from 0. batch_size: images of one batch.

    labelled: for file names, of every image a word for its class, or "".
    """

    path: Path
    count: int
    batch_size: int
    labelled: Sequence[str] = ()
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(THREADS))

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.json"

    @property
    def grid(self) -> Path:
        return self.path / "grid.png"

    @property
    def samples(self) -> Path:
        return self.path / "samples.npz"

    @cached_property
    def batches(self) -> list[range]:
        return batch_ranges(self.count, self.batch_size)

    def image(self, number: int) -> Path:
        """Its file. One without a class in its name, as earlier versions wrote, stays as it is."""
        unnamed = self.path / "images" / image_name(number, self.count)
        label = self.labelled[number] if self.labelled else ""
        if not label or unnamed.exists():
            return unnamed
        return unnamed.with_name(f"{unnamed.stem}_{label}.png")

    def features(self, extractor: Extractor) -> FeatureStore:
        return FeatureStore(self.path / "features" / extractor.label)

    # --- whose it is

    def claim(self, identity: dict) -> None:
        """Make the folder this evaluation's, or find that it is.

        identity: plain values that decide the images. Raises UserError, on all processes, if the
        folder was begun with others.
        """
        self.refuse_other(identity)
        if dist.is_main():
            (self.path / "images").mkdir(parents=True, exist_ok=True)
            for unfinished in self.path.rglob(".*.tmp"):  # of a process that was killed
                unfinished.unlink()
            write_json(self.path / "settings.json", identity)
        dist.barrier()
        wait_for([self.path / "settings.json"])  # or the processes do not share the folder

    def refuse_other(self, identity: dict) -> None:
        """Raise UserError, on all processes, if the folder was begun with another identity."""
        problem = self.conflict(identity) if dist.is_main() else None
        problem = dist.gather_objects(problem)[0]
        if problem:
            raise UserError(f"{self.path} {problem}; name another --output_dir, or remove it")

    def free_beside(self, identity: dict) -> "EvaluationFolder":
        """This folder, or the first of NAME-2, NAME-3, ... that is not another evaluation's."""
        names = [self.path.name, *(f"{self.path.name}-{k}" for k in range(2, 1000))]
        places = (replace(self, path=self.path.with_name(name)) for name in names)
        chosen = None
        if dist.is_main():
            chosen = next(place.path for place in places if not place.conflict(identity))
        return replace(self, path=dist.gather_objects(chosen)[0])

    def conflict(self, identity: dict) -> str | None:
        """Why these images cannot be put into the folder, or None."""
        return conflict(self.path, identity, "images/*.png")

    # --- what is in it

    def without_images(self) -> set[int]:
        """Numbers of the batches of which a PNG is missing."""
        sizes = {path.name: path.stat().st_size for path in (self.path / "images").glob("*.png")}
        # A power cut may leave empty files. The class in a name tells nothing new.
        here = {name.removesuffix(".png").split("_")[0] for name, size in sizes.items() if size}
        stems = [Path(image_name(i, self.count)).stem for i in range(self.count)]
        return {k for k, ids in enumerate(self.batches) if any(stems[i] not in here for i in ids)}

    def write_images(self, ids: Sequence[int], images: Tensor) -> None:
        """images: uint8 [N, 3, H, W], numbered by ids."""
        list(self.pool.map(save_png, images, map(self.image, ids)))

    def read_images(self, ids: Sequence[int]) -> Tensor:
        """uint8 [N, 3, H, W], the very values that were written."""
        return torch.stack(list(self.pool.map(read_png, map(self.image, ids))))

    def record(self) -> dict | None:
        """What metrics.json says, if this evaluation was finished before."""
        return read_json(self.metrics) if self.metrics.is_file() else None

    def images_were_removed(self) -> bool:
        """Whether an earlier run finished and removed them."""
        before = self.record()
        return before is not None and before["images"] == "removed"

    def remove_images(self) -> None:
        for path in (self.path / "images").glob("*.png"):
            path.unlink()
        (self.path / "images").rmdir()


def conflict(folder: Path, settings: dict, images: str) -> str | None:
    """Why images of these settings cannot be put into a folder, or None; what differs is named.

    settings: plain values. images: the pattern of the files that its settings.json must explain.
    """
    if not (folder / "settings.json").is_file():
        return "holds images of unknown settings" if any(folder.glob(images)) else None
    before, now = flat(read_json(folder / "settings.json")), flat(plain(settings))
    differing = [key for key in before | now if before.get(key) != now.get(key)]
    if not differing:
        return None
    told = (f"{key} {brief(before.get(key))} (now {brief(now.get(key))})" for key in differing)
    return f"was begun with {', '.join(told)}"


def image_name(number: int, count: int) -> str:
    """00000.png: names of that many images sort as their numbers do."""
    return f"{number:0{max(5, len(str(count - 1)))}d}.png"


def file_label(name: str) -> str:
    """A class's name as a part of a file's: letters, digits and - _ . alone, not many."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-_.")[:40]


def check_shared(folder: Path) -> None:
    """Raise UserError unless all nodes see one folder: now, and not at the first evaluation."""
    if len(set(dist.gather_objects(socket.gethostname()))) == 1:
        return
    seen = folder / ".seen-by-all-nodes"
    if dist.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        seen.touch()
    dist.barrier()
    wait_for([seen])
    dist.barrier()
    if dist.is_main():
        seen.unlink()


def write_samples(
    folder: EvaluationFolder, labels: np.ndarray, side: int, beat: Callable[[str], None]
) -> None:
    """samples.npz: arr_0 uint8 [N, H, W, 3] in image order, arr_1 the labels int64 [N].

    As ADM's image_sample.py writes and its evaluator reads; never in memory as a whole.
    """
    shape = (folder.count, side, side, 3)
    with atomic_write(folder.samples) as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(member, header)
            for ids in folder.batches:
                beat("writing samples.npz")
                images = folder.read_images(ids)
                member.write(images.permute(0, 2, 3, 1).contiguous().numpy().tobytes())
        with archive.open("arr_1.npy", "w") as member:
            np.lib.format.write_array(member, labels.astype(np.int64), allow_pickle=False)


def read_png(path: Path) -> Tensor:
    """uint8 [3, H, W]."""
    with Image.open(path, formats=("PNG",)) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def write_json(path: Path, value: dict) -> None:
    with atomic_write(path) as file:
        file.write((json.dumps(value, indent=1) + "\n").encode())


def read_json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove it") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is not of an evaluation; remove it")
    return found


def plain(value: dict) -> dict:
    """As it comes back from a JSON file: tuples are lists."""
    return json.loads(json.dumps(value))


def flat(value: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    found = {}
    for key, inner in value.items():
        name = f"{prefix}{key}"
        found |= flat(inner, f"{name}.") if isinstance(inner, dict) else {name: inner}
    return found


def brief(value) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:12]}..."
