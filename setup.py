"""The compiled part, which is left out where there is no C compiler; everything else is in pyproject.toml."""

import numpy
from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "deisa.ray._transport._lane",
            ["src/deisa/ray/_transport/_lane.c"],
            include_dirs=[numpy.get_include()],
            optional=True,
        )
    ]
)
