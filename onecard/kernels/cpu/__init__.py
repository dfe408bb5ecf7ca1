"""The C++ backend for CPUs: csrc/, called through ctypes."""
