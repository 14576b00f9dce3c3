"""The arithmetic of a model: bf16, fp16 or fp32."""

from contextlib import nullcontext
from dataclasses import dataclass

import torch

PRECISIONS = ("auto", "bf16", "fp16", "fp32")


@dataclass(frozen=True)
class Precision:
    """The arithmetic of a model; its weights, an optimizer and an EMA are fp32 in all of them."""

    name: str
    dtype: torch.dtype | None  # of the autocast, None for full precision

    @classmethod
    def of(cls, name: str, device: torch.device) -> "Precision":
        """auto: bf16 where CUDA has it, else fp16; fp32 on a CPU or MPS. Raises ValueError."""
        if name == "auto":
            name = "fp32"
            if device.type == "cuda":
                name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}
        if name not in dtypes:
            raise ValueError(f"precision {name!r} is not one of {', '.join(PRECISIONS)}")
        return cls(name, dtypes[name])

    def autocast(self, device: torch.device):
        return torch.autocast(device.type, dtype=self.dtype) if self.dtype else nullcontext()
