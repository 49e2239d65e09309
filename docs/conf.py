"""Sphinx: `make docs` builds docs/_build/html."""

from importlib.metadata import version as installed_version

project = "deisa-ray"
author = "The deisa-ray developers"
project_copyright = author
release = version = installed_version("deisa-ray")

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
default_role = "py:obj"

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_typehints = "none"  # the numpydoc sections say what each parameter is
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False

html_theme = "furo"
html_title = f"deisa-ray {release}"
html_static_path = ["_static"]
html_css_files = ["page.css"]
html_js_files = ["page.js"]
