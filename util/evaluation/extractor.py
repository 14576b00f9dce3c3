"""The network whose features are compared: any that is registered with torch-fidelity.

Images, uint8 [N, 3, H, W] -> features of the layers that torch-fidelity takes for each metric.
The network is torch-fidelity's Inception unless another one is named; each metric's layer is the
one that the network itself declares for it.
"""

import importlib
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from util import dist
from util.errors import UserError
from util.files import load_tensors, sha256
from util.logging import digest

INCEPTION = "inception-v3-compat"
WEIGHTS_FILE = "weights-inception-2015-12-05-6726825d.pth"
METRICS = ("isc", "fid", "kid", "prc")  # as torch-fidelity calls them
BATCH = 64  # as torch-fidelity's: the rounding of a feature may depend on it
DOWNLOAD_TIMEOUT = 20  # seconds; a firewall that swallows packets must not stop an evaluation


class Extractor:
    """A network by the name it is registered under, and the layer of each metric.

    layers: {"isc": ..., "fid": ...} of those metrics that the network declares a layer for.
    weights_sha256: of the file, or of the tensors if there is none.
    """

    def __init__(self, name: str, weights: Path | None, device: torch.device):
        self.name, self.device = name, device
        self.layers = metric_layers(name)
        self.network = _create(name, sorted(set(self.layers.values())), weights).to(device)
        self.weights_sha256 = sha256(weights) if weights is not None else digest(self.network)

    @property
    def is_inception(self) -> bool:
        return self.name == INCEPTION

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """images: uint8 [N, 3, H, W] -> {layer: float32 [N, D]}, on the CPU."""
        parts = []
        for part in images.split(BATCH):
            features = self.network(part.to(self.device))
            named = self.network.convert_features_tuple_to_dict(features)
            parts.append({layer: tensor.float().cpu() for layer, tensor in named.items()})
        return {layer: torch.cat([part[layer] for part in parts]) for layer in parts[0]}

    def width(self, metric: str, size: int | None = None) -> int:
        """The number of features of a metric's layer. size: of images that the network takes."""
        side = size or 64
        blank = torch.zeros(1, 3, side, side, dtype=torch.uint8)
        return self(blank)[self.layers[metric]].shape[1]

    @property
    def label(self) -> str:
        """Of the folders in which features of this network are kept."""
        return f"{self.name}-{self.weights_sha256[:12]}"

    def identity(self) -> dict[str, str]:
        """What two sets of features must share to be compared."""
        return {"extractor": self.name, "weights_sha256": self.weights_sha256}


def load_extractor(given: str, weights: str | None, device: torch.device) -> Extractor | None:
    """The extractor NAME or MODULE:NAME; MODULE is imported first, which registers NAME.

    weights: a file of tensors; None takes what the extractor itself finds or downloads.
    Returns None, on every process, if the default, Inception, has no weights here: said in one
    line. Raises UserError on an unknown name, and on weights that are missing or another network's.
    """
    name = registered_name(given)
    if name == INCEPTION:
        path = find_inception_weights(weights)
        if path is not None:
            return Extractor(name, path, device)
        dist.print_main(
            f"nothing is measured, FID and IS are not computed: no Inception weights; put "
            f"torch-fidelity's {WEIGHTS_FILE} at {published_weights()} or name it with "
            "--inception_weights"
        )
        return None
    if weights is not None:
        load_tensors(weights, "--inception_weights")
        return Extractor(name, Path(weights), device)
    extractor, problem = _one_a_node_first(lambda: Extractor(name, None, device))
    if problem:
        raise UserError(
            f"--feature_extractor {name} finds no weights ({problem}); name a file of them "
            "with --inception_weights"
        )
    return extractor


def published_weights() -> Path:
    """Where torch-fidelity keeps the Inception weights it downloads."""
    return Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_FILE


def find_inception_weights(given: str | None) -> Path | None:
    """The given file, else the one downloaded earlier, or now by one process of each node; checked.

    Returns None, on every process, if a node has none and cannot download it.
    """
    path = published_weights() if given is None else Path(given)
    if given is None:
        _, problem = _one_a_node_first(_download_inception_weights)
        if problem:
            if dist.is_main():
                print(f"no Inception weights from the network ({problem})", file=sys.stderr)
            return None
    load_tensors(path, "--inception_weights")  # torch-fidelity would unpickle it unchecked
    return path


def _download_inception_weights() -> None:
    """To torch-fidelity's own place, its digest checked, unless it is there."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    if published_weights().is_file():
        return
    waiting = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        torch.hub.load_state_dict_from_url(URL_INCEPTION_V3, check_hash=True, weights_only=True)
    finally:
        socket.setdefaulttimeout(waiting)


def _one_a_node_first(build: Callable[[], object]) -> tuple[object, str | None]:
    """What build returns, and the problem of the first process where it fails, on all processes.

    One process of each node goes first: what it downloads is there for the others.
    """
    nodes = dist.gather_objects(socket.gethostname())
    first = nodes.index(nodes[dist.rank()]) == dist.rank()
    built, problem = None, None
    for turn in (True, False):
        if first == turn:
            try:
                built = build()
            except (OSError, RuntimeError, UserError) as error:
                problem = " ".join(str(error).split())[:200] or type(error).__name__
        dist.barrier()
    return built, next((found for found in dist.gather_objects(problem) if found), None)


def registered_name(given: str) -> str:
    """The name in NAME or MODULE:NAME, known to torch-fidelity once MODULE is imported."""
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    module, _, name = given.rpartition(":")
    if module:
        if "" not in sys.path:  # a console command, or a script of another folder
            sys.path.append("")
        try:
            importlib.import_module(module)
        except (ImportError, TypeError) as error:  # TypeError: a relative name
            raise UserError(
                f"--feature_extractor {given}: cannot import {module!r} ({error})"
            ) from error
    if name not in FEATURE_EXTRACTORS_REGISTRY:
        raise UserError(
            f"--feature_extractor {given}: torch-fidelity knows no extractor {name!r}, only "
            f"{', '.join(FEATURE_EXTRACTORS_REGISTRY)}; one of your own is MODULE:NAME, where "
            "importing MODULE registers NAME"
        )
    return name


def metric_layers(name: str) -> dict[str, str]:
    """The layer of each metric, as torch-fidelity chooses it."""
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    network, layers = FEATURE_EXTRACTORS_REGISTRY[name], {}
    for metric in METRICS:
        try:
            layers[metric] = network.get_default_feature_layer_for_metric(metric)
        except KeyError:
            continue  # a network without, say, logits
    return {metric: layer for metric, layer in layers.items() if layer is not None}


def _create(name: str, layers: list[str], weights: Path | None) -> nn.Module:
    """Through torch-fidelity's own constructor."""
    from torch_fidelity.utils import create_feature_extractor

    path = str(weights) if weights is not None else None
    try:
        return create_feature_extractor(
            name, layers, cuda=False, feature_extractor_weights_path=path, verbose=False
        )
    except (RuntimeError, KeyError, ValueError, NotImplementedError, AttributeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        needed = f"; it needs {WEIGHTS_FILE}" if name == INCEPTION else ""
        raise UserError(
            f"--inception_weights {path}: not the weights of {name} ({first}){needed}"
        ) from error
