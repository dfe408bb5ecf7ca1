"""Exact: the C++ kernels give the reference's bits on every path and at every thread count. Bound from the maths:
the product straight from the codes."""

import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from onecard.errors import UserError
from onecard.kernels import reference
from onecard.kernels.cpu import library as library_module
from onecard.kernels.cpu import native
from onecard.kernels.cpu.library import library
from onecard.quant.blockwise import make_state
from onecard.quant.state import PackedWeight
from tests.forks import Forked, onecard

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1,), (3,), (33,), (7, 65), (64, 192), (100, 300), (4097,)]


ARM = platform.machine() in ("aarch64", "arm64")
PATHS = ["scalar", "neon"] if ARM else ["scalar", "avx2", "avx512", "avx512_bf16", "amx"]


@pytest.fixture(params=PATHS)
def isa(request):
    """Each path that this CPU has, forced."""
    kernels = library()
    if kernels is None:
        pytest.skip("built without a compiler")
    before = kernels.onecard_isa()
    if not kernels.onecard_set_isa(request.param.encode()):
        pytest.skip(f"this CPU has no {request.param}")
    yield request.param
    kernels.onecard_set_isa(before)


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def weights(dtype):
    """Weights of every kind: short blocks, zero blocks, denormals, outliers, ties."""
    generator = torch.Generator().manual_seed(0)
    for shape in SHAPES:
        W = torch.randn(shape, generator=generator) * torch.randn(1, generator=generator).exp()
        if W.numel() > 64:
            W.view(-1)[:40] = 0
            W.view(-1)[50] *= 100
        yield W.to(dtype)
    yield torch.zeros(130, dtype=dtype)
    yield torch.full((128,), 1e-40).to(dtype)
    yield torch.linspace(-1, 1, 961).to(dtype)


def bits(x):
    return x.view(-1).view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int4"])
def test_quantize_is_bit_equal(isa, quant_type, dtype):
    for W in weights(dtype):
        for blocksize in (32, 64, 256, 4096):
            packed, absmax = native.quantize_blocks(W, quant_type, blocksize, "W")
            expected_packed, expected_absmax = reference.quantize_blocks(W, quant_type, blocksize, "W")
            assert torch.equal(packed, expected_packed)
            assert torch.equal(bits(absmax), bits(expected_absmax))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int4", "uint4"])
def test_dequantize_is_bit_equal(isa, quant_type, dtype):
    for W in weights(torch.float32):
        for blocksize in (32, 64, 256, 4096):
            packed, absmax = reference.quantize_blocks(W, quant_type, blocksize, "W")
            nested = make_state(absmax, W.shape, W.dtype, quant_type, blocksize, True)
            for scales in ((absmax, None, None), (nested.absmax, nested.nested_absmax, nested.nested_offset)):
                found, expected = torch.empty(W.shape, dtype=dtype), torch.empty(W.shape, dtype=dtype)
                weight = PackedWeight(packed, *scales, quant_type, blocksize, list(W.shape))
                native.dequantize_into(weight, found)
                reference.dequantize_into(weight, expected)
                assert torch.equal(bits(found), bits(expected))


def test_any_thread_count_gives_the_same_bits(isa, threads):
    W = torch.randn(300, 1024, generator=torch.Generator().manual_seed(0))
    packed, absmax = native.quantize_blocks(W, "nf4", 64, "W")
    expected_packed, expected_absmax = reference.quantize_blocks(W, "nf4", 64, "W")
    assert torch.equal(packed, expected_packed) and torch.equal(absmax, expected_absmax)
    out, weight = torch.empty_like(W), PackedWeight(packed, absmax, None, None, "nf4", 64, [300, 1024])
    native.dequantize_into(weight, out)
    x = torch.randn(3, 1024, generator=torch.Generator().manual_seed(1))
    y = native.multiply(x, weight)
    torch.set_num_threads(1)
    alone = torch.empty_like(W)
    native.dequantize_into(weight, alone)
    assert torch.equal(out, alone)
    assert torch.equal(y, native.multiply(x, weight))


