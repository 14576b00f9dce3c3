"""What a forward pass keeps for the backward pass, in bytes.

hooks: of the tensors that autograd saves, as torch.autograd.graph.saved_tensors_hooks sees them;
the most at any moment, each storage once, parameters left out.
alive: of all tensors that were made during the forward pass and still exist after it. More than
hooks see: what checkpointing or a custom function keeps by itself, and gradients made in forward.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Kept:
    hooks: int
    alive: int


def kept_for_backward(forward: Callable[[], Tensor], parameters: Iterable[Tensor]) -> Kept:
    """forward: returns the loss. Whatever it uses must exist before."""
    known = {_storage(parameter) for parameter in parameters}
    saved, made = _SavedBytes(known), _Made()
    with made, saved_tensors_hooks(saved.pack, saved.unpack):
        loss = forward()
    kept = Kept(saved.most, made.alive_bytes(known))
    del loss
    return kept


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class _SavedBytes:
    """Counts the storages that autograd holds at the moment; a hook's value dies with its node."""

    def __init__(self, known: set[int]):
        self.known, self.holders = known, Counter()
        self.now = self.most = 0

    def pack(self, tensor: Tensor) -> "_Held | Tensor":
        if _storage(tensor) in self.known:
            return tensor
        return _Held(self, tensor)

    def unpack(self, held: "_Held | Tensor") -> Tensor:
        return held.tensor if isinstance(held, _Held) else held

    def add(self, storage: int, size: int) -> None:
        self.holders[storage] += 1
        if self.holders[storage] == 1:
            self.now += size
            self.most = max(self.most, self.now)

    def remove(self, storage: int, size: int) -> None:
        self.holders[storage] -= 1
        if self.holders[storage] == 0:
            self.now -= size


class _Held:
    def __init__(self, counts: _SavedBytes, tensor: Tensor):
        self.counts, self.tensor = counts, tensor
        self.facts = _storage(tensor), tensor.untyped_storage().nbytes()
        counts.add(*self.facts)

    def __del__(self):
        self.counts.remove(*self.facts)


class _Made(TorchDispatchMode):
    """Remembers the storage of every tensor that an operation returns, without holding it."""

    def __init__(self):
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        return result

    def alive_bytes(self, known: set[int]) -> int:
        found = self.storages.items()
        return sum(size for place, (ref, size) in found if place not in known and not ref.expired())
