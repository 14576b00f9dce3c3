"""What a folder of runs holds: events, checkpoints, evaluations, reconstructions.

A folder, its subfolders and theirs are looked through. Nothing in them is trusted: what cannot be
read is left out with a word why. Checkpoints are mapped, not read: their plain values are wanted.
"""

import argparse
import json
import logging
import pickle
from dataclasses import dataclass, field
from pathlib import Path

import torch

from util.checkpoint import saved_in
from util.errors import UserError
from util.files import ESCAPES, PLAIN_TYPES
from util.log import ABOUT

DEPTH = 2  # of subfolders
NOT_RUNS = {"images", "features", "records", "reference_features", "original", "continuous"}
EVENTS = "events.out.tfevents.*"

Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Training:
    """scalars, images, histograms: (step, value, file's bytes or counts) by tag.

    starts: what was noted when the run was begun or gone on with: environment, flags, model.
    facts: the plain values of its newest checkpoint.
    """

    folder: Path
    scalars: dict[str, Points] = field(default_factory=dict)
    images: dict[str, list[tuple[int, bytes]]] = field(default_factory=dict)
    histograms: dict[str, list[tuple[int, list[float]]]] = field(default_factory=dict)
    starts: list[tuple[int, dict]] = field(default_factory=list)
    facts: dict = field(default_factory=dict)

    @property
    def flags(self) -> dict:
        found = self.starts[-1][1].get("flags") if self.starts else self.facts.get("args")
        return found if isinstance(found, dict) else {}

    @property
    def model(self) -> dict:
        found = self.facts.get("config") or (self.starts[-1][1].get("model") if self.starts else {})
        return found if isinstance(found, dict) else {}


@dataclass(frozen=True)
class Record:
    """A JSON file that an evaluation or a reconstruction left."""

    folder: Path
    values: dict


@dataclass
class Found:
    """All of a folder. left_out: why something in it is not shown."""

    root: Path
    trainings: list[Training] = field(default_factory=list)
    evaluations: list[Record] = field(default_factory=list)
    reconstructions: list[Record] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def name(self, folder: Path) -> str:
        """Of a part within the whole."""
        return "" if folder == self.root else str(folder.relative_to(self.root))


def find(root: Path) -> Found:
    """Raises UserError if the folder is missing or holds nothing of a run."""
    if not root.is_dir():
        raise UserError(f"OUTPUT_DIR {root}: no such folder")
    found = Found(root)
    for folder in _folders(root, DEPTH):
        _look_into(folder, found)
    if not (found.trainings or found.evaluations or found.reconstructions):
        because = f" ({'; '.join(found.left_out)})" if found.left_out else ""
        raise UserError(
            f"OUTPUT_DIR {root} holds no events, checkpoints, evaluation or reconstruction"
            f"{because}; name the --output_dir of a run"
        )
    return found


def _folders(folder: Path, depth: int) -> list[Path]:
    found = [folder]
    if depth:
        inside = (path for path in sorted(folder.iterdir()) if path.is_dir())
        found += [
            deeper
            for path in inside
            if path.name not in NOT_RUNS and not path.name.startswith(".")
            for deeper in _folders(path, depth - 1)
        ]
    return found


def _look_into(folder: Path, found: Found) -> None:
    checkpoints = saved_in(folder)
    if checkpoints or any(folder.glob(EVENTS)):
        found.trainings.append(_training(folder, checkpoints, found))
    for name, records, wanted in (
        ("metrics.json", found.evaluations, "metrics"),
        ("results.json", found.reconstructions, "results"),
    ):
        if (folder / name).is_file():
            values = _json(folder / name, wanted, found)
            if values is not None:
                records.append(Record(folder, values))


def _json(path: Path, wanted: str, found: Found) -> dict | None:
    try:
        values = json.loads(path.read_text())
        if not isinstance(values, dict) or wanted not in values:
            raise ValueError(f"no {wanted!r} in it")
    except (OSError, ValueError) as error:
        found.left_out.append(f"{path.relative_to(found.root)} cannot be read: {error}")
        return None
    return values


def _training(folder: Path, checkpoints: list[Path], found: Found) -> Training:
    facts = _facts(checkpoints[0], found) if checkpoints else {}
    training = Training(folder, facts=facts)
    logs = folder
    elsewhere = training.flags.get("log_dir")
    if elsewhere and not any(folder.glob(EVENTS)) and Path(elsewhere).is_dir():
        logs = Path(elsewhere)
    try:
        _read_events(logs, training)
    except Exception as error:  # TensorBoard meets a damaged file with nearly any
        found.left_out.append(
            f"the events of {found.name(folder) or folder} cannot be read: {_reason(error)}"
        )
    return training


def _reason(error: Exception) -> str:
    """The first line of what a library says, which may be made for a terminal."""
    lines = ESCAPES.sub("", str(error)).strip().splitlines()
    return lines[0][:120] if lines else type(error).__name__


def _facts(path: Path, found: Found) -> dict:
    """The plain values of a checkpoint; its tensors stay on the disk.

    MAR's checkpoints hold their flags as an argparse.Namespace, which is plain data.
    """
    damaged = (OSError, ValueError, RuntimeError, LookupError, EOFError, pickle.UnpicklingError)
    try:
        with torch.serialization.safe_globals(PLAIN_TYPES):
            saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(saved, dict):
            raise ValueError(f"a {type(saved).__name__}")
    except damaged as error:
        found.left_out.append(f"{path.relative_to(found.root)} cannot be read: {_reason(error)}")
        return {}
    if isinstance(saved.get("args"), argparse.Namespace):
        saved["args"] = vars(saved["args"])
    heavy = ("model", "model_ema", "optimizer", "scaler")
    return {key: value for key, value in saved.items() if key not in heavy} | {"file": path.name}


def _read_events(folder: Path, training: Training) -> None:
    """All of a folder's events; what a killed run wrote beyond where it went on is hidden."""
    if not any(folder.glob(EVENTS)):
        return
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    kinds = ("scalars", "images", "histograms", "tensors")
    events = EventAccumulator(str(folder), size_guidance=dict.fromkeys(kinds, 0)).Reload()
    tags = events.Tags()
    for tag in tags["scalars"]:
        training.scalars[tag] = _last_of_each((e.step, e.value) for e in events.Scalars(tag))
    for tag in tags["images"]:
        pairs = ((e.step, e.encoded_image_string) for e in events.Images(tag))
        training.images[tag] = _last_of_each(pairs)
    for tag in tags["histograms"]:
        pairs = ((e.step, _counts(e.histogram_value)) for e in events.Histograms(tag))
        training.histograms[tag] = _last_of_each(pairs)
    if f"{ABOUT}/text_summary" in tags["tensors"]:
        for event in events.Tensors(f"{ABOUT}/text_summary"):
            text = event.tensor_proto.string_val[0].decode()
            training.starts.append((event.step, json.loads(text)))


def _last_of_each(pairs) -> list:
    """(step, value), the last of each step: a run that went on there has written it again."""
    return sorted(dict(pairs).items())


def _counts(histogram) -> list[float]:
    """How often 0, 1, ... came up; TensorBoard leaves out what never did."""
    pairs = zip(histogram.bucket_limit, histogram.bucket, strict=True)
    counts = {round(limit - 0.5): count for limit, count in pairs if 0 < limit < 1 << 16}
    return [counts.get(i, 0.0) for i in range(max(counts, default=-1) + 1)]
