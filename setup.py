"""Builds csrc/ into onecard/kernels/cpu/_native.*; everything else is in pyproject.toml.

The library is plain C++17 behind a C interface and needs no header of torch or Python. It is optional: where no
compiler is found, the installation goes on without it.
"""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class BuildNative(build_ext):
    def get_export_symbols(self, ext):
        return []  # no PyInit: it is loaded with ctypes


UNIX = ["-O3", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-Wno-maybe-uninitialized"]
setup(
    ext_modules=[
        Extension(
            "onecard.kernels.cpu._native",
            sources=sorted(str(path) for path in Path("csrc").glob("*.cpp")),
            depends=sorted(str(path) for path in Path("csrc").iterdir()),
            extra_compile_args=["/O2", "/std:c++17"] if sys.platform == "win32" else UNIX,
            extra_link_args=[] if sys.platform == "win32" else ["-pthread"],
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildNative},
)
