"""The network whose features are compared: any that is registered with torch-fidelity.

Images, uint8 [N, 3, H, W] -> features of the layer that the network declares for each metric.
networks.py registers those of ours.
"""

import hashlib
import importlib
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from util import dist
from util.errors import UserError
from util.files import load_tensors, sha256

INCEPTION = "inception-v3-compat"
WEIGHTS_FILE = "weights-inception-2015-12-05-6726825d.pth"
METRICS = ("isc", "fid", "kid", "prc")  # as torch-fidelity calls them
SPATIAL, SPATIAL_CHANNELS, SPATIAL_WIDTH = "mixed_6", 7, 7 * 17 * 17  # Inception's layer of sFID
DISTANCES = {INCEPTION: "fid", "dinov2": "fd_dinov2"}  # others: frechet_distance
BATCH = 64  # as torch-fidelity's: the rounding of a feature may depend on it
DOWNLOAD_TIMEOUT = 20  # seconds; a firewall that swallows packets must not stop an evaluation


class Extractor:
    """A network by its registered name.

    layers: {"isc": ..., "fid": ...}, of the metrics that the network declares one for, and of
    sFID ("sfid") if it is Inception.
    weights_sha256: of the file, or of the tensors if there is none. label: for names of folders.
    """

    def __init__(self, name: str, weights: Path | None, device: torch.device):
        self.name, self.device, self.is_inception = name, device, name == INCEPTION
        self.distance = DISTANCES.get(name, "frechet_distance")
        self.layers = metric_layers(name)
        self.network = _create(name, sorted(set(self.layers.values())), weights).to(device)
        if self.is_inception:
            self.layers["sfid"] = SPATIAL
            self.network.Mixed_6d.register_forward_hook(self._keep_spatial)
        self.weights_sha256 = sha256(weights) if weights is not None else digest(self.network)
        self.label = f"{name}-{self.weights_sha256[:12]}"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """images: uint8 [N, 3, H, W] -> {layer: float32 [N, D]}, on the CPU; of none, nothing."""
        if not len(images):
            return {}
        parts = []
        for part in images.split(BATCH):
            features = self.network(part.to(self.device))
            named = self.network.convert_features_tuple_to_dict(features)
            if self.is_inception:
                named[SPATIAL] = self._spatial
            parts.append({layer: tensor.float().cpu() for layer, tensor in named.items()})
        return {layer: torch.cat([part[layer] for part in parts]) for layer in parts[0]}

    def _keep_spatial(self, block: nn.Module, inputs: tuple, output: Tensor) -> None:
        """sFID's features of a batch, [n, 17 x 17 x 7], in the order of ADM's evaluator.

        mixed_6/conv:0, of which that takes seven channels, is the 1 x 1 convolution after batch
        norm and ReLU: the first 192 channels of the output of Mixed_6d, [n, 768, 17, 17].
        """
        self._spatial = output[:, :SPATIAL_CHANNELS].movedim(1, 3).flatten(1)

    def width(self, metric: str, size: int | None = None) -> int:
        """The number of features of a metric's layer. size: of images that the network takes."""
        blank = torch.zeros(1, 3, size or 64, size or 64, dtype=torch.uint8)
        return self(blank)[self.layers[metric]].shape[1]

    def identity(self) -> dict[str, str]:
        """What two sets of features must share to be compared."""
        return {"extractor": self.name, "weights_sha256": self.weights_sha256}


def digest(network: nn.Module) -> str:
    """SHA-256 of a network's tensors: their names, types, shapes and bytes."""
    total = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        total.update(memoryview(flat.view(torch.uint8).numpy()))
    return total.hexdigest()


def load_extractor(given: str, weights: str | None, device: torch.device) -> Extractor | None:
    """The extractor NAME or MODULE:NAME; weights: a file, or what it finds or downloads itself.

    Returns None, on every process, if the default, Inception, has no weights here: said in one
    line. Raises UserError on an unknown name, and on weights that are missing or another network's.
    """
    name, path = registered_name(given), weights
    if name == INCEPTION and path is None:
        path = published_weights()
        _, problem = _one_a_node_first(_download_inception_weights)
        if problem:
            dist.print_main(
                f"FID and IS are not computed: no Inception weights from the network ({problem}); "
                f"put torch-fidelity's {WEIGHTS_FILE} at {path} or name it with --inception_weights"
            )
            return None
    if path is not None:
        load_tensors(path, "--inception_weights")  # torch-fidelity would unpickle it unchecked
        return Extractor(name, Path(path), device)
    extractor, problem = _one_a_node_first(lambda: Extractor(name, None, device))
    if problem:
        remedy = "name a file of them with --inception_weights"
        raise UserError(f"--feature_extractor {name} finds no weights ({problem}); {remedy}")
    return extractor


def published_weights() -> Path:
    """Where torch-fidelity keeps the Inception weights it downloads."""
    return Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_FILE


def _download_inception_weights() -> None:
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
    """What build returns, and the first problem of any process.

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
    return built, next(filter(None, dist.gather_objects(problem)), None)


def registered_name(given: str) -> str:
    """The name in NAME or MODULE:NAME, known to torch-fidelity once MODULE is imported."""
    module, _, name = given.rpartition(":")
    if module:
        if "" not in sys.path:  # a console command, or a script of another folder
            sys.path.append("")
        try:
            importlib.import_module(module)
        except (ImportError, TypeError) as error:  # TypeError: a relative name
            problem = f"cannot import {module!r} ({error})"
            raise UserError(f"--feature_extractor {given}: {problem}") from error
    if name not in _networks():
        raise UserError(
            f"--feature_extractor {given}: torch-fidelity knows no {name!r}, only "
            f"{', '.join(_networks())}; name your own as MODULE:NAME"
        )
    return name


def metric_layers(name: str) -> dict[str, str]:
    """The layer of each metric, as torch-fidelity chooses it."""
    network, layers = _networks()[name], {}
    for metric in METRICS:
        with suppress(KeyError):  # a network without, say, logits
            layers[metric] = network.get_default_feature_layer_for_metric(metric)
    return {metric: layer for metric, layer in layers.items() if layer is not None}


def _networks() -> dict[str, type]:
    """By name; imported when they are asked for, which takes seconds."""
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    import util.evaluation.networks  # noqa: F401  registers ours

    return FEATURE_EXTRACTORS_REGISTRY


def _create(name: str, layers: list[str], weights: Path | None) -> nn.Module:
    from torch_fidelity.utils import create_feature_extractor

    path = str(weights) if weights is not None else None
    try:
        return create_feature_extractor(
            name, layers, cuda=False, feature_extractor_weights_path=path, verbose=False
        )
    except (RuntimeError, KeyError, ValueError, NotImplementedError, AttributeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        message = f"--inception_weights {path}: not the weights of {name} ({first})"
        raise UserError(message) from error
