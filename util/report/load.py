"""What a folder of runs holds: TensorBoard events, checkpoints, evaluations, reconstructions.

Subfolders are read two levels deep. What cannot be read is left out and named. Of checkpoints only
the plain values are read; their tensors stay on the disk.
"""

import argparse
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from util.checkpoint import saved_in
from util.errors import UserError
from util.files import PLAIN_TYPES

EVENTS = "events.out.tfevents.*"
ABOUT = "run/about/text_summary"  # environment, flags and model at every start of a training
HEAVY = ("model", "model_ema", "averages", "optimizer", "scaler")  # parts of a checkpoint


@dataclass
class Training:
    """scalars, images, histograms: {tag: [(step, number, encoded image or bins), ...]}.

    environments: (step, names and values) of every start and resumption. checkpoint: the plain
    values of the newest one. flags, model: of the last start, else of the checkpoint.
    """

    scalars: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    images: dict[str, list[tuple[int, bytes]]] = field(default_factory=dict)
    histograms: dict[str, list[tuple[int, list]]] = field(default_factory=dict)
    environments: list[tuple[int, dict]] = field(default_factory=list)
    checkpoint: dict = field(default_factory=dict)
    flags: dict = field(default_factory=dict)
    model: dict = field(default_factory=dict)


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
        for path in (folder / "metrics.json", folder / "results.json"):
            if path.is_file():
                with runs.reading(path):
                    record = json.loads(path.read_text()) | {"folder": folder}
                    if path.name == "metrics.json":
                        runs.evaluations.setdefault(name.rpartition("/")[0], []).append(record)
                    else:
                        runs.reconstructions[name] = record
    if not (runs.trainings or runs.evaluations or runs.reconstructions):
        why = "".join(f"; {reason}" for reason in runs.unreadable)
        raise UserError(f"OUTPUT_DIR {root} holds nothing of a run; name its --output_dir{why}")
    return runs


def read_training(folder: Path, runs: Runs) -> Training:
    """The newest checkpoint and the events, from --log_dir if there are none in the folder."""
    training = Training()
    for newest in saved_in(folder)[:1]:
        with runs.reading(newest):
            read_checkpoint(newest, training)
    logs = folder if any(folder.glob(EVENTS)) else Path(training.flags.get("log_dir") or folder)
    if any(logs.glob(EVENTS)):
        with runs.reading(logs / EVENTS):
            read_events(logs, training)
    return training


def read_checkpoint(path: Path, training: Training) -> None:
    """Its plain values. It is mapped to memory instead of read, and nothing is unpickled."""
    with torch.serialization.safe_globals(PLAIN_TYPES):
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    training.checkpoint = {"file": path.name} | {k: v for k, v in saved.items() if k not in HEAVY}
    flags = saved.get("args", {})
    training.flags = vars(flags) if isinstance(flags, argparse.Namespace) else flags  # MAR's
    training.model = saved.get("config", {})


def read_events(folder: Path, training: Training) -> None:
    """All events but those that a killed run wrote beyond the step at which it was resumed."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    kinds = ("scalars", "images", "histograms", "tensors")
    events = EventAccumulator(str(folder), size_guidance=dict.fromkeys(kinds, 0)).Reload()
    for kind, values, name in (
        ("scalars", training.scalars, "value"),
        ("images", training.images, "encoded_image_string"),
        ("histograms", training.histograms, "histogram_value"),
    ):
        for tag in events.Tags()[kind]:
            last = {e.step: getattr(e, name) for e in getattr(events, kind.title())(tag)}
            values[tag] = sorted(last.items())
    starts = events.Tensors(ABOUT) if ABOUT in events.Tags()["tensors"] else []
    for event in sorted(starts, key=lambda event: event.wall_time):  # files are read by name
        about = json.loads(event.tensor_proto.string_val[0])
        training.environments.append((event.step, about.get("environment", {})))
        training.flags = about.get("flags") or training.flags
        training.model = about.get("model") or training.model
