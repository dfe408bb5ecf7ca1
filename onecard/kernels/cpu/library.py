"""The library of C++ kernels (csrc/) and its calls. It chooses AMX, AVX-512, AVX2, NEON or plain code at run time.

It is built with the package (setup.py) and loaded with ctypes. Without a compiler it is not built: then `library()` is
None, the reference backend replaces it, and one line on standard error says so.
"""

from __future__ import annotations

import ctypes
import os
import sys
from ctypes import c_char_p, c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from onecard.config import NESTED_BLOCKSIZE
from onecard.errors import UserError
from onecard.kernels.reference import Rates
from onecard.quant.dynamic import STATE_BLOCKSIZE

# If one of these is set, the user has chosen what libgomp's idle threads do.
WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


class Attention(ctypes.Structure):
    """struct Attention of csrc/kernels.h."""

    _fields_ = (
        ("dtype", c_int), ("T", c_int64), ("H", c_int64), ("H_kv", c_int64), ("D", c_int64), ("window", c_int64),
        ("scale", c_float), ("q", c_void_p), ("k", c_void_p), ("v", c_void_p),
        ("q_head", c_int64), ("q_token", c_int64), ("k_head", c_int64), ("k_token", c_int64),
        ("v_head", c_int64), ("v_token", c_int64), ("out", c_void_p), ("lse", c_void_p),
        ("grad_out", c_void_p), ("grad_q", c_void_p), ("grad_k", c_void_p), ("grad_v", c_void_p),
        ("sum_k", c_void_p), ("sum_v", c_void_p),
    )  # fmt: skip


class AdamW8bit(ctypes.Structure):
    """struct AdamW8bit of csrc/kernels.h."""

    _fields_ = (
        ("size", c_int64),
        *((name, c_void_p) for name in ("w", "grad", "m_codes", "m_absmax", "v_codes", "v_absmax")),
        *((name, c_void_p) for name in ("m_map", "m_bounds", "v_map", "v_bounds")),
        *((name, c_float) for name in Rates._fields),
    )


class Linear(ctypes.Structure):
    """struct Linear of csrc/kernels.h."""

    _fields_ = (
        ("M", c_int64), ("N", c_int64), ("K", c_int64), ("R", c_int64), ("x", c_void_p), ("x_lora", c_void_p),
        ("bias", c_void_p), ("lora_dtype", c_int), ("A", c_void_p), ("B", c_void_p), ("scaling", c_float),
        ("xA", c_void_p), ("y", c_void_p), ("grad_y", c_void_p), ("grad_x", c_void_p), ("grad_x_lora", c_void_p),
        ("grad_A", c_void_p), ("grad_B", c_void_p),
    )  # fmt: skip


# csrc/kernels.h must have the same values.
CONSTANTS = {
    "interface": 3,  # raise it with any change of a function's arguments or of a structure's fields
    "sizeof Attention": ctypes.sizeof(Attention),
    "sizeof AdamW8bit": ctypes.sizeof(AdamW8bit),
    "sizeof Linear": ctypes.sizeof(Linear),
    "nested block": NESTED_BLOCKSIZE,
    "state block": STATE_BLOCKSIZE,
}
_SCALES = (*[c_void_p] * 6, c_int)  # packed, absmax, nested_absmax, its map, offset, the levels, whether shifted
SIGNATURES: dict[str, tuple] = {
    "onecard_constant": (c_int64, c_char_p),
    "onecard_isa": (c_char_p,), "onecard_set_isa": (c_int, c_char_p), "onecard_set_gomp": (None, c_void_p),
    "onecard_watch_contention": (None,), "onecard_set_contended": (None, c_int), "onecard_contended": (c_int,),
    "onecard_allow_gathering": (None, c_int),
    "onecard_quantize": (c_int, c_void_p, c_int, c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_void_p, c_int),
    "onecard_dequantize": (None, *_SCALES, c_int64, c_int64, c_void_p, c_int, c_int),
    "onecard_product": (
        c_int, *_SCALES, c_int64, c_int64, c_int64, c_void_p, c_int, c_int64, c_void_p, c_int,
    ),
    "onecard_has_linear": (c_int, c_int),
    "onecard_linear": (c_int, *_SCALES, c_int64, c_void_p, c_int),
    "onecard_cross_entropy": (None, c_void_p, c_int, c_int64, c_int64, c_void_p, c_void_p, c_int),
    "onecard_rms_norm": (None, *[c_void_p] * 6, c_int, c_int64, c_int64, c_float, c_int),
    "onecard_rms_norm_backward": (None, *[c_void_p] * 6, c_int, c_int64, c_int64, c_int),
    "onecard_swiglu": (None, *[c_void_p] * 3, c_int, c_int64, c_int),
    "onecard_swiglu_backward": (None, *[c_void_p] * 5, c_int, c_int64, c_int),
    "onecard_rope": (None, *[c_void_p] * 4, c_int, c_int64, c_int64, c_int64, c_int64, c_int, c_int),
    "onecard_dense_product": (None, c_void_p, c_void_p, c_int, c_int64, c_int64, c_int64, c_void_p, c_int),
    "onecard_adamw_8bit": (None, c_void_p, c_int),
    "onecard_round_columns": (
        None, *[c_void_p] * 4, c_int64, c_int64, c_void_p, c_void_p, c_int, c_void_p, c_void_p, c_int,
    ),
    "onecard_choose_scales": (
        None, c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int, c_void_p, c_int64, c_void_p, c_int,
    ),
    "onecard_first_fit": (c_int64, c_void_p, c_int64, c_int64, c_void_p, c_int64, c_void_p, c_int),
    "onecard_attention": (c_int, c_void_p, c_void_p, c_int64, c_int),
}  # fmt: skip


