"""What a folder of runs holds: TensorBoard events, checkpoints, evaluations, reconstructions.

Subfolders are read two levels deep. What cannot be read is left out and named. Of checkpoints only
the plain values are read; their tensors stay on the disk.
"""

import argparse
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from util.checkpoint import saved_in
from util.errors import UserError
from util.files import PLAIN_TYPES
from util.stop import Stopped

EVENTS = "events.out.tfevents.*"
ABOUT = "run/about/text_summary"  # environment, flags and model at every start of a training
OLDER_TAGS = re.compile("^(heldout|preview)")  # of what is now logged as validation
HEAVY = ("model", "model_ema", "optimizer", "scaler")  # parts of a checkpoint


@dataclass
class Training:
    """scalars, images, histograms: {tag: [(step, number, encoded image or counts), ...]}.

    starts: (step, {"environment": ..., "flags": ..., "model": ...}) of every start and resumption.
    checkpoint: the plain values of the newest one.
    """

    scalars: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    images: dict[str, list[tuple[int, bytes]]] = field(default_factory=dict)
    histograms: dict[str, list[tuple[int, list[float]]]] = field(default_factory=dict)
    starts: list[tuple[int, dict]] = field(default_factory=list)
    checkpoint: dict = field(default_factory=dict)

    def settings(self, started: str, saved: str) -> dict:
        """Of the last start ("flags", "model"), else of the checkpoint ("args", "config")."""
        last = self.starts[-1][1] if self.starts else {}
        return last.get(started) or self.checkpoint.get(saved) or {}


@dataclass
class Runs:
    """All below a folder, by the names of the folders within it, "" for itself.

    evaluations: what metrics.json says of the points in a folder; reconstructions: results.json;
    with "folder" added to both. unreadable: a line for each file that could not be read.
    """

    trainings: dict[str, Training] = field(default_factory=dict)
    evaluations: dict[str, list[dict]] = field(default_factory=dict)
    reconstructions: dict[str, dict] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)

    @contextmanager
    def reading(self, path: Path) -> Iterator[Path]:
        """Notes why a file cannot be read; a damaged one makes libraries fail in nearly any way."""
        try:
            yield path
        except Stopped:
            raise
        except Exception as error:
            self.unreadable.append(f"{path} cannot be read: {type(error).__name__}")


def load(root: Path) -> Runs:
    """Raises UserError if the folder is missing or holds nothing of a run."""
    if not root.is_dir():
        raise UserError(f"OUTPUT_DIR {root}: no such folder")
    runs = Runs()
    for folder in sorted([root, *root.glob("[!.]*/"), *root.glob("[!.]*/[!.]*/")]):
        name = "" if folder == root else str(folder.relative_to(root))
        if saved_in(folder) or any(folder.glob(EVENTS)):
            runs.trainings[name] = read_training(folder, runs)
        if (folder / "metrics.json").is_file():
            with runs.reading(folder / "metrics.json") as path:
                point = read_json(path, "metrics")
                runs.evaluations.setdefault(name.rpartition("/")[0], []).append(point)
        if (folder / "results.json").is_file():
            with runs.reading(folder / "results.json") as path:
                runs.reconstructions[name] = read_json(path, "results")
    if not (runs.trainings or runs.evaluations or runs.reconstructions):
        reasons = f" ({'; '.join(runs.unreadable)})" if runs.unreadable else ""
        raise UserError(
            f"OUTPUT_DIR {root} holds no events, checkpoints, evaluation or reconstruction"
            f"{reasons}; name the --output_dir of a run"
        )
    return runs


def read_json(path: Path, key: str) -> dict:
    """Its values and its folder. Raises ValueError without the key."""
    values = json.loads(path.read_text())
    if not isinstance(values, dict) or not isinstance(values.get(key), dict | list):
        raise ValueError(f"no {key}")
    return values | {"folder": path.parent}


def read_training(folder: Path, runs: Runs) -> Training:
    """The newest checkpoint and the events, from --log_dir if there are none in the folder."""
    training = Training()
    for newest in saved_in(folder)[:1]:
        with runs.reading(newest):
            training.checkpoint = read_checkpoint(newest)
    elsewhere = training.settings("flags", "args").get("log_dir")
    logs = Path(elsewhere) if elsewhere and not any(folder.glob(EVENTS)) else folder
    if any(logs.glob(EVENTS)):
        with runs.reading(logs / EVENTS):
            read_events(logs, training)
    return training


def read_checkpoint(path: Path) -> dict:
    """Its plain values. It is mapped to memory instead of read, and nothing is unpickled."""
    with torch.serialization.safe_globals(PLAIN_TYPES):
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if isinstance(saved.get("args"), argparse.Namespace):  # in checkpoints of MAR
        saved["args"] = vars(saved["args"])
    return {name: value for name, value in saved.items() if name not in HEAVY} | {"file": path.name}


def read_events(folder: Path, training: Training) -> None:
    """All events but those that a killed run wrote beyond the step at which it was resumed."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    kinds = ("scalars", "images", "histograms", "tensors")
    events = EventAccumulator(str(folder), size_guidance=dict.fromkeys(kinds, 0)).Reload()
    for kind, values, read in (
        ("scalars", training.scalars, lambda event: event.value),
        ("images", training.images, lambda event: event.encoded_image_string),
        ("histograms", training.histograms, lambda event: counts(event.histogram_value)),
    ):
        for tag in events.Tags()[kind]:
            last = {event.step: read(event) for event in getattr(events, kind.title())(tag)}
            values[OLDER_TAGS.sub("validation", tag)] = sorted(last.items())
    if ABOUT in events.Tags()["tensors"]:
        texts = [(e.step, e.tensor_proto.string_val[0]) for e in events.Tensors(ABOUT)]
        training.starts += [(step, json.loads(text)) for step, text in texts]


def counts(histogram) -> list[float]:
    """How often 0, 1, ... came up; TensorBoard leaves out what never did."""
    pairs = zip(histogram.bucket_limit, histogram.bucket, strict=True)
    found = {round(limit - 0.5): count for limit, count in pairs if 0 < limit < 1 << 16}
    return [found.get(i, 0.0) for i in range(max(found, default=-1) + 1)]
