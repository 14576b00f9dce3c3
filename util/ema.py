"""Exponential moving average of the parameters: ema <- rate * ema + (1 - rate) * parameter."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from models.tokenizers.kl16 import check_layout


class EMA:
    """names, parameters: in the published names and order. The average starts at the parameters."""

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]], rate: float):
        named = list(named_parameters)
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        self.rate = rate
        self.averages = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def update(self, skipped: Tensor | float = 0.0) -> None:
        """skipped: 1 where the step was skipped and nothing changes; 0-d, so that nobody waits."""
        weight = (1 - self.rate) * (1 - skipped)
        for average, parameter in zip(self.averages, self.parameters, strict=True):
            average.lerp_(parameter, weight)  # one pass over both, as no foreach kernel makes it

    def state_dict(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.averages, strict=True))

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """state: every parameter's average by its published name. Raises ValueError on another."""
        check_layout(state, self.state_dict())
        for name, average in zip(self.names, self.averages, strict=True):
            average.copy_(state[name])

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The model holds the averages for a while; storage is exchanged, nothing is copied."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for i, parameter in enumerate(self.parameters):
            self.averages[i], parameter.data = parameter.data, self.averages[i]
