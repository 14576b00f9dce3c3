"""The variants of a work: fast, plain, single switches of benchmarks/plain.py, compiled."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from benchmarks.plain import SWITCHES, Parts, plain
from benchmarks.work import FAST, PLAIN, Settings, Variant
from models.tokenbridge import TokenBridge
from util.device import compile_model

COMPILED = "compiled (--compile)"


def variants(
    settings: Settings,
    run: Callable[[str], Callable[[], object]],
    parts: Parts,
    whole: Sequence[str],
    single: Sequence[str] = (),
    around: Callable[[], AbstractContextManager] | None = None,
) -> list[Variant]:
    """Fast and, with all of `whole` switched, plain in each precision; the single switches in the
    last one; compiled ones with --compile. run: of a precision's name. around: what holds in all.
    """

    @contextmanager
    def switched(*names: str):
        with ExitStack() as stack:
            if around is not None:
                stack.enter_context(around())
            stack.enter_context(plain(parts, *names))
            yield

    def variant(name: str, precision: str, *names: str) -> Variant:
        return Variant(name, precision, run(precision), partial(switched, *names))

    found = [variant(FAST, precision) for precision in settings.precisions]
    if settings.switches:
        found += [variant(PLAIN, precision, *whole) for precision in settings.precisions]
        last = settings.precisions[-1]
        found += [variant(SWITCHES[name].text, last, name) for name in single]
    if settings.compile and parts.model is not None and single:
        compiled = Compiled(parts.model, settings.device)
        for precision in settings.precisions:
            fast = variant(COMPILED, precision)
            found.append(replace(fast, around=partial(both, compiled, fast.around), warm_up=True))
    return found


@contextmanager
def both(*contexts: Callable[[], AbstractContextManager]):
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context())
        yield


class Compiled:
    """torch.compile of a model's blocks, which can be switched on and off without a new graph."""

    def __init__(self, model: TokenBridge, device: torch.device):
        self.model, self.device = model, device
        self.calls: dict[nn.Module, Callable] = {}

    @contextmanager
    def __call__(self):
        if not self.calls:
            compile_model(self.model, self.device)
            found = ((m, m._compiled_call_impl) for m in self.model.modules())
            self.calls = {module: call for module, call in found if call is not None}
        for module, call in self.calls.items():
            module._compiled_call_impl = call
        try:
            yield
        finally:
            for module in self.calls:
                module._compiled_call_impl = None
