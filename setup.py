"""Builds csrc/ into onecard/kernels/cpu/_native.*; everything else is in pyproject.toml.

The library is plain C++17 behind a C interface and needs no header of torch or Python. ctypes loads it, so a wheel fits
every Python 3: its tag is py3-none-<platform>. The library is optional: where no compiler is found, the installation
goes on without it, and a wheel is py3-none-any.
"""

import os
import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

NAME = "onecard.kernels.cpu._native"


class BuildNative(build_ext):
    def get_export_symbols(self, ext):
        return []  # no PyInit: it is loaded with ctypes

    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")) + ".so"  # of no one Python


class Wheel(bdist_wheel):
    def get_tag(self):
        """Called when all is built. On Linux the platform is the glibc that it was built on, or a newer one."""
        self.root_is_pure = not Path(self.get_finalized_command("build_ext").get_ext_fullpath(NAME)).exists()
        if self.root_is_pure:
            return "py3", "none", "any"
        tag = super().get_tag()[2]
        libc, version = platform.libc_ver()
        if libc == "glibc" and tag.startswith("linux_"):
            tag = tag.replace("linux_", f"manylinux_{version.replace('.', '_')}_")
        return "py3", "none", tag


FLAGS = ["-O3", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-Wno-maybe-uninitialized"]
setup(
    ext_modules=[
        Extension(
            NAME,
            sources=sorted(str(path) for path in Path("csrc").glob("*.cpp")),
            depends=sorted(str(path) for path in Path("csrc").iterdir()),
            extra_compile_args=FLAGS,
            extra_link_args=["-pthread"],
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
)
