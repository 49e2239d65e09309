"""The compiled part, which is left out where there is no C compiler; everything else is in pyproject.toml."""

import numpy
from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            f"deisa.ray._transport.{name}",
            [f"src/deisa/ray/_transport/{name}.c"],
            include_dirs=[numpy.get_include()],
            optional=True,
        )
        for name in ("_lane", "_ending")
    ]
)
