"""Random weights for torch-fidelity's Inception, where the published ones are not at hand."""

from pathlib import Path

import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from benchmarks.plain import swapped


def save_random_inception(path: Path) -> Path:
    """Random weights of torch-fidelity's network, in the form of its own file."""
    torch.manual_seed(0)
    with (  # the constructor wants a file of weights
        swapped(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None),
        swapped(torch, "load", lambda *args, **kwargs: None),
    ):
        network = FeatureExtractorInceptionV3("random", ["2048"], "none")
    for parameter in network.parameters():
        if parameter.ndim > 1:  # the default initialisation forgets the image on its way
            torch.nn.init.kaiming_normal_(parameter)
    network.fc.weight.mul_(50)
    torch.save(network.state_dict(), path)
    return path
