"""The compiled part, which is left out where there is no C compiler; everything else is in pyproject.toml."""

import numpy
from setuptools import Extension, setup

from pathlib import Path

HANDOFF = Path("src/deisa/ray/_handoff")

setup(
    ext_modules=[
        Extension(
            "deisa.ray._handoff._native",
            sorted(map(str, HANDOFF.glob("*.c"))),
            include_dirs=[numpy.get_include()],
            extra_compile_args=[
                "-std=c11",
                "-Wall",
                "-Wextra",
                "-Wno-unused-parameter",
                "-fvisibility=hidden",
            ],
        ),
        Extension("deisa.ray._transport._ending", ["src/deisa/ray/_transport/_ending.c"], optional=True),
    ]
)
