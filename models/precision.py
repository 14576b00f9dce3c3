"""The arithmetic that a device should compute in, by name; weights are fp32 in all of them."""

import torch

PRECISIONS = ("auto", "bf16", "fp16", "fp32")


def arithmetic(name: str, device: torch.device) -> tuple[str, torch.dtype | None]:
    """The name without "auto", and the dtype for torch.autocast, None for full precision.

    auto: bf16 where CUDA has it, else fp16; fp32 on a CPU or MPS.
    Raises ValueError on another name.
    """
    if name == "auto":
        name = "fp32"
        if device.type == "cuda":
            name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}
    if name not in dtypes:
        raise ValueError(f"precision {name!r} is not one of {', '.join(PRECISIONS)}")
    return name, dtypes[name]
