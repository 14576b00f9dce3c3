"""Evaluation: image numbers -> sampler -> VAE decoder -> uint8 -> PNG files, features -> figures.

    for each batch of image numbers, unless it was done before:    Evaluator.evaluate
        images = generate(ids, labels, sampling)       on the process whose turn it is
        features = extractor(images)                   images/*.png, features/.../batch-k.npz
    score(sums of the features)                        figures, on the main process

Beside what folder.py has, an evaluation leaves statistics.npz (mu and sigma, and sFID's, as
--fid_stats reads them), samples.npz (--save_npz), grid.png and, when all is done, metrics.json.
"""

import shutil
import sys
import time
from collections.abc import Sequence
from copy import copy
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from models.sampler import SamplingOptions, sample_latents
from models.tokenbridge import TokenBridge
from models.tokenizers.tokenizer import Tokenizer, decode_images
from util import dist
from util.data.images import grid, psnr, save_png
from util.device import Precision, git_revision, unchanged_randomness, versions
from util.evaluation.extractor import digest
from util.evaluation.folder import GRID, METRICS, EvaluationFolder, read_png, share, write_json
from util.evaluation.metrics import Measure, Scores, score
from util.evaluation.settings import EvalSettings
from util.setup import check_agreement

GRID_ROWS, GRID_COLUMNS = 8, 10