def built_library() -> Path | None:
    """Return the library's file, or None if it was not built."""
    found = Path(__file__).with_name("_native.so")
    return found if found.is_file() else None


@cache
def library() -> ctypes.CDLL | None:
    """Return the loaded library, or None if it was not built.

    ONECARD_ISA forces a path: amx, avx512_bf16, avx512, avx2, neon or scalar.

    Raises:
        UserError: this CPU or this build does not have that path; the library and this file differ in version.
    """
    found = built_library()
    if found is None:
        print("onecard: built without its C++ kernels (no compiler was found); the CPU is slower so", file=sys.stderr)
        return None
    loaded = ctypes.CDLL(str(found))
    for name, (result, *arguments) in SIGNATURES.items():
        try:
            function = getattr(loaded, name)
        except AttributeError:
            raise stale(found, f"no function {name}") from None
        function.restype, function.argtypes = result, arguments
    for name, expected in CONSTANTS.items():
        if (value := loaded.onecard_constant(name.encode())) != expected:
            raise stale(found, f"{name} is {value}, not {expected}")
    gomp_parallel = torch_gomp_parallel()
    loaded.onecard_set_gomp(gomp_parallel)
    if gomp_parallel and not any(name in os.environ for name in WAITING):
        loaded.onecard_watch_contention()
    wanted = os.environ.get("ONECARD_ISA")
    if wanted and not loaded.onecard_set_isa(wanted.encode()):
        must = "ONECARD_ISA must name an instruction set that this CPU and this build have"
        do = f"unset it ({loaded.onecard_isa().decode()} is the widest), or name a narrower one"
        raise UserError(must, wanted, do, "ONECARD_ISA")
    return loaded


def stale(path: Path, found: str) -> UserError:
    must = "the C++ kernels must be of this version of onecard"
    return UserError(must, found, "install onecard again; in a clone: python setup.py build_ext --inplace", str(path))


def torch_gomp_parallel() -> int | None:
    """Return the address of GOMP_parallel in torch's OpenMP runtime, so that our kernels use torch's threads.

    It is looked up in torch's own library, because a process may have a second runtime (sentencepiece brings one). None
    if torch has no such runtime.
    """
    try:
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return ctypes.cast(torch_cpu.GOMP_parallel, c_void_p).value
    except (OSError, AttributeError):
        return None


def call(name: str, *arguments: object) -> int:
    """Call a kernel with the addresses of contiguous tensors and this process's thread count.

    Raises:
        MemoryError: the kernel cannot allocate its working memory.
    """
    native = library()
    assert native is not None
    assert all(x.is_contiguous() for x in arguments if isinstance(x, Tensor)), name
    plain = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
    result = getattr(native, name)(*plain, torch.get_num_threads())
    if result == -1:
        raise MemoryError(f"{name} found no memory to work in")
    return result
