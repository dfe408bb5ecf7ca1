"""Compile each Triton kernel for each target without a GPU, and count its spills, instructions and wide loads.

python -m tests.kernels.compile_triton                  the largest case of each kernel on the FEW targets, as a table
python -m tests.kernels.compile_triton --all            every case and every target
python -m tests.kernels.compile_triton --plain          without what a launch tells of its arguments

The product's own functions launch the kernels, on CPU tensors of real sizes. The launch ends where Triton has compiled,
so the binary is that of a real launch: its constants, its options, and what Triton takes from the arguments (pointers
and integers that 16 divides, integers of 1).
"""

import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.driver import driver

from onecard.kernels.reference import Rates
from onecard.kernels.triton import adamw, blockwise, cross_entropy, elementwise, product
from onecard.quant.state import PackedWeight

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TYPES = {BF16: "bf16", FP16: "fp16", FP32: "fp32", torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64"}
N, K, T = 4096, 4096, 2048


class Target(NamedTuple):
    """A GPU generation.

    Attributes:
        major: of its compute capability, as torch gives it.
        shared: bytes of shared memory that a program may have.
        dtypes: that it computes in, the usual one first.
    """

    gpu: GPUTarget
    major: int
    shared: int
    dtypes: tuple[torch.dtype, ...] = (BF16, FP16, FP32)

    @property
    def name(self) -> str:
        return str(self.gpu.arch) if self.gpu.backend == "hip" else f"sm_{self.gpu.arch}"


TARGETS = [
    Target(GPUTarget("cuda", 75, 32), 7, 64 << 10, (FP16, FP32)),  # it has no bfloat16
    Target(GPUTarget("cuda", 80, 32), 8, 163 << 10),
    Target(GPUTarget("cuda", 86, 32), 8, 99 << 10),
    Target(GPUTarget("cuda", 89, 32), 8, 99 << 10),
    Target(GPUTarget("cuda", 90, 32), 9, 227 << 10),
    Target(GPUTarget("cuda", 100, 32), 10, 227 << 10),
    Target(GPUTarget("cuda", 120, 32), 12, 99 << 10),
    Target(GPUTarget("hip", "gfx942", 64), 9, 64 << 10),
    Target(GPUTarget("hip", "gfx1100", 32), 11, 64 << 10),
]
FEW = ("sm_75", "sm_120", "gfx1100")  # the oldest and the newest of NVIDIA's, and the fewest registers


class Driver:
    """What Triton asks of a GPU before it compiles. The number of the device is that of the target."""

    def __init__(self, number: int):
        self.number = number

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.number].gpu

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int) -> int:
        return 0


class Launched(Exception):
    """A launch, which goes no further."""

    def __init__(self, compiled: Any):
        self.compiled = compiled


def compile_launch(kernel: Any, num_programs: int, *arguments: Any, **constants: Any) -> None:
    """In place of `launch`: compile what it would run."""
    raise Launched(kernel.warmup(*arguments, grid=(num_programs,), **constants))


def compile_plain(kernel: Any, num_programs: int, *arguments: Any, **constants: Any) -> None:
    """Same as `compile_launch`, but Triton is told the types of the arguments only."""
    names = kernel.arg_names
    given = dict(zip([name for name in names if name not in constants], arguments)) | constants
    fixed = {(names.index(p.name),): given[p.name] for p in kernel.params if p.is_constexpr}
    types = {name: "constexpr" if (i,) in fixed else type_of(given[name]) for i, name in enumerate(names)}
    target = driver.active.get_current_target()
    options = {name: value for name, value in constants.items() if name not in names}
    options = make_backend(target).parse_options(options).__dict__
    raise Launched(triton.compile(ASTSource(kernel, types, fixed), target=target, options=options))


def type_of(value: Any) -> str:
    """Return Triton's name for the type of an argument."""
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


@dataclass
class Case:
    """A launch.

    Attributes:
        elements: of a program, or of a step of its loop if it `loops`.
    """

    name: str
    dtype: torch.dtype
    elements: int
    call: Callable[[], Any]
    loops: bool = False

    def compiled(self) -> Any:
        """Return what Triton has compiled for the driver's target."""
        try:
            self.call()
        except Launched as launched:
            return launched.compiled
        raise AssertionError(f"{self.name} was not launched")


