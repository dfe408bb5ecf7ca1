"""Which dtypes this CPU multiplies natively: elsewhere a 16-bit matrix product is up to 400 times slower."""

from __future__ import annotations

from functools import cache

import torch

NATIVE_FLAGS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "sve_bf16", "bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16"),
}


@cache
def product_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """The dtype to multiply in: `dtype`, or float32 on a CPU without instructions for a 16-bit one."""
    if device_type != "cpu" or dtype not in NATIVE_FLAGS:
        return dtype
    flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return dtype if any(flags.get(flag) for flag in NATIVE_FLAGS[dtype]) else torch.float32
