"""The folder of images that are made in batches: whose it is, what is in it, what is still to do.

    settings.json              what decides the images, written first; another run's is refused
    images/00000_bee.png ...   image i and its class; removed unless they were asked for
    features/EXTRACTOR/batch-000000.npz ...     ids [n] and features of each layer [n, D]

A batch is a fixed range of image numbers, whichever process works on it, and all files are whole
or absent, so what is there is not done again.
"""

import codecs
import csv
import json
import math
import re
import socket
import time
import zipfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from util import dist
from util.data.images import save_png
from util.errors import UserError, as_user_error
from util.evaluation.settings import EvalSettings
from util.files import atomic_write

THREADS = 8  # that read and write PNG files; a GPU draws faster than one of them packs
SHARED_WAIT = 60.0  # seconds until a file of another node is there on a network file system
METRICS, GRID, SAMPLES = "metrics.json", "grid.png", "samples.npz"  # of an evaluation
CHUNK = 4096  # rows of features that are added up at once


def batch_ranges(count: int, batch_size: int) -> list[range]:
    """Image numbers 0..count-1 in batches of fixed composition."""
    return [range(i, min(i + batch_size, count)) for i in range(0, count, batch_size)]


def share(todo: Collection[int], count: int, where: str | Path) -> list[int]:
    """This process's of the batches that are to be done, of so many."""
    if done := count - len(todo):
        dist.print_main(f"{where}: {done} of {count} batches are there already")
    return sorted(todo)[dist.rank() :: dist.world_size()]


