"""Settings of the pages that `make docs` builds with Sphinx."""

import sys
import warnings
from importlib.metadata import version as version_of
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
# Progress bars and hints of the examples' small fits are not for readers.
warnings.filterwarnings("ignore", category=UserWarning, module="armed_pyro")

project = "armed_pyro"
author = "armed_pyro authors"
version = release = version_of("armed_pyro")

extensions = [
    "run_examples",
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
html_title = "armed_pyro"
html_theme = "pydata_sphinx_theme"
html_theme_options = {"show_toc_level": 2, "navigation_with_keys": False}
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_copy_source = False
html_show_sourcelink = False

exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
# Names in single quotation marks are names of the library where there are such, else code.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_numpy_docstring, napoleon_google_docstring = True, False
napoleon_use_ivar = True