@dataclass(frozen=True)
class Evaluator:
    """Draws images of a model and measures them. measure: None where nothing can be measured."""

    model: TokenBridge
    tokenizer: Tokenizer
    device: torch.device
    precision: Precision
    measure: Measure | None = None

    def generate(self, ids: Sequence[int], labels: Tensor, sampling: SamplingOptions) -> Tensor:
        """The images of those numbers and classes, uint8 [N, 3, H, W], on the CPU.

        Image i depends on (seed, i), its class and the sampling options alone.
        """
        with self.precision.autocast(self.device):
            latents = sample_latents(self.model, labels, image_ids=ids, **asdict(sampling))
        images = decode_images(self.tokenizer, latents)
        if self.tokenizer.decode_dtype is not None and 0 in ids:
            exact = copy(self.tokenizer)
            exact.decode_dtype = None
            error = psnr(decode_images(exact, latents[:1]), images[:1]).item()
            dist.print_main(f"--vae_precision: image 0 is {error:.1f} dB from that of fp32")
        return images

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
        training: take a new folder beside one of other settings, in the place of a UserError.
        Returns, on the main process, the figures and the grid, uint8 [3, H, W].
        """
        started, identity = time.monotonic(), self._identity(settings)
        output = self._folder(settings, folder)
        if training:
            output = replace(output, path=output.free_beside(identity))
        output.begin(identity)
        measured = self.measure.identity() if self.measure is not None else None
        if not dist.gather_objects(dist.is_main() and output.is_finished(measured))[0]:
            with unchanged_randomness(self.device):
                self._draw(output)
                dist.barrier()
                if dist.is_main():
                    facts = identity | {"measured": measured, "processes": dist.world_size()}
                    facts["seconds"] = time.monotonic() - started
                    self._finish(output, facts | (record or {}))
        result = {}, None
        if dist.is_main():
            result = output.record()["metrics"], read_png(output.path / GRID)
            _report(output)
        dist.barrier()
        return result

    def refuse_other_images(self, points: Sequence[EvalSettings], output: Path) -> None:
        """Raise UserError, on all processes, if a point's folder holds other images."""
        identity = self._identity(points[0])
        for point in points:
            folder = self._folder(point, output / point.folder_name())
            folder.refuse_other(identity | {"settings": point.to_dict()})

    def _folder(self, settings: EvalSettings, path: Path) -> EvaluationFolder:
        labels = settings.labels(self.model.config.class_num)
        label = self.measure and self.measure.extractor.label
        return EvaluationFolder(path, len(labels), settings.batch_size, label, settings, labels)

    def _identity(self, settings: EvalSettings) -> dict:
        """All that decides the images. Raises UserError unless all processes have the same."""
        model = self.model.config.to_dict()
        identity = {
            "settings": settings.to_dict(),
            "precision": self.precision.name,
            "device": self.device.type,
            "weights_sha256": digest(self.model),
            "vae_weights_sha256": digest(self.tokenizer),
            "latent_scale": self.tokenizer.latent_scale,  # mean and std are in the model's settings
            "model": {name: setting for name, setting in model.items() if setting is not None},
        }
        if self.tokenizer.decode_dtype is not None:
            identity["vae_precision"] = str(self.tokenizer.decode_dtype).removeprefix("torch.")
        check_agreement(identity)
        return identity

    def _draw(self, folder: EvaluationFolder) -> None:
        """Draw and measure this process's share of what is missing."""
        files = folder.features()
        missing = folder.missing() if dist.is_main() else None
        undrawn, unmeasured = dist.gather_objects(missing)[0]  # all as the main process finds it
        mine = share(undrawn | unmeasured, len(folder.batches), folder.path)
        for number in tqdm(mine, desc="generating", disable=not (mine and dist.is_main())):
            dist.beat(f"generating batch {number + 1} of {len(folder.batches)}")
            ids = folder.batches[number]
            if number in undrawn:
                labels = folder.labels[ids.start : ids.stop]
                images = self.generate(ids, labels, folder.settings.sampling)
                folder.save(ids, images)
            else:
                images = folder.read(ids)
            if number in unmeasured:
                files.write(number, ids, self.measure.extractor(images))

    def _finish(self, folder: EvaluationFolder, facts: dict) -> None:
        """Write everything, metrics.json last. facts: what that is to hold besides."""
        labels, config, measure = folder.labels, self.model.config, self.measure
        drawn, counts = (x.tolist() for x in labels.unique_consecutive(return_counts=True))
        if folder.lacks_samples():
            folder.write_samples(config.img_size)
        if not (folder.path / GRID).is_file():
            shown, columns = folder.read(shown_ids(labels)), min(len(drawn), GRID_COLUMNS)
            save_png(grid(shown, columns), folder.path / GRID)
        dist.beat("computing the figures")
        scores, trained = Scores(), len(folder.settings.names) or config.class_num
        if measure is not None:
            sums = measure.sums(folder.features())
            scores = score(sums, measure)
            path = folder.path / "statistics.npz"
            sums.save_statistics(path, measure.extractor, config.img_size)
        if scores.figures and len(drawn) < trained:
            part = f"{len(drawn)} of {trained} classes"
            scores.warnings.append(f"these figures are of {part}: compare them only with the same")
        asked_before = folder.record().get("images") == "kept"
        keep = measure is None or folder.settings.keep_images or asked_before
        record = {
            "metrics": scores.figures,
            "warnings": scores.warnings,
            "images": "kept" if keep else "removed",
            "classes": [folder.settings.name(label) for label in drawn],
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
    record, images, count = folder.record(), folder.path / "images", folder.count
    fate = f"kept in {images}"
    if record["images"] == "removed":
        shutil.rmtree(images, ignore_errors=True)
        fate = "removed, they are measured (--keep_images keeps them)"
    print(f"{count} images {fate}; a first look: {folder.path / GRID}")
    size = count if count % 1000 else f"{count // 1000}K"  # as papers write it
    for name, figure in record["metrics"].items():
        print(f"{f'FID-{size}' if name == 'fid' else name}: {figure:.4f}")
    for warning in record["warnings"]:
        print(f"warning: {warning}", file=sys.stderr, flush=True)


def shown_ids(labels: Tensor) -> list[int]:
    """Images for a first look, a column for each of the first classes. labels: [N], of all."""
    counts = labels.unique_consecutive(return_counts=True)[1]
    firsts = (counts.cumsum(0) - counts)[:GRID_COLUMNS].tolist()
    rows = min(GRID_ROWS, int(counts[:GRID_COLUMNS].min()))
    return [first + k for k in range(rows) for first in firsts]
