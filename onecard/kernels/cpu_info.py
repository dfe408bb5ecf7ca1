"""The arithmetic of a device: the dtypes that a CPU multiplies natively (a 16-bit product is up to 400 times slower on
another CPU), and the instruction sets, on which the last bits of sums depend."""

from __future__ import annotations

from functools import cache

import torch

from onecard.kernels.cpu.library import library

NATIVE_FLAGS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "sve_bf16", "bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16"),
}


@cache
def product_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """Return the dtype to multiply in: `dtype`, or float32 on a CPU without instructions for a 16-bit one."""
    if device_type != "cpu" or dtype not in NATIVE_FLAGS:
        return dtype
    flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return dtype if any(flags.get(flag) for flag in NATIVE_FLAGS[dtype]) else torch.float32


def arithmetic(device: torch.device) -> str:
    """Return the CPU instruction sets of our kernels and torch's, or the GPU's name. Bits may differ between these."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    kernels = library()
    own = "no kernels" if kernels is None else kernels.onecard_isa().decode()
    return f"{own}, torch {torch.backends.cpu.get_cpu_capability()}"