def cases_of(target: Target) -> Iterator[Case]:
    """Yield all launches; the last one of each name is the largest."""
    for dtype in reversed(target.dtypes):
        yield from codec_cases(dtype)
        yield from product_cases(dtype, target)
    yield from elementwise_cases(target.dtypes[0])
    states = [empty(4096, dtype=torch.uint8), empty(16)]
    part, rates = (empty(4096), empty(4096), *states, *states), Rates(*[0.5] * len(Rates._fields))
    yield Case("adamw_8bit", FP32, adamw.BLOCKS * 256, partial(adamw.adamw_8bit_, [part], rates))


def codec_cases(dtype: torch.dtype) -> Iterator[Case]:
    W, sizes = empty(N, K, dtype=dtype), blockwise.WEIGHTS_A_PROGRAM
    tail = empty(N * K - 1, dtype=dtype)  # its last block is not whole; fp4's codes do not ascend
    yield Case("quantize_tail", dtype, sizes["quantize"], partial(blockwise.quantize_blocks, tail, "fp4", 64, "W"))
    yield Case("quantize", dtype, sizes["quantize"], partial(blockwise.quantize_blocks, W, "nf4", 64, "W"))
    yield Case("dequantize", dtype, sizes["dequantize"], partial(blockwise.dequantize_into, weight(), W))


def product_cases(dtype: torch.dtype, target: Target) -> Iterator[Case]:
    """Of several rows and ranks: Triton compiles anew for an integer of 1, and for one that 16 divides."""
    several = ((3, 0), (16, 1), (16, 128)) if product.has_tiles(target.major) else ()
    for M, rank in ((1, 0), (1, 1), (1, 128), *several):
        step = product.ONE_ROW if M == 1 else product.row_sizes(dtype.itemsize)
        lora = (empty(M, rank, dtype=dtype), empty(N, rank), 2.0) if rank else None
        call = partial(product.multiply, empty(M, K, dtype=dtype), weight(), lora)
        yield Case("row" if M == 1 else "rows", dtype, step["BLOCK_N"] * step["BLOCK_K"], call, loops=True)


def elementwise_cases(dtype: torch.dtype) -> Iterator[Case]:
    for D, adds in ((576, True), (4096, False), (4096, True), (16384, True)):
        x, w = empty(T, D, dtype=dtype), empty(D, dtype=dtype)
        other = x if adds else None
        if D < 16384:
            yield Case("rms_norm", dtype, D, partial(elementwise.rms_norm, x, other, w, 1e-6))
        yield Case("rms_norm_backward", dtype, D, partial(elementwise.rms_norm_backward, x, x, w, empty(T), other))
    h = empty(T, 8192, dtype=dtype)
    yield Case("swiglu", dtype, elementwise.BLOCK, partial(elementwise.swiglu, h, h))
    yield Case("swiglu_backward", dtype, elementwise.BLOCK, partial(elementwise.swiglu_backward, h, h, h))
    heads = empty(T, 32, 128, dtype=dtype)
    for P, back in ((1, False), (T, True)):
        angles = empty(P, 128, dtype=dtype)
        yield Case("rope", dtype, 32 * 128, partial(elementwise.rope, heads, angles, angles, back))
    z, wanted = empty(8, 128256, dtype=dtype), torch.zeros(8, dtype=torch.int64)
    call = partial(cross_entropy.cross_entropy_, z, wanted)
    yield Case("cross_entropy", dtype, cross_entropy.BLOCK, call, loops=True)


def empty(*shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype)


