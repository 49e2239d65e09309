"""The compiled part, which is left out where there is no C compiler; everything else is in pyproject.toml."""

from pathlib import Path

import numpy
from setuptools import Extension, setup

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
    ]
)
