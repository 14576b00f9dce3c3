"""The output folder of reconstruction.py: what is in it, whose it is, and what is still to do.

    settings.json                   what decides the images, written first; another run's is refused
    original/00000.png ...          the crops
    continuous/, bits6/, ...        the same images through the VAE, without and with a quantizer
    records/VARIANT/batch-K.npz     PSNR, SSIM and use of the levels of batch K: it is done
    features/EXTRACTOR/VARIANT/     features of every batch, where they are measured
    results.json, results.csv, quality.png, grid.png    all figures, once all batches are done

All files are whole or absent, so whatever is there counts. --bits is not among the settings: more
of them may join later.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from util import dist
from util.data.images import save_png
from util.errors import UserError
from util.evaluation.features import FeatureStore, batch_ranges, wait_for
from util.evaluation.folder import conflict, image_name, plain, read_png, write_json
from util.evaluation.variants import ORIGINAL

THREADS = 8  # that write PNG files


@dataclass(frozen=True)
class ReconstructionFolder:
    """count: images in all, numbered from 0. batch_size: images of one batch.

    extractor: names the features, None if nothing is measured by a network.
    """

    path: Path
    count: int
    batch_size: int
    extractor: str | None = None
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(THREADS))

    @cached_property
    def batches(self) -> list[range]:
        return batch_ranges(self.count, self.batch_size)

    def image(self, variant: str, number: int) -> Path:
        return self.path / variant / image_name(number, self.count)

    def records(self, variant: str) -> FeatureStore:
        return FeatureStore(self.path / "records" / variant)

    def features(self, variant: str) -> FeatureStore | None:
        if self.extractor is None:
            return None
        return FeatureStore(self.path / "features" / self.extractor / variant)

    def refuse_other(self, settings: dict) -> None:
        """Raise UserError, on all processes, if the folder was begun with other settings."""
        problem = conflict(self.path, settings, "*/*.png") if dist.is_main() else None
        problem = dist.gather_objects(problem)[0]
        if problem:
            raise UserError(
                f"--output_dir {self.path} {problem}; name another folder, or remove this one"
            )

    def claim(self, settings: dict, variants: Sequence[str]) -> None:
        """Make the folder this run's, or find that it is; all processes take part.

        settings: plain values that decide the images.
        Raises UserError, on all processes, if the folder was begun with others.
        """
        settings = plain(settings)
        self.refuse_other(settings)
        if dist.is_main():
            for name in variants:
                for store in (self.records(name), self.features(name)):
                    if store is not None:
                        store.folder.mkdir(parents=True, exist_ok=True)
                (self.path / name).mkdir(exist_ok=True)
            for unfinished in self.path.rglob(".*.tmp"):  # of a process that was killed
                unfinished.unlink()
            write_json(self.path / "settings.json", settings)
        dist.barrier()

    def missing(self, variant: str) -> set[int]:
        """Numbers of the batches that are not done: their record, features or images lack."""
        numbers = range(len(self.batches))
        lacking = self.records(variant).missing(numbers)
        if self.extractor is not None:
            lacking |= self.features(variant).missing(numbers)
        sizes = {path.name: path.stat().st_size for path in (self.path / variant).glob("*.png")}
        here = {name for name, size in sizes.items() if size}  # a power cut may leave empty files
        for number in set(numbers) - lacking:
            absent = {i for i in self.batches[number] if self.image(variant, i).name not in here}
            if absent and absent & self._recorded(variant, number):
                lacking.add(number)
        return lacking

    def _recorded(self, variant: str, number: int) -> set[int]:
        """Numbers of the images in a batch's record; all of the batch if it is damaged."""
        try:
            return set(self.records(variant).ids(number))
        except UserError:
            return set(self.batches[number])

    def kept(self, variant: str) -> list[int]:
        """Numbers of the images that could be read, in order, once all batches are done."""
        records, numbers = self.records(variant), range(len(self.batches))
        wait_for([records.path(number) for number in numbers])
        return sorted(i for number in numbers for i in records.ids(number))

    def write(
        self,
        variant: str,
        number: int,
        ids: list[int],
        pixels: Tensor,
        record: dict[str, Tensor],
        features: dict[str, Tensor],
    ) -> None:
        """One batch; its record comes last. pixels: uint8 [n, 3, H, W], numbered by ids."""
        list(self.pool.map(save_png, pixels, [self.image(variant, i) for i in ids]))
        if self.extractor is not None:
            self.features(variant).write(number, ids, features)
        self.records(variant).write(number, ids, record)

    def read_images(self, variant: str, ids: Sequence[int]) -> Tensor:
        """uint8 [N, 3, H, W]."""
        return torch.stack([read_png(self.image(variant, i)) for i in ids])

    def variants(self) -> list[str]:
        """All that have been finished, by this run or an earlier one, the crops apart."""
        found = [path.name for path in (self.path / "records").iterdir() if path.is_dir()]
        return [name for name in sorted(found) if name != ORIGINAL and not self.missing(name)]