def weight() -> PackedWeight:
    """Return a weight in NF4 with double quantization."""
    blocks = N * K // 64
    scales = (empty(blocks, dtype=torch.uint8), empty(blocks // 256), empty(1)[0])
    return PackedWeight(empty(N * K // 2, 1, dtype=torch.uint8), *scales, "nf4", 64, [N, K])


class Code(NamedTuple):
    """The machine code of a kernel.

    Attributes:
        spills: bytes of registers stored to memory, a lane.
        places: address of each instruction.
        jumps: address of each jump, and where it goes.
        loads: the number of bytes a lane of each load from global memory.
    """

    spills: int
    places: list[int]
    jumps: list[tuple[int, int]]
    loads: list[int]

    def count(self, loops: bool) -> int:
        """Count all instructions; or those of the largest loop, between a jump back and its goal."""
        bodies = [sum(to <= at <= end for at in self.places) for end, to in self.jumps if to < end]
        return max(bodies, default=len(self.places)) if loops else len(self.places)


def nvidia_code(compiled: Any) -> Code:
    usage = re.search(r"STACK:(\d+)", disassembled(compiled, "-res-usage"))
    assert usage, "cuobjdump does not give the size of the stack"
    found = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", disassembled(compiled, "-sass"), re.MULTILINE)
    lines = [(int(at, 16), text) for at, text in found if not re.search(r"\bNOP\b", text)]
    jumps = [(at, int(to, 16)) for at, text in lines for to in re.findall(r"\bBRA\b.*0x([0-9a-f]+)", text)]
    loads = [re.search(r"\.[US]?(128|64|16|8)\b|$", text) for _, text in lines if re.search(r"\bLDG\b", text)]
    loads = [int(width[1] or 32) // 8 for width in loads if width]  # without a number: 32 bits
    return Code(int(usage[1]), [at for at, _ in lines], jumps, loads)


def disassembled(compiled: Any, flag: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        done = subprocess.run([str(tool), flag, file.name], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


AMD_BYTES = {
    "ubyte": 1,
    "sbyte": 1,
    "u8": 1,
    "i8": 1,
    "ushort": 2,
    "sshort": 2,
    "short": 2,
    "u16": 2,
    "i16": 2,
    "b16": 2,
}
AMD_BYTES |= {"dword": 4, "b32": 4, "dwordx2": 8, "b64": 8, "dwordx3": 12, "b96": 12, "dwordx4": 16, "b128": 16}


def amd_code(compiled: Any) -> Code:
    """Places are numbers of instructions."""
    text = compiled.asm["amdgcn"]
    labels, jumps, loads, number = {}, [], [], 0
    for line in text.splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label[1]] = number
        elif re.match(r"\t[a-z]\w+", line):
            if jump := re.match(r"\ts_c?branch\w*\s+(\.LBB\w+)", line):
                jumps.append((number, jump[1]))
            if load := re.match(r"\t(?:global|buffer|flat)_load_(?:d16_)?(?:hi_)?([a-z0-9]+)", line):
                loads.append(AMD_BYTES[load[1]])
            number += 1
            if line.startswith("\ts_endpgm"):
                last = number
    spills = re.search(r"\.private_segment_fixed_size:\s+(\d+)", text)
    assert spills, "the assembly does not give the size of its private segment"
    return Code(int(spills[1]), list(range(last)), [(at, labels[to]) for at, to in jumps], loads)


def main(every: bool, plain: bool) -> int:
    for module in (adamw, blockwise, cross_entropy, elementwise, product):
        module.launch = compile_plain if plain else compile_launch
    print(
        "| target | kernel | dtype | bytes spilled | shared memory | instructions an element | loads: number x bytes |"
    )
    print("|---|---|---|---|---|---|---|")
    failed = False
    for number, target in enumerate(TARGETS):
        if not every and target.name not in FEW:
            continue
        driver.set_active(Driver(number))
        torch.version.hip = "a build for ROCm" if target.gpu.backend == "hip" else None
        cases = list(cases_of(target))
        for case in cases if every else {case.name: case for case in cases}.values():
            compiled = case.compiled()
            code = nvidia_code(compiled) if target.gpu.backend == "cuda" else amd_code(compiled)
            lanes, shared = compiled.metadata.num_warps * target.gpu.warp_size, compiled.metadata.shared
            each = code.count(case.loops) * lanes / case.elements
            loads = ", ".join(f"{count} x {size}" for size, count in sorted(Counter(code.loads).items(), reverse=True))
            dtype = str(case.dtype).removeprefix("torch.")
            row = (target.name, case.name, dtype, code.spills, f"{shared:,}", f"{each:.1f}", loads)
            print("|", " | ".join(map(str, row)), "|", flush=True)
            failed |= code.spills > 0 or shared > target.shared
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(*(flag in sys.argv for flag in ("--all", "--plain"))))
