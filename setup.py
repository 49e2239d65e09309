"""The part in C, which every installation compiles; everything else is in pyproject.toml."""

import shutil
from glob import glob
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy
from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, PlatformError

HANDOFF = "src/deisa/ray/_handoff"
SOURCES = sorted(glob(f"{HANDOFF}/*.c"))
HEADERS = glob(f"{HANDOFF}/*.h")
FLAGS = ["-std=c11", "-Wall", "-Wextra", "-fvisibility=hidden"]

MISSING = "deisa-ray has a part in C, and {what}. {remedy}; or install a wheel of deisa-ray, which is compiled already."
COMPILER = "Install one (Debian and Ubuntu: apt-get install gcc libc6-dev), or name one in CC"
PYTHON_H = "Install them (Debian and Ubuntu: apt-get install python3-dev)"


class CompiledFirst(build):
    """Builds the part in C before anything is copied, so that what is missing for it is the first thing said."""

    sub_commands = sorted(build.sub_commands, key=lambda command: command[0] != "build_ext")


class Compiled(build_ext):
    """Compiles, unless there is nothing to compile with."""

    def build_extensions(self) -> None:
        command = self.compiler.compiler_so[0]
        if shutil.which(command) is None:
            self.fail(f"there is no C compiler: `{command}` is not found", COMPILER)
        if not self.compiles("#include <stdlib.h>"):
            self.fail(f"there is no C compiler: `{command}` does not compile `#include <stdlib.h>`", COMPILER)
        if not self.compiles("#include <Python.h>"):
            self.fail("the headers of Python are missing: Python.h is not found", PYTHON_H)
        super().build_extensions()

    def compiles(self, program: str) -> bool:
        with TemporaryDirectory() as folder:
            source = Path(folder, "program.c")
            source.write_text(f"{program}\n")
            try:
                self.compiler.compile([str(source)], folder)
            except CompileError:
                return False
        return True

    def fail(self, what: str, remedy: str) -> None:
        raise PlatformError(MISSING.format(what=what, remedy=remedy))


setup(
    cmdclass={"build": CompiledFirst, "build_ext": Compiled},
    ext_modules=[
        Extension(
            "deisa.ray._handoff._native",
            SOURCES,
            include_dirs=[numpy.get_include()],
            depends=HEADERS,
            extra_compile_args=FLAGS,
        )
    ],
)
