"""Triton kernels for GPUs (CUDA, ROCm), one file a kernel; the same bits as quant/."""