@pytest.mark.parametrize("num_rows", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("K, blocksize", [(64, 32), (64, 64), (192, 32), (576, 64), (2048, 128), (1536, 512)])
def test_product_is_within_its_rounding(isa, num_rows, K, blocksize):
    """float32 sums of K terms: |error| <= (K + 2) 2^-24 sum |x w|, the textbook bound at its first order."""
    generator = torch.Generator().manual_seed(0)
    packed, absmax = reference.quantize_blocks(torch.randn(48, K, generator=generator), "nf4", blocksize, "W")
    state = make_state(absmax, torch.Size((48, K)), torch.float32, "nf4", blocksize, True)
    weight = PackedWeight.of(packed, state)
    W = torch.empty(48, K)
    reference.dequantize_into(weight, W)
    x = torch.randn(num_rows, K, generator=generator)
    exact = x.double() @ W.double().T
    bound = (K + 2) * 2**-24 * (x.double().abs() @ W.double().abs().T)
    assert ((native.multiply(x, weight) - exact).abs() <= bound).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", [0, 77, 129])
def test_not_finite_is_an_error(isa, bad, where):
    W = torch.randn(10, 13)
    W.view(-1)[where] = bad
    with pytest.raises(UserError, match=rf"\[{where // 13}, {where % 13}\]"):
        native.quantize_blocks(W, "nf4", 64, "some.weight")


def test_environment_forces_a_path(checkpoint, tmp_path):
    program = "from onecard.kernels.cpu.library import library; print(library().onecard_isa().decode())"
    if library() is None:
        pytest.skip("built without a compiler")
    environment = {**os.environ, "ONECARD_ISA": "scalar"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "scalar", done.stderr
    wanted = "avx512" if ARM else "neon"  # not this CPU's
    code, _, err = onecard("quantize", "--model", checkpoint, "--output", tmp_path / "q", ONECARD_ISA=wanted)
    assert code == 2 and f"found: {wanted}" in err and "Traceback" not in err, err


@pytest.mark.skipif(library() is None, reason="built without a compiler")
@pytest.mark.parametrize("name, table, entry", [
    ("CONSTANTS", library_module.CONSTANTS, {"sizeof Linear": 8}),
    ("SIGNATURES", library_module.SIGNATURES, {"onecard_of_another_version": (None,)}),
])  # fmt: skip
def test_a_library_of_another_version_is_refused(name, table, entry, monkeypatch):
    """Its structures would be read in other places, without a word."""
    monkeypatch.setattr(library_module, name, {**table, **entry})
    with pytest.raises(UserError, match=r"(?s)_native.*of this version.*install onecard again"):
        library_module.library.__wrapped__()


@pytest.mark.parametrize("num_rows", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("K, blocksize", [(64, 32), (192, 64), (576, 64), (2048, 128)])
def test_product_of_bfloat16_is_within_its_rounding(isa, num_rows, K, blocksize):
    """A weight carries at most one rounding to bfloat16, 2^-9, beside the float32 sum's (K + 2) 2^-24."""
    generator = torch.Generator().manual_seed(0)
    packed, absmax = reference.quantize_blocks(torch.randn(48, K, generator=generator), "nf4", blocksize, "W")
    weight = PackedWeight(packed, absmax, None, None, "nf4", blocksize, [48, K])
    W = torch.empty(48, K)
    reference.dequantize_into(weight, W)
    x = torch.randn(num_rows, K, generator=generator).bfloat16()
    exact = x.double() @ W.double().T
    bound = (2**-9 + (K + 2) * 2**-24) * (x.double().abs() @ W.double().abs().T)
    assert ((native.multiply(x, weight) - exact).abs() <= bound).all()


SECOND_RUNTIME = """
import ctypes, os, shutil, sys
import torch

own = {line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line}
if len(own) != 1:
    sys.exit(print("no libgomp"))
ctypes.CDLL(shutil.copy(own.pop(), sys.argv[1]))  # as sentencepiece's wheel brings one
torch.set_num_threads(2)
torch.randn(1000, 1000) @ torch.randn(1000, 1000)
def threads():
    return [open(f"/proc/self/task/{id}/comm").read().strip() for id in os.listdir("/proc/self/task")]

before = len(threads())
from onecard.kernels import ops
ops.dequantize_4bit(*ops.quantize_4bit(torch.randn(1000, 1000)))
print(len([name for name in threads() if name != "onecard-watch"]) - before)
"""


def test_no_threads_beside_torchs(tmp_path):
    # A second OpenMP runtime in the process must not hide torch's: its idle threads spin, and took half of the CPU.
    command = [sys.executable, "-c", SECOND_RUNTIME, str(tmp_path / "libgomp-second.so.1")]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if found == "no libgomp":
        pytest.skip("this torch has another thread pool")
    assert found == "0"


def no_memory(isa, count):
    """Prints what is said where there is next to no memory left."""
    library().onecard_set_isa(isa.encode())
    torch.set_num_threads(count)
    torch.randn(500, 500) @ torch.randn(500, 500)  # the threads
    T, D, K = 1 << 17, 128, 1 << 20
    q = torch.zeros(2, T, D, dtype=torch.bfloat16)
    out, lse = torch.empty(T, 2, D, dtype=torch.bfloat16), torch.empty(2, T)
    x = torch.zeros(32, K, dtype=torch.bfloat16)
    weight = PackedWeight(torch.zeros(16 * K, 1, dtype=torch.uint8), torch.ones(K // 2), None, None, "nf4", 64, [32, K])
    calls = [lambda: native.attention(q, q, q, [0, T], 1.0, 0, out, lse), lambda: native.multiply(x[:16], weight)]
    if native.has_tiles():
        calls.append(lambda: native.linear(x, weight, None))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (16 << 20), resource.RLIM_INFINITY))
    for call in calls:
        try:
            call()
        except MemoryError as error:
            print(error)


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="limits a process as Linux does")
@pytest.mark.parametrize("count", [1, 2])
def test_no_memory_is_an_error_that_can_be_caught(isa, count):
    code, out, err = Forked(no_memory, isa, count).wait()
    assert code == 0, err
    names = ["attention", "product", "linear"] if isa == "amx" else ["attention", "product"]
    assert out.splitlines() == [f"onecard_{name} found no memory to work in" for name in names]