@dataclass(frozen=True)
class FeatureFiles:
    """One npz file a batch: ids [n], of the images that could be read, and arrays by name."""

    folder: Path
    batches: list[range]

    def path(self, number: int) -> Path:
        return self.folder / f"batch-{number:06d}.npz"

    def missing(self) -> set[int]:
        """Numbers of the batches that have no file."""
        present = set(self.folder.glob("batch-*.npz"))
        return {k for k in range(len(self.batches)) if self.path(k) not in present}

    def write(self, number: int, ids: Sequence[int], arrays: dict[str, Tensor]) -> None:
        """arrays: {layer: [n, D]}; of no images, none."""
        self.folder.mkdir(parents=True, exist_ok=True)
        own = {name: tensor.numpy() for name, tensor in arrays.items()}
        with atomic_write(self.path(number)) as file:
            np.savez(file, ids=np.array(ids, dtype=np.int64), **own)

    def read(self, number: int) -> tuple[list[int], dict[str, Tensor]]:
        """Raises UserError if the file is damaged."""
        with as_user_error(f"{self.path(number)} is damaged, remove it", (Exception,)):
            with np.load(self.path(number), allow_pickle=False) as file:
                arrays = {name: torch.from_numpy(file[name]) for name in file.files}
            return arrays.pop("ids").tolist(), arrays

    def chunks(self) -> Iterator[dict[str, Tensor]]:
        """{name: [n, D]} of all images in order, some thousand at once."""
        count = len(self.batches)
        wait_for([self.path(number) for number in range(count)])
        for some in batch_ranges(count, max(1, CHUNK // len(self.batches[0]))):
            if parts := [arrays for _, arrays in map(self.read, some) if arrays]:
                yield {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def wait_for(paths: list[Path], seconds: float = SHARED_WAIT) -> None:
    """For files of other processes. Raises UserError if these do not share the folder."""
    deadline = time.monotonic() + seconds
    while missing := [path for path in paths if not path.exists()]:
        if time.monotonic() > deadline:
            raise UserError(
                f"{missing[0]}, which another process wrote, is not here; --output_dir must be "
                "one folder that all nodes share"
            )
        time.sleep(0.5)


def check_shared(folder: Path) -> None:
    """Raise UserError unless all nodes have one folder: now, and not at the first evaluation."""
    if len(set(dist.gather_objects(socket.gethostname()))) == 1:
        return
    mark = folder / ".shared-by-all-nodes"
    if dist.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        mark.touch()
    dist.barrier()
    wait_for([mark])
    dist.barrier()
    if dist.is_main():
        mark.unlink()


@dataclass(frozen=True)
class ImageFolder:
    """PNG files of numbered images, in a folder inside this one for each variant of them.

    batch_size: images of a batch. extractor: the label of what measures them; None if nothing does.
    """

    path: Path
    count: int
    batch_size: int
    extractor: str | None = None

    @cached_property
    def batches(self) -> list[range]:
        return batch_ranges(self.count, self.batch_size)

    def features(self, variant: str = "") -> FeatureFiles | None:
        if self.extractor is None:
            return None
        return FeatureFiles(self.path / "features" / self.extractor / variant, self.batches)

    def file_name(self, number: int) -> str:
        """00000.png: names sort as their numbers do."""
        return f"{number:0{max(5, len(str(self.count - 1)))}d}.png"

    def files(self, ids: Sequence[int], variant: str) -> list[Path]:
        return [self.path / variant / self.file_name(i) for i in ids]

    def save(self, ids: Sequence[int], images: Tensor, variant: str = "images") -> None:
        """images: uint8 [N, 3, H, W]."""
        (self.path / variant).mkdir(exist_ok=True)
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(save_png, images, self.files(ids, variant)))

    def read(self, ids: Sequence[int], variant: str = "images") -> Tensor:
        """uint8 [N, 3, H, W], the very values that were saved, by whichever process."""
        wait_for(paths := self.files(ids, variant))
        with ThreadPoolExecutor(THREADS) as pool:
            return torch.stack(list(pool.map(read_png, paths)))

    def unsaved(self, batches: dict[int, Sequence[int]], variant: str = "images") -> set[int]:
        """Which batches, of those numbers and ids, lack a file, or have one that a power cut left
        empty.
        """
        whole = {path.name for path in (self.path / variant).glob("*.png") if path.stat().st_size}
        names = {number: set(map(self.file_name, ids)) for number, ids in batches.items()}
        return {number for number, own in names.items() if not own <= whole}

    def begin(self, settings: dict) -> None:
        """Make the folder this run's. settings: plain values that decide the images.

        Raises UserError, on all processes, if the folder was begun with others.
        """
        self.refuse_other(settings)
        if dist.is_main():
            self.path.mkdir(parents=True, exist_ok=True)
            for unfinished in self.path.rglob(".*.tmp"):  # of a process that was killed
                unfinished.unlink()
            write_json(self.path / "settings.json", settings)
        dist.barrier()
        wait_for([self.path / "settings.json"])

    def refuse_other(self, settings: dict) -> None:
        """Raise UserError, on all processes, if the folder was begun with other settings."""
        problem = dist.gather_objects(self.conflict(settings) if dist.is_main() else None)[0]
        if problem:
            raise UserError(f"{self.path} {problem}; name another --output_dir, or remove it")

    def conflict(self, settings: dict) -> str | None:
        """Why images of these settings cannot be put into the folder, or None."""
        if not (self.path / "settings.json").is_file():
            return "holds images of unknown settings" if any(self.path.glob("*/*.png")) else None
        plain = json.loads(json.dumps(settings))  # tuples are lists, as in the file
        before, now = _flat(read_json(self.path / "settings.json")), _flat(plain)
        pairs = [(key, before.get(key), now.get(key)) for key in before | now]
        differing = [
            f"{key} {old!s:.24} (now {new!s:.24})" for key, old, new in pairs if old != new
        ]
        return f"was begun with {', '.join(differing)}" if differing else None

    def free_beside(self, settings: dict) -> Path:
        """This folder, or the first of NAME-2, NAME-3, ... that is not of other settings."""
        names = [self.path.name, *(f"{self.path.name}-{k}" for k in range(2, 1000))]
        paths = (self.path.with_name(name) for name in names)
        free = (p for p in paths if not ImageFolder(p, 0, 1).conflict(settings))
        return dist.gather_objects(next(free) if dist.is_main() else None)[0]


@dataclass(frozen=True)
class EvaluationFolder(ImageFolder):
    """settings: what is asked for. labels: [N] the class of every image."""

    settings: EvalSettings | None = None
    labels: Tensor | None = None

    def file_name(self, number: int) -> str:
        """00000_bee.png, with what file systems take of the class's name; 00000.png without."""
        names = self.settings.names
        word = re.sub(r"[^\w.-]+", "-", names[int(self.labels[number])] if names else "")
        word = word.strip("-_.")[:40]
        return super().file_name(number).replace(".png", f"_{word}.png" if word else ".png")

    def write_samples(self, side: int) -> None:
        """samples.npz: arr_0 uint8 [N, side, side, 3] in image order, arr_1 the labels int64 [N].

        As ADM's image_sample.py writes and its evaluator reads; never in memory as a whole.
        """
        header = {"descr": "|u1", "fortran_order": False, "shape": (self.count, side, side, 3)}
        with atomic_write(self.path / SAMPLES) as file, zipfile.ZipFile(file, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for ids in self.batches:
                    dist.beat("writing samples.npz")
                    member.write(self.read(ids).movedim(1, 3).contiguous().numpy().tobytes())
            with archive.open("arr_1.npy", "w") as member:
                np.lib.format.write_array(member, self.labels.numpy(), allow_pickle=False)

    def undrawn(self) -> set[int]:
        return self.unsaved(dict(enumerate(self.batches)))

    def record(self) -> dict:
        """What metrics.json says, if this evaluation was finished before; else nothing."""
        return read_json(self.path / METRICS) if (self.path / METRICS).is_file() else {}

    def lacks_samples(self) -> bool:
        return self.settings.save_npz and not (self.path / SAMPLES).is_file()

    def is_finished(self, measured: dict | None) -> bool:
        """Whether an earlier run has left all that this one is asked for."""
        record = self.record()
        if not record or record["measured"] != measured or not (self.path / GRID).is_file():
            return False
        return not (self.lacks_samples() or (self.settings.keep_images and self.undrawn()))

    def missing(self) -> tuple[set[int], set[int]]:
        """Numbers of the batches that lack images, and of those that lack features."""
        files = self.features()
        undrawn, unmeasured = self.undrawn(), files.missing() if files else set()
        needed = files is None or self.settings.keep_images or self.lacks_samples()
        if self.record().get("images") == "removed" and not needed:
            undrawn &= unmeasured  # where there are features, nobody needs the images any more
        return undrawn, unmeasured


def read_png(path: Path) -> Tensor:
    """uint8 [3, H, W]."""
    with Image.open(path, formats=("PNG",)) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def write_json(path: Path, value: dict) -> None:
    with atomic_write(path) as file:
        file.write((json.dumps(value, indent=1) + "\n").encode())


def write_csv(path: Path, rows: Iterable[dict], names: Iterable[str]) -> None:
    """A line for each row, of the values of those names; what a row lacks is empty."""
    with atomic_write(path) as file:
        text = codecs.getwriter("utf-8")(file)
        table = csv.DictWriter(text, list(names), extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def write_plot(
    path: Path, names: Sequence[str], axis: str, lines: dict[str, list[dict]], flat: Sequence = ()
) -> None:
    """Figures over a setting, a panel for each of those names that some row has.

    lines: rows by a line's label, in the order of their `axis`, a name, too. flat: rows that have
    no place on it, (label, row), as dashed lines.
    """
    from matplotlib.figure import Figure  # slow to import

    every = [*sum(lines.values(), []), *(row for _, row in flat)]
    names = [name for name in names if any(name in row for row in every)]
    if not names:
        return
    figure = Figure(figsize=(3.6 * len(names), 3), layout="constrained")
    for name, panel in zip(names, figure.subplots(1, len(names), squeeze=False)[0], strict=True):
        for label, line in lines.items():
            x, y = ([row.get(key, math.nan) for row in line] for key in (axis, name))
            errors = [row.get(f"{name}_standard_error", 0) for row in line]
            panel.errorbar(x, y, yerr=errors, marker="o", capsize=2, label=label)
            panel.xaxis.get_major_locator().set_params(integer=all(value % 1 == 0 for value in x))
        for label, row in flat:
            if name in row:
                panel.axhline(row[name], color="gray", linestyle="--", label=label)
        panel.set(xlabel=axis, ylabel=name.removesuffix("_mean").replace("_", " "))
        panel.grid(alpha=0.3)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize="small")
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)


def read_json(path: Path) -> dict:
    with as_user_error(f"{path} cannot be read, remove it", (OSError, ValueError)):
        return json.loads(path.read_text())


def _flat(value: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    pairs = {}
    for key, inner in value.items():
        name = prefix + key
        pairs |= _flat(inner, f"{name}.") if isinstance(inner, dict) else {name: inner}
    return pairs
