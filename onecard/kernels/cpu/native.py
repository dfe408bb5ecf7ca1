"""The backend in C++ (csrc/): AVX-512, AVX2, NEON or plain code, chosen at run time, bit-equal to quant/.

The library is built with the package (setup.py) and loaded with ctypes. Without a compiler there is none; then
`library()` is None, the reference backend is taken instead, and a line on standard error says so once.
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
from onecard.kernels import reference
from onecard.kernels.cpu import allocator
from onecard.kernels.reference import Lora
from onecard.quant.blockwise import not_finite
from onecard.quant.codebook import decision_bounds, dynamic_map, quant_map
from onecard.quant.dynamic import STATE_BLOCKSIZE, midpoints
from onecard.quant.state import PackedWeight

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Rows of x up to which the product straight from the codes beats dequantize-and-multiply (benchmarks/kernels.py).
LARGEST_M = {torch.float32: 16, torch.bfloat16: 16, torch.float16: 8}
# Who sets one of these has chosen what libgomp's idle threads do.
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
        *((name, c_float) for name in reference.Rates._fields),
    )


class Linear(ctypes.Structure):
    """struct Linear of csrc/kernels.h."""

    _fields_ = (
        ("M", c_int64), ("N", c_int64), ("K", c_int64), ("R", c_int64), ("x", c_void_p), ("x_lora", c_void_p),
        ("bias", c_void_p), ("lora_dtype", c_int), ("A", c_void_p), ("B", c_void_p), ("scaling", c_float),
        ("xA", c_void_p), ("y", c_void_p), ("grad_y", c_void_p), ("grad_x", c_void_p), ("grad_x_lora", c_void_p),
        ("grad_A", c_void_p), ("grad_B", c_void_p),
    )  # fmt: skip


# What csrc/kernels.h must say, too.
CONSTANTS = {
    "sizeof Attention": ctypes.sizeof(Attention),
    "sizeof AdamW8bit": ctypes.sizeof(AdamW8bit),
    "sizeof Linear": ctypes.sizeof(Linear),
    "nested block": NESTED_BLOCKSIZE,
    "state block": STATE_BLOCKSIZE,
}
_SCALES = (c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p)  # packed, absmax, nested, maps, offset
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
    "onecard_attention": (c_int, c_void_p, c_void_p, c_int64, c_int),
}  # fmt: skip


def built_library() -> Path | None:
    """The library's file; None if it was not built."""
    return next((path for path in Path(__file__).parent.glob("_native.*") if path.suffix in (".so", ".dll")), None)


