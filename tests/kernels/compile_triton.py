"""Compile each Triton kernel for each target without a GPU and print its spills and its shared memory.

python -m tests.kernels.compile_triton         the largest case of each kernel
python -m tests.kernels.compile_triton --all   of each dtype, too
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from onecard.kernels.reference import Rates
from onecard.kernels.triton.adamw import adamw_8bit_kernel
from onecard.kernels.triton.blockwise import WEIGHTS_A_PROGRAM, dequantize_kernel, quantize_kernel
from onecard.kernels.triton.cross_entropy import BLOCK, NUM_WARPS, cross_entropy_kernel
from onecard.kernels.triton.elementwise import (
    rms_norm_backward_kernel,
    rms_norm_kernel,
    rope_kernel,
    rope_launch,
    row_launch,
    swiglu_backward_kernel,
    swiglu_kernel,
)
from onecard.kernels.triton.product import LARGEST_M, ONE_ROW, ROWS, row_kernel, rows_kernel

TARGETS = (80, 86, 89, 90, 100)
LARGEST_SHARED = 99 << 10  # bytes of a program on the smallest of them, 86 and 89
SIZES = {"BLOCKSIZE": 64, "NESTED": True, "NESTED_BLOCKSIZE": 256}
SCALES = {"absmax": "*u8", "nested_absmax": "*fp32", "dynamic": "*fp32", "offset": "*fp32", "levels": "*fp32"}


def cases():
    """(kernel, types of its arguments, constants); the last of each kernel is its largest."""
    for dtype in ("*bf16", "*fp16", "*fp32"):
        codes = {"bounds": "*fp32", "order": "*i32", "packed": "*u8", "absmax": "*fp32", "num_weights": "i64"}
        yield quantize_kernel, {"W": dtype, **codes}, {"BLOCKSIZE": 64, "BLOCKS": WEIGHTS_A_PROGRAM["quantize"] // 64}
        yield (
            dequantize_kernel,
            {"packed": "*u8", **SCALES, "out": dtype, "num_weights": "i64", "num_bytes": "i64"},
            {**SIZES, "BLOCKS": WEIGHTS_A_PROGRAM["dequantize"] // 64},
        )
    for dtype in ("*bf16", "*fp16", "*fp32"):
        lora = {"xA": dtype, "lora_B": "*fp32", "scaling": "fp32"}
        sizes = {"M": "i32", "N": "i32", "R": "i32"}
        for rank in (0, 128):
            constants = {**SIZES, "K": 2048, "RANK": rank}
            types = {"x": dtype, "packed": "*u8", **SCALES, **lora, "y": "*fp32", **sizes}
            yield row_kernel, types, constants | ONE_ROW
            blocks = {"LARGEST_M": LARGEST_M, **ROWS[4 if dtype == "*fp32" else 2]}
            yield rows_kernel, types, constants | blocks
    for kernel, D in ((rms_norm_kernel, 4096), (rms_norm_backward_kernel, 16384)):
        names = ("grad_y", "x", "delta", "w", "total", "y", "grad_total", "grad_x")
        types = {**{name: "*bf16" for name in names}, "rstd": "*fp32", "eps": "fp32"}
        for adds in (False, True):
            yield kernel, types, {"ADDS": adds, **row_launch(D)}
    for kernel in (swiglu_kernel, swiglu_backward_kernel):
        types = {name: "*bf16" for name in ("grad_y", "gate", "up", "y", "grad_gate", "grad_up")}
        yield kernel, {**types, "size": "i64"}, {"BLOCK": 1024}
    for back in (False, True):
        types = {name: "*bf16" for name in ("x", "cos", "sin", "y")}
        yield rope_kernel, {**types, "H": "i32", "P": "i32"}, {**rope_launch(32, 128), "BACK": back}
    row = {"z": "*bf16", "target": "*i64", "losses": "*fp32"}
    yield cross_entropy_kernel, row, {"V": 128256, "BLOCK": BLOCK, "num_warps": NUM_WARPS}
    tables = {"addresses": "*i64", "sizes": "*i64", "owners": "*i32", "starts": "*i64"}
    maps = {name: "*fp32" for name in ("m_map", "m_bounds", "v_map", "v_bounds")}
    rates = {name: "fp32" for name in Rates._fields}
    yield adamw_8bit_kernel, {**tables, **maps, **rates}, {"BLOCKSIZE": 256, "BLOCKS": 4}


def spills(compiled) -> int:
    """Bytes of registers stored to memory, read from the machine code."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"STACK:(\d+)", usage.stdout + usage.stderr)
    assert found, usage
    return int(found[1])


def main(every: bool) -> int:
    failed = False
    largest = {case[0]: case for case in cases()}
    for kernel, types, constants in cases() if every else largest.values():
        for target in TARGETS:
            signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
            fixed = {name: value for name, value in constants.items() if name in kernel.arg_names}
            options = {name: value for name, value in constants.items() if name not in kernel.arg_names}
            source = ASTSource(fn=kernel, signature=signature, constexprs=fixed)
            compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
            found, shared = spills(compiled), compiled.metadata.shared
            failed |= found > 0 or shared > LARGEST_SHARED
            print(
                f"sm_{target} {kernel.__name__} {next(iter(types.values()))}: {found} spills, {shared:,} bytes shared"
            )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main("--all" in sys.argv))
