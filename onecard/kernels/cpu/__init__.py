"""The C++ backend for CPUs: csrc/ behind ctypes."""