@cache
def library() -> ctypes.CDLL | None:
    """The loaded library, or None if it was not built.

    ONECARD_ISA forces a path: amx, avx512_bf16, avx512, avx2, neon or scalar.

    Raises:
        UserError: this CPU or this build does not have it; the library is of another version than this file.
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
    """Address of GOMP_parallel in the OpenMP runtime that torch links: its threads are then ours too.

    Looked up through torch's own library, since a process may hold a second runtime (sentencepiece brings one); None
    where torch has no such runtime.
    """
    try:
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return ctypes.cast(torch_cpu.GOMP_parallel, c_void_p).value
    except (OSError, AttributeError):
        return None


def call(name: str, *arguments: object) -> int:
    """Call a kernel, with tensors as their addresses (contiguous ones only) and this process's thread count.

    Raises:
        MemoryError: there is none for what it works in.
    """
    native = library()
    assert native is not None
    assert all(x.is_contiguous() for x in arguments if isinstance(x, Tensor)), name
    plain = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
    result = getattr(native, name)(*plain, torch.get_num_threads())
    if result == -1:
        raise MemoryError(f"{name} found no memory to work in")
    return result


def new(dtype: torch.dtype, *shape: int) -> Tensor:
    """Memory for a kernel to fill, whatever torch's default dtype and device are."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def quantize_blocks(W: Tensor, quant_type: str, blocksize: int, name: str) -> tuple[Tensor, Tensor]:
    """As quant.blockwise.quantize_blocks."""
    flat = W.detach().reshape(-1).contiguous()
    packed = new(torch.uint8, (flat.numel() + 1) // 2, 1)
    absmax = new(torch.float32, -(-flat.numel() // blocksize))
    sizes = (DTYPES[flat.dtype], flat.numel(), blocksize)
    finite = call("onecard_quantize", flat, *sizes, *coding(quant_type), packed, absmax)
    if not finite:
        raise not_finite(flat, W.shape, name)
    return packed, absmax


@cache
def coding(quant_type: str) -> tuple[Tensor, Tensor]:
    """Bounds float32 (15,) and the code of each interval, uint8 (16,)."""
    bounds, order = decision_bounds(quant_type, "cpu")
    return bounds.contiguous(), order.to(torch.uint8)


def weight_tensors(weight: PackedWeight) -> tuple:
    """The arguments by which every kernel reads a weight."""
    maps = dynamic_map("cpu"), weight.nested_offset, quant_map(weight.quant_type, "cpu")
    return weight.codes, weight.absmax, weight.nested_absmax, *maps


def dequantize_into(weight: PackedWeight, out: Tensor) -> None:
    """As reference.dequantize_into."""
    if out.dtype not in DTYPES:
        return reference.dequantize_into(weight, out)
    call("onecard_dequantize", *weight_tensors(weight), out.numel(), weight.blocksize, out, DTYPES[out.dtype])


def can_multiply(x_MK: Tensor, blocksize: int) -> bool:
    """Whether `multiply` takes this x."""
    M, K = x_MK.shape
    return LARGEST_M.get(x_MK.dtype, 0) >= M and K % 64 == 0 and K % blocksize == 0


def multiply(x_MK: Tensor, weight: PackedWeight, lora: tuple[Tensor, Tensor, float] | None = None) -> Tensor:
    """x W^T straight from the codes, float32 (M, N): weights and sums in float32, nothing rounded to x's dtype.

    With lora = (x A^T, B, s) plus s (x A^T) B^T.
    """
    M, (N, K) = len(x_MK), weight.shape
    y_MN = new(torch.float32, M, N)
    sizes = (N, K, weight.blocksize)
    call("onecard_product", *weight_tensors(weight), *sizes, x_MK.contiguous(), DTYPES[x_MK.dtype], M, y_MN)
    if lora is not None:
        y_MN.addmm_(lora[0].float(), lora[1].float().T, alpha=lora[2])
    return y_MN


def tiled_rows() -> int:
    """Rows of x that `linear` copies at a time."""
    native = library()
    assert native is not None
    return native.onecard_constant(b"tiled rows")


def has_tiles() -> bool:
    """Whether this CPU and build have `linear`: AMX."""
    return library() is not None and bool(call("onecard_has_linear"))


def can_fuse(x_MK: Tensor, num_outputs: int, lora: Lora | None = None) -> bool:
    """Whether `linear` and `linear_backward` take this x: bfloat16 on a CPU with tiles (AMX)."""
    whole = x_MK.shape[1] % 32 == 0 and num_outputs % 32 == 0
    dtypes = set() if lora is None else {lora.A_RK.dtype, lora.B_NR.dtype}
    known = len(dtypes) <= 1 and dtypes <= DTYPES.keys()
    return x_MK.dtype == torch.bfloat16 and whole and known and has_tiles()


def linear(
    x_MK: Tensor,
    weight: PackedWeight | Tensor,
    bias: Tensor | None,
    lora: Lora | None = None,
    x_lora_MK: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y = x W^T + bias + s (x_lora A^T) B^T with one rounding, bfloat16 (M, N); and x_lora A^T, bfloat16 (M, R).

    Args:
        weight: (N, K), in 4 bits or in bfloat16.
        x_lora_MK: bfloat16, what A takes; None: x.
    """
    M, (N, K) = len(x_MK), weight.shape
    x_MK, bias = x_MK.contiguous(), None if bias is None else bias.float().contiguous()
    y_MN = allocator.empty((M, N), x_MK.dtype)
    A, B, scaling = contiguous(lora)
    seen = None if lora is None else x_MK if x_lora_MK is None else x_lora_MK.contiguous()
    xA_MR = x_MK.new_empty(0) if A is None else x_MK.new_empty(M, len(A))
    struct = Linear(
        M, N, K, 0 if A is None else len(A), x_MK.data_ptr(), address(seen), address(bias),
        0 if A is None else DTYPES[A.dtype], address(A), address(B), scaling, xA_MR.data_ptr(), y_MN.data_ptr(),
    )  # fmt: skip
    call("onecard_linear", *weight_arguments(weight), ctypes.byref(struct))
    return y_MN, xA_MR


def linear_backward(
    grad_y_MN: Tensor,
    weight: PackedWeight | Tensor,
    needed_grads: list[bool],
    lora: Lora | None = None,
    lora_input_MK: Tensor | None = None,
    xA_MR: Tensor | None = None,
    has_own_lora_input: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Of grad_y (M, N): grad_x (M, K), grad_x_lora (M, K) if has_own_lora_input, float32 grad_A (R, K), grad_B (N, R).

    Args:
        needed_grads: which of the four are wanted; what is not is None.
        lora_input_MK, xA_MR: what A has taken and has given, bfloat16.
        has_own_lora_input: whether x_lora is not x (dropout): its gradient is then an output of its own.
    """
    M, (N, K) = len(grad_y_MN), weight.shape
    grad_y_MN = grad_y_MN.contiguous()
    A, B, scaling = contiguous(lora)
    lora_input_MK = None if lora_input_MK is None else lora_input_MK.contiguous()
    grad_x = allocator.empty((M, K), grad_y_MN.dtype) if needed_grads[0] else None
    grad_x_lora = allocator.empty((M, K), grad_y_MN.dtype) if has_own_lora_input and A is not None else None
    grad_A = new(torch.float32, *A.shape) if A is not None and needed_grads[2] else None
    grad_B = new(torch.float32, *B.shape) if B is not None and needed_grads[3] else None
    struct = Linear(
        M, N, K, 0 if A is None else len(A), None, address(lora_input_MK), None,
        0 if A is None else DTYPES[A.dtype], address(A), address(B), scaling, address(xA_MR), None,
        grad_y_MN.data_ptr(), *[address(x) for x in (grad_x, grad_x_lora, grad_A, grad_B)],
    )  # fmt: skip
    call("onecard_linear", *weight_arguments(weight), ctypes.byref(struct))
    return grad_x, grad_x_lora if needed_grads[1] else None, grad_A, grad_B


def contiguous(lora: Lora | None) -> tuple[Tensor | None, Tensor | None, float]:
    """A and B with dense rows, and s."""
    return (None, None, 1.0) if lora is None else (lora.A_RK.contiguous(), lora.B_NR.contiguous(), lora.scaling)


def weight_arguments(weight: PackedWeight | Tensor) -> tuple:
    """A 4-bit weight's tensors and blocksize, or those of one in bfloat16."""
    if isinstance(weight, Tensor):
        return weight.contiguous(), None, None, None, None, None, 0
    return *weight_tensors(weight), weight.blocksize


def dense_product(x_MK: Tensor, W_NK: Tensor) -> Tensor:
    """x W^T of a contiguous x, summed in float32: (M, N)."""
    M, (N, K) = len(x_MK), W_NK.shape
    y_MN = new(torch.float32, M, N)
    call("onecard_dense_product", W_NK, x_MK, DTYPES[x_MK.dtype], M, N, K, y_MN)
    return y_MN


def address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def cross_entropy_(z_PV: Tensor, target_P: Tensor) -> Tensor:
    """As reference.cross_entropy_."""
    if z_PV.dtype not in DTYPES:
        return reference.cross_entropy_(z_PV, target_P)
    assert target_P.dtype == torch.int64
    losses_P = new(torch.float32, len(target_P))
    call("onecard_cross_entropy", z_PV, DTYPES[z_PV.dtype], *z_PV.shape, target_P, losses_P)
    return losses_P


def rms_norm(x: Tensor, delta: Tensor | None, w: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x + delta, or x itself; y like it, contiguous; and r float32 (rows,)."""
    y, rstd = allocator.empty_like(x), new(torch.float32, x.numel() // x.shape[-1])
    total = x if delta is None else allocator.empty_like(x)
    call("onecard_rms_norm", x, delta, w, total, y, rstd, DTYPES[x.dtype], rstd.numel(), x.shape[-1], eps)
    return total, y, rstd


def rms_norm_backward(grad_y: Tensor, x: Tensor, w: Tensor, rstd: Tensor, grad_total: Tensor | None) -> Tensor:
    grad_x, sizes = allocator.empty_like(x), (DTYPES[x.dtype], rstd.numel(), x.shape[-1])
    call("onecard_rms_norm_backward", grad_y, x, w, rstd, grad_total, grad_x, *sizes)
    return grad_x


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    y = allocator.empty_like(gate)
    call("onecard_swiglu", gate, up, y, DTYPES[y.dtype], y.numel())
    return y


def swiglu_backward(grad_y: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    grad_gate, grad_up = allocator.empty_like(gate), allocator.empty_like(up)
    call("onecard_swiglu_backward", grad_y, gate, up, grad_gate, grad_up, DTYPES[gate.dtype], gate.numel())
    return grad_gate, grad_up


def rope(x_THD: Tensor, cos_PD: Tensor, sin_PD: Tensor, back: bool) -> Tensor:
    """Each token's heads turned by its angles, those of row t modulo P; or `back`."""
    y_THD = allocator.empty_like(x_THD)
    sizes = (DTYPES[x_THD.dtype], *x_THD.shape, len(cos_PD), back)
    call("onecard_rope", x_THD, cos_PD, sin_PD, y_THD, *sizes)
    return y_THD


def attention(
    q_HTD: Tensor,
    k_HTD: Tensor,
    v_HTD: Tensor,
    cu_seqlens: list[int],
    scale: float,
    window: int,
    out_THD: Tensor,
    lse_HT: Tensor,
    grads: tuple[Tensor, ...] | None = None,
) -> None:
    """Fill out_THD and lse_HT; or, with grads = (grad_out, grad_q, parts_k, parts_v, grad_k, grad_v), the last five.

    Args:
        q_HTD (H, T, D), k_HTD and v_HTD (H_kv, T, D): of one dtype, any strides with the last dimension dense.
        out_THD, grad_out, grad_q: (T, H, D) contiguous, q's dtype; lse_HT: (H, T) float32.
        parts_k, parts_v: float32 (H, T, D), a part for each query head; grad_k, grad_v (H_kv, T, D), their sums.
    """
    H, T, D = q_HTD.shape
    strides = [stride for x in (q_HTD, k_HTD, v_HTD) for stride in x.stride()[:2]]
    pointers = [None if x is None else x.data_ptr() for x in grads or (None,) * 6]
    struct = Attention(
        DTYPES[q_HTD.dtype], T, H, k_HTD.shape[0], D, window, scale,
        q_HTD.data_ptr(), k_HTD.data_ptr(), v_HTD.data_ptr(), *strides,
        out_THD.data_ptr(), lse_HT.data_ptr(), *pointers,
    )  # fmt: skip
    boundaries = (c_int64 * len(cu_seqlens))(*cu_seqlens)
    call("onecard_attention", ctypes.byref(struct), boundaries, len(cu_seqlens) - 1)


def adamw_8bit_(parts: list[tuple[Tensor, ...]], rates: reference.Rates) -> None:
    """As reference.adamw_8bit_."""
    maps = [table for signed in (True, False) for table in (dynamic_map("cpu", signed), midpoints("cpu", signed))]
    for w, grad, *states in parts:
        tensors = [w, grad.contiguous(), *states, *maps]
        assert all(x.is_contiguous() for x in tensors)
        struct = AdamW8bit(w.numel(), *[x.data_ptr() for x in tensors], *rates)
        call("onecard_adamw_8bit", ctypes.byref(struct))
