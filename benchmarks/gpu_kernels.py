"""Each kernel of a GPU, timed inside a CUDA graph, against the speed of one large copy or of a 16-bit product.

python -m benchmarks.gpu runs it; `--sections kernels` alone. A graph leaves the host out: calls by themselves wait for
it. Before each call the graph writes a buffer larger than the caches; a graph of these writes alone is subtracted. A
call that a graph cannot hold, because it waits for the device, is timed by itself, and the table says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch

from benchmarks.gpu_steps import RANK, clock, wait

CALLS, ROUNDS = 10, 7  # of a graph; replays of it
FLUSH_BYTES, COPY_BYTES = 256 << 20, 1 << 30
ROW_COUNTS = (1, 4, 16, 64)


class Timer:
    """Times calls on a device, and knows the speed of a copy there, in bytes read and written a second."""

    def __init__(self, device: torch.device, num_bytes: int = COPY_BYTES):
        self.device = device
        self.flushed = torch.empty(FLUSH_BYTES if device.type == "cuda" else 1, dtype=torch.uint8, device=device)
        self.flush_seconds = self.seconds(lambda: None)[0] if device.type == "cuda" else 0.0
        source = torch.empty(num_bytes if device.type == "cuda" else 1 << 20, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        self.copy_speed = 2 * source.nbytes / self.seconds(lambda: target.copy_(source))[0]

    def seconds(self, call: Callable[[], object]) -> tuple[float, bool]:
        """Return the seconds of a call, and whether it was in a graph."""
        if self.device.type != "cuda":
            return clock(call, self.device, 1, 1), False
        try:
            return self.in_graph(call), True
        except RuntimeError:
            torch.cuda.synchronize(self.device)
            return clock(call, self.device, 30, 3), False

    def in_graph(self, call: Callable[[], object]) -> float:
        from onecard.kernels.cuda_graph import forbid_device_sync, on_side_stream, record_graph

        stream = torch.cuda.Stream(self.device)
        with on_side_stream(stream):
            call()  # compiles, and builds tables
            with forbid_device_sync():
                call()

        def calls() -> None:
            for _ in range(CALLS):
                self.flushed.zero_()
                call()

        recording, times = record_graph(calls, stream), []
        for _ in range(ROUNDS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            recording.replay()
            end.record()
            wait(self.device)
            times.append(begin.elapsed_time(end) / 1e3 / CALLS)
        return max(median(times) - getattr(self, "flush_seconds", 0.0), 1e-9)


def of_shape(timer: Timer, N: int, K: int) -> Iterator[dict[str, Any]]:
    """Yield the time of each kernel for a weight (N, K), ours and bitsandbytes', as a share of its floor."""
    device = timer.device
    for name, call, floor in [*our_calls(timer, N, K), *peer_calls(timer, N, K)]:
        with torch.no_grad():
            seconds, in_graph = timer.seconds(call)
        row = {"kernel": f"{name}, {N}x{K}", "us": seconds * 1e6, "of_floor": floor / seconds, "in_graph": in_graph}
        yield row | {"in_graph": in_graph or device.type != "cuda"}


