"""Evaluation: image numbers -> sampler -> VAE decoder -> uint8 -> PNG files, features -> figures.

    for each batch of image numbers, unless it was done before:    Evaluator.evaluate
        images = generate(ids, labels, sampling)       on the process whose turn it is
        update(images)                                 images/*.png, features/.../batch-k.npz
    result()                                           figures, on the main process

A batch holds the same image numbers on any number of processes, so nothing depends on their
number. Beside what folder.py has, an evaluation leaves statistics.npz (mu and sigma, as
--fid_stats reads them), samples.npz (--save_npz), grid.png and, when all is done, metrics.json.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from models.generate import decode_images
from models.sampler import SamplingOptions, sample_latents
from models.tokenbridge import TokenBridge
from models.tokenizers.tokenizer import Tokenizer
from util import dist
from util.data.images import grid, save_png
from util.device import Precision, unchanged_randomness
from util.errors import UserError
from util.evaluation.folder import (
    FeatureFiles,
    ImageFolder,
    file_label,
    image_name,
    read_images,
    read_json,
    read_png,
    wait_for,
    whole_files,
    write_images,
    write_json,
    write_samples,
)
from util.evaluation.metrics import Accumulator, Measure, Scores, score
from util.evaluation.settings import SWEPT as SWEPT
from util.evaluation.settings import EvalSettings
from util.evaluation.settings import find_class as find_class
from util.logging import digest, git_revision, versions

GRID_ROWS, GRID_COLUMNS = 8, 10
METRICS, GRID, SAMPLES = "metrics.json", "grid.png", "samples.npz"


@dataclass(frozen=True)
class EvaluationFolder(ImageFolder):
    """labels: [N] the class of every image. names: of the classes, for file names, or none."""

    labels: Tensor | None = None
    names: tuple[str, ...] = ()

    @cached_property
    def images(self) -> list[Path]:
        """The file of every image: images/00000_bee.png."""
        words = [file_label(name) for name in self.names] or [""] * (int(self.labels.max()) + 1)
        named = enumerate(words[label] for label in self.labels.tolist())
        return [self.path / "images" / image_name(i, self.count, word) for i, word in named]

    def features(self, measure: Measure) -> FeatureFiles:
        return FeatureFiles(self.path / "features" / measure.extractor.label, self.batches)

    def without_images(self) -> set[int]:
        """Numbers of the batches of which a PNG is missing."""
        present = whole_files(self.path / "images")
        absent = [path.name not in present for path in self.images]
        return {k for k, ids in enumerate(self.batches) if any(absent[i] for i in ids)}

    def record(self) -> dict:
        """What metrics.json says, if this evaluation was finished before; else nothing."""
        return read_json(self.path / METRICS) if (self.path / METRICS).is_file() else {}

    def is_finished(self, settings: EvalSettings, measured: dict | None) -> bool:
        """Whether an earlier run has left all that this one is asked for."""
        record = self.record()
        if not record or record["measured"] != measured or not (self.path / GRID).is_file():
            return False
        return not (
            self.lacks_samples(settings) or (settings.keep_images and self.without_images())
        )

    def lacks_samples(self, settings: EvalSettings) -> bool:
        return settings.save_npz and not (self.path / SAMPLES).is_file()

    def missing(
        self, files: FeatureFiles | None, settings: EvalSettings
    ) -> tuple[set[int], set[int]]:
        """Numbers of the batches that lack images, and of those that lack features."""
        undrawn, unmeasured = self.without_images(), files.missing() if files else set()
        needed = settings.keep_images or self.lacks_samples(settings)
        if self.record().get("images") == "removed" and files is not None and not needed:
            undrawn &= unmeasured  # where there are features, nobody needs the images any more
        return undrawn, unmeasured


class Evaluator:
    """Draws images of a model and measures them, or measures images that others have made.

    model, tokenizer: None where images are only measured. precision: of the model. measure: None
    where nothing can be measured.
    """

    def __init__(
        self,
        model: TokenBridge | None,
        tokenizer: Tokenizer | None,
        device: torch.device,
        precision: Precision | None = None,
        measure: Measure | None = None,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.device, self.precision, self.measure = device, precision, measure
        self.begin()

    def generate(self, ids: Sequence[int], labels: Tensor, sampling: SamplingOptions) -> Tensor:
        """The images of those numbers and classes, uint8 [N, 3, H, W], on the CPU.

        Image i depends on (seed, i), its class and the sampling options alone.
        """
        with self.precision.autocast(self.device):
            latents = sample_latents(self.model, labels, image_ids=ids, **asdict(sampling))
        return decode_images(self.tokenizer, latents)

    def begin(self, files: FeatureFiles | None = None, sums: Accumulator | None = None) -> None:
        """Forget the images before. files: where features of batches are kept, for a restart.

        sums: of what is needed, if that is not all the figures of the measure.
        """
        self.files, self.sums = files, sums
        if sums is None and self.measure is not None:
            keep = self.measure.features is not None
            count = files.batches[-1].stop if files else 0
            self.sums = Accumulator(self.measure.extractor.layers, count, keep)

    def update(self, images: Tensor, number: int = 0, ids: Sequence[int] = ()) -> None:
        """images: uint8 [N, 3, H, W]; with files, those of ids, which are batch `number`."""
        features = self.measure.extractor(images) if len(images) else {}
        if self.files is not None:
            self.files.write(number, ids, features)
        elif features:
            self.sums.update(features)

    def collect(self) -> Accumulator:
        """What was added up since `begin`; with files, of all batches."""
        for features in self.files.chunks() if self.files else ():
            self.sums.update(features)
        return self.sums

    def result(self) -> Scores:
        """The figures of the images since `begin`; with files, of those of all processes."""
        return score(self.collect(), self.measure)

    @torch.no_grad()
    def evaluate(
        self,
        settings: EvalSettings,
        folder: Path,
        record: dict | None = None,
        training: bool = False,
    ) -> tuple[dict[str, float], Tensor | None]:
        """Generate what the folder lacks, measure it, write grid.png and metrics.json.

        The global random state is left as it was. record: further facts for metrics.json.
        training: if the folder is another evaluation's, take a new one beside it, where else a
        UserError says so: a training must not end there.
        Returns, on the main process, the figures and the grid, uint8 [3, H, W].
        """
        started, identity = time.monotonic(), self._identity(settings)
        output = self._folder(settings, folder)
        if training:
            output = self._folder(settings, output.free_beside(identity))
        output.begin(identity)
        measured = self.measure.identity() if self.measure is not None else None
        done = dist.is_main() and output.is_finished(settings, measured)
        if not dist.gather_objects(done)[0]:
            with unchanged_randomness(self.device):
                self._draw(settings, output)
                dist.barrier()
                if dist.is_main():
                    facts = identity | {"measured": measured, "processes": dist.world_size()}
                    facts["seconds"] = time.monotonic() - started
                    self._finish(settings, output, facts | (record or {}))
        figures, samples = {}, None
        if dist.is_main():
            figures, samples = output.record()["metrics"], read_png(output.path / GRID)
            _report(output)
        dist.barrier()
        return figures, samples

    def refuse_other_images(self, points: Sequence[EvalSettings], output: Path) -> None:
        """Raise UserError, on all processes, if a point's folder holds other images."""
        identity = self._identity(points[0])
        for point in points:
            folder = self._folder(point, output / point.folder_name())
            folder.refuse_other(identity | {"settings": point.to_dict()})

    def _folder(self, settings: EvalSettings, path: Path) -> EvaluationFolder:
        labels = settings.labels(self.model.config.class_num)
        return EvaluationFolder(
            path, settings.num_images, settings.batch_size, labels, settings.names
        )

    def _identity(self, settings: EvalSettings) -> dict:
        """All that decides the images. Raises UserError unless all processes have the same."""
        identity = {
            "settings": settings.to_dict(),
            "precision": self.precision.name,
            "device": self.device.type,
            "weights_sha256": digest(self.model),
            "vae_weights_sha256": digest(self.tokenizer),
            "latent_scale": self.tokenizer.latent_scale,
            "model": self.model.config.to_dict(),
        }
        for rank, other in enumerate(dist.gather_objects(identity)):
            if other != identity:
                raise UserError(
                    f"processes {dist.rank()} and {rank} would draw different images; --resume "
                    "and --vae_path must be the same files on all nodes"
                )
        return identity

    def _draw(self, settings: EvalSettings, folder: EvaluationFolder) -> None:
        """This process's share of the batches that lack images or features."""
        files = folder.features(self.measure) if self.measure is not None else None
        self.begin(files)
        missing = folder.missing(files, settings) if dist.is_main() else None
        undrawn, unmeasured = dist.gather_objects(missing)[0]  # all as the main process finds it
        mine = folder.share(undrawn | unmeasured)
        for number in tqdm(mine, desc="generating", disable=not (mine and dist.is_main())):
            dist.beat(f"generating batch {number + 1} of {len(folder.batches)}")
            ids = folder.batches[number]
            paths = folder.images[ids.start : ids.stop]
            if number in undrawn:
                labels = folder.labels[ids.start : ids.stop]
                images = self.generate(ids, labels, settings.sampling)
                write_images(paths, images)
            else:
                images = read_images(paths)
            if number in unmeasured:
                self.update(images, number, ids)

    def _finish(self, settings: EvalSettings, folder: EvaluationFolder, facts: dict) -> None:
        """Write everything; metrics.json last, which says that the evaluation is finished.

        facts: what metrics.json is to hold besides, as plain values.
        """
        labels, config, measure = folder.labels, self.model.config, self.measure
        drawn, counts = (x.tolist() for x in labels.unique_consecutive(return_counts=True))
        if folder.lacks_samples(settings):
            parts = (read_images(folder.images[b.start : b.stop]) for b in folder.batches)
            write_samples(folder.path / SAMPLES, parts, labels, config.img_size)
        if not (folder.path / GRID).is_file():
            shown = [folder.images[i] for i in shown_ids(labels)]
            wait_for(shown)
            columns = min(len(drawn), GRID_COLUMNS)
            save_png(grid(read_images(shown), columns), folder.path / GRID)
        dist.beat("computing the figures")
        scores, trained = Scores(), len(settings.names) or config.class_num
        if measure is not None:
            scores = self.result()
            self.sums.save_statistics(
                folder.path / "statistics.npz", measure.extractor, config.img_size
            )
        if scores.figures and len(drawn) < trained:
            scores.warnings.append(
                f"these figures are of {len(drawn)} of {trained} classes: compare them only "
                "with images of the same classes"
            )
        before = folder.record().get("images")  # "kept": somebody asked for them
        keep = measure is None or settings.keep_images or before == "kept"
        record = {
            "metrics": scores.figures,
            "warnings": scores.warnings,
            "images": "kept" if keep else "removed",
            "classes": [settings.name(label) for label in drawn],
            "labels": drawn,
            "counts": counts,
            **facts,
            "reference": measure.record if measure is not None else None,
            "metric_settings": scores.settings,
            "replicates": scores.replicates,
            "versions": versions(),
            "git_revision": git_revision(),
            "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        write_json(folder.path / METRICS, record)


def _report(folder: EvaluationFolder) -> None:
    """Print the figures, and remove the images if nobody asked for them: all else is written."""
    record = folder.record()
    images = folder.path / "images"
    if record["images"] == "removed":
        for path in images.glob("*.png"):
            path.unlink()
        if images.exists():
            images.rmdir()
        fate = "removed, they are measured (--keep_images keeps them)"
    else:
        fate = f"kept in {images}"
    print(f"{folder.count} images {fate}; a first look: {folder.path / GRID}")
    thousands, rest = divmod(folder.count, 1000)
    size = f"{thousands}K" if not rest else str(folder.count)  # as papers write it
    for name, value in record["metrics"].items():
        print(f"{f'FID-{size}' if name == 'fid' else name}: {value:.4f}")
    for warning in record["warnings"]:
        print(f"warning: {warning}", file=sys.stderr, flush=True)


def shown_ids(labels: Tensor) -> list[int]:
    """Images for a first look, a column for each of the first classes. labels: [N], of all."""
    counts = labels.unique_consecutive(return_counts=True)[1]
    firsts = (counts.cumsum(0) - counts)[:GRID_COLUMNS].tolist()
    rows = min(GRID_ROWS, int(counts[:GRID_COLUMNS].min()))
    return [first + k for k in range(rows) for first in firsts]
