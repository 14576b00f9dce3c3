"""Everything around the model: flags, processes, data, caches, checkpoints, logs, metrics."""

from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # a checkout, or where this is installed
_models = find_spec("models")
if _models is not None:
    _place = Path((_models.submodule_search_locations or [_models.origin])[0]).resolve().parent
    if _place != ROOT:
        raise ImportError(
            f"util comes from {ROOT} and models from {_place}: two projects are mixed; take one of "
            "them off PYTHONPATH, or pip uninstall it"
        )