def our_calls(timer: Timer, N: int, K: int) -> list[tuple[str, Callable[[], object], float]]:
    """Return each kernel's name, call, and least seconds."""
    from onecard.kernels import elementwise, ops
    from onecard.kernels.backend import backend
    from onecard.kernels.reference import Rates
    from onecard.quant.dynamic import zeros_8bit
    from onecard.quant.state import PackedWeight

    device = timer.device

    def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    def moved(num_bytes: int) -> float:
        return num_bytes / timer.copy_speed

    W, copy = random(N, K), random(N, K)
    packed, state = ops.quantize_4bit(W)
    weight, stored = PackedWeight.of(packed, state), packed.nbytes + state.nbytes
    logits, target = random(512, 32000), torch.randint(0, 32000, (512,), device=device)
    x, norm, gate, up = random(512, K), random(K), random(512, N), random(512, N)
    A, B = random(RANK, K, dtype=torch.float32), random(N, RANK, dtype=torch.float32)
    heads, angles = random(1, 512, 32, 128).transpose(1, 2), random(1, 512, 128)
    w, g = random(N, K, dtype=torch.float32), random(N, K, dtype=torch.float32)
    states = (*zeros_8bit(w.numel(), device, True), *zeros_8bit(w.numel(), device, False))
    rates = Rates.of(9, 1e-4, (0.9, 0.999), 1e-8, 0.0)
    codec = backend(device).codec
    found: list[tuple[str, Callable[[], object], float]] = [
        ("quantize", lambda: ops.quantize_4bit(W), moved(W.nbytes + stored)),
        ("dequantize, reused buffer", lambda: codec.dequantize_into(weight, copy), moved(stored + W.nbytes)),
        ("cross-entropy 512 x 32000", lambda: ops.cross_entropy_(logits, target), moved(3 * logits.nbytes)),
        ("RMSNorm, 512 rows", lambda: elementwise.rms_norm(x, norm, 1e-5), moved(2 * x.nbytes)),
        ("SwiGLU, 512 rows", lambda: elementwise.swiglu(gate, up), moved(3 * gate.nbytes)),
        ("rotary positions, 512 x 32 heads", lambda: elementwise.rope(heads, angles, angles), moved(2 * heads.nbytes)),
        ("AdamW, 8-bit states", lambda: ops.adamw_8bit_([(w, g, *states)], rates), moved(3 * w.nbytes + 4 * w.numel())),
    ]
    for M in ROW_COUNTS:
        y = random(M, K)
        found.append((f"product of {M} rows", lambda y=y: ops.qlora_linear(y, packed, state), moved(stored)))
        with_lora = lambda y=y: ops.qlora_linear(y, packed, state, None, A, B, 2.0)  # noqa: E731
        found.append((f"product of {M} rows with LoRA", with_lora, moved(stored + A.nbytes + B.nbytes)))
        found.append((f"torch's product of {M} rows in 16 bits", lambda y=y: y @ W.T, moved(W.nbytes)))
    for M in (512, 2048):
        y = random(M, K)
        plain, _ = timer.seconds(lambda y=y: y @ W.T)
        with_lora = lambda y=y: ops.qlora_linear(y, packed, state, None, A, B, 2.0)  # noqa: E731
        found.append((f"dequantize, product and LoRA of {M} rows", with_lora, plain))
    return found


def peer_calls(timer: Timer, N: int, K: int) -> list[tuple[str, Callable[[], object], float]]:
    """Return bitsandbytes' calls with the floors of ours, if it is installed."""
    try:
        import bitsandbytes
        import bitsandbytes.functional as functional
    except ImportError:
        return []
    W = torch.randn(N, K, device=timer.device, dtype=torch.bfloat16)
    packed, state = functional.quantize_4bit(W, quant_type="nf4", compress_statistics=True)
    stored = packed.nbytes + N * K // 64 + N * K // 64 // 256 * 4
    found: list[tuple[str, Callable[[], object], float]] = [
        ("bitsandbytes quantize", lambda: functional.quantize_4bit(W, quant_type="nf4", compress_statistics=True),
         (W.nbytes + stored) / timer.copy_speed),
        ("bitsandbytes dequantize", lambda: functional.dequantize_4bit(packed, state),
         (W.nbytes + stored) / timer.copy_speed),
    ]  # fmt: skip
    for M in ROW_COUNTS:
        x = torch.randn(M, K, device=timer.device, dtype=torch.bfloat16)
        call = lambda x=x: bitsandbytes.matmul_4bit(x, packed.t(), quant_state=state)  # type: ignore  # noqa: E731
        found.append((f"bitsandbytes product of {M} rows", call, stored / timer.copy_speed))
    return found
