"""FID and Inception Score through torch-fidelity's own network and its own arithmetic.

Letters: N images.
Source: Heusel et al., arXiv 1706.08500 (FID); Salimans et al., arXiv 1606.03498 (IS).
"""

import socket
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from util import dist
from util.errors import UserError
from util.files import load_tensors

ADM_STATISTICS = Path("fid_stats/adm_in256_stats.npz")
FEATURES, LOGITS = "2048", "logits_unbiased"
FEATURE_COUNT = 2048
WEIGHTS_FILE = "weights-inception-2015-12-05-6726825d.pth"


def published_weights() -> Path:
    """Where torch-fidelity keeps the Inception weights it downloads."""
    return Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_FILE


def find_inception_weights(given: str | None) -> Path | None:
    """The given file, else the one downloaded earlier, or now by one process of each node; checked.

    Returns None, on every process, if a node has none and cannot download it.
    """
    path = published_weights() if given is None else Path(given)
    if given is None:
        nodes = dist.gather_objects(socket.gethostname())
        if nodes.index(nodes[dist.rank()]) == dist.rank() and not path.is_file():
            _download_inception_weights()
        dist.barrier()
        if not all(dist.gather_objects(path.is_file())):
            return None
    load_tensors(path, "--inception_weights")  # torch-fidelity would unpickle it unchecked
    return path


def _download_inception_weights() -> None:
    """To torch-fidelity's own place, its digest checked. Without a network: absent."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    waiting = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # a firewall that swallows packets must not stop an evaluation
    try:
        torch.hub.load_state_dict_from_url(
            URL_INCEPTION_V3, progress=True, check_hash=True, weights_only=True
        )
    except (OSError, RuntimeError) as error:
        print(f"no Inception weights from the network ({error})", file=sys.stderr, flush=True)
    finally:
        socket.setdefaulttimeout(waiting)


def load_extractor(weights: Path, device: torch.device) -> nn.Module:
    """torch-fidelity's Inception network: uint8 [N, 3, H, W] -> (features, logits)."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        network = FeatureExtractorInceptionV3(
            "inception-v3-compat",
            [FEATURES, LOGITS],
            feature_extractor_weights_path=str(weights),
        )
    except (RuntimeError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"--inception_weights {weights}: not torch-fidelity's Inception network ({first}); "
            f"it needs {WEIGHTS_FILE}"
        ) from error
    return network.to(device)


def load_fid_statistics(path: str | Path) -> dict[str, np.ndarray]:
    """mu [2048] and sigma [2048, 2048], float64, of an npz file as ADM's.

    Raises UserError, naming --fid_stats, on a damaged file or other shapes.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            stats = {key: np.asarray(file[key], dtype=np.float64) for key in ("mu", "sigma")}
    except FileNotFoundError as error:
        raise UserError(f"--fid_stats {path}: no such file") from error
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"--fid_stats {path}: not an npz file with mu and sigma ({error})"
        ) from error
    shapes = {key: value.shape for key, value in stats.items()}
    if shapes != {"mu": (FEATURE_COUNT,), "sigma": (FEATURE_COUNT, FEATURE_COUNT)}:
        raise UserError(f"--fid_stats {path}: shapes {shapes} are not those of Inception features")
    return stats


class Inception:
    """The network and, where they were given, the reference statistics of FID."""

    def __init__(self, weights: Path, stats: dict[str, np.ndarray] | None, device: torch.device):
        self.network = load_extractor(weights, device)
        self.stats, self.device = stats, device

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images: uint8 [N, 3, H, W] -> features [N, 2048] and logits [N, 1008], on the CPU."""
        features, logits = self.network(images.to(self.device))
        return features.cpu(), logits.cpu()


class ImageFeatures:
    """Collects the features of this process's images; computes the metrics of everybody's."""

    def __init__(self, inception: Inception):
        self.inception = inception
        self.ids: list[int] = []
        self.rows: list[tuple[Tensor, Tensor]] = []
        self.gathered, self.sorted = False, None

    def add(self, ids: list[int], images: Tensor) -> None:
        """images: uint8 [N, 3, H, W], numbered by ids."""
        self.ids += ids
        self.rows.append(self.inception(images))

    def compute(self, reference: "ImageFeatures | None" = None) -> dict[str, float]:
        """IS, FID where statistics were given, rFID against a reference.

        On the main process; empty on the others, which only hand over their features.
        """
        from torch_fidelity.metric_isc import isc_features_to_metric

        gathered = [images.gather() for images in (self, reference) if images is not None]
        if not dist.is_main():
            return {}
        features, logits = gathered[0]
        metrics = isc_features_to_metric(logits)
        if self.inception.stats is not None:
            metrics["fid"] = _frechet(features, self.inception.stats)
        if reference is not None:
            metrics["rfid"] = _frechet(features, _statistics(gathered[1][0]))
        return metrics

    def gather(self) -> tuple[Tensor, Tensor] | None:
        """Features and logits in the order of the image numbers, on the main process, once."""
        if not self.gathered:
            self.gathered = True
            parts = dist.gather_to_main((self.ids, self.rows))
            self.sorted = self._sort(parts) if parts is not None else None
        return self.sorted

    @staticmethod
    def _sort(parts: list) -> tuple[Tensor, Tensor]:
        ids = torch.tensor([i for part_ids, _ in parts for i in part_ids])
        rows = [row for _, part_rows in parts for row in part_rows]
        order = ids.argsort()
        features = torch.cat([features for features, _ in rows])
        logits = torch.cat([logits for _, logits in rows])
        return features[order], logits[order]


def _statistics(features: Tensor) -> dict[str, np.ndarray]:
    from torch_fidelity.metric_fid import fid_features_to_statistics

    found = fid_features_to_statistics(features)
    return {key: value.astype(np.float64) for key, value in found.items()}


def _frechet(features: Tensor, stats: dict[str, np.ndarray]) -> float:
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    return next(iter(fid_statistics_to_metric(_statistics(features), stats, False).values()))


def prepare(
    fid_stats: str | None, inception_weights: str | None, device: torch.device, wanted: bool = True
) -> Inception | None:
    """What can be measured here; what cannot is said in one line, with the remedy.

    Files are checked before the first image is made. fid_stats: None takes ADM's if it is there.
    """
    if not wanted:
        return None
    if fid_stats is None and ADM_STATISTICS.is_file():
        fid_stats = str(ADM_STATISTICS)
    stats = load_fid_statistics(fid_stats) if fid_stats is not None else None
    weights = find_inception_weights(inception_weights)
    if weights is None:
        dist.print_main(
            f"FID and IS are not computed: no Inception weights; put torch-fidelity's "
            f"{WEIGHTS_FILE} at {published_weights()} or name it with --inception_weights"
        )
        return None
    if stats is None:
        dist.print_main(
            "FID is not computed: no statistics; put ADM's adm_in256_stats.npz into fid_stats/ "
            "or name an npz file with mu and sigma with --fid_stats"
        )
    return Inception(weights, stats, device)
