"""Everything around the model: flags, processes, data, caches, checkpoints, logs, metrics."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # a checkout, or where this is installed
