"""The site: `make site` builds it into site/, with warnings as errors."""

from importlib.metadata import version as version_of

project = "segpipe"
author = "The segpipe authors"
version = release = version_of("segpipe")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_click"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
napoleon_google_docstring = False
autodoc_typehints = "signature"
html_theme = "furo"
html_title = "segpipe"
html_show_sphinx = False
html_show_copyright = False
