"""The documentation as a site: `make site`."""

from cvworker import __version__

project = "cvworker"
version = release = __version__
extensions = ["myst_parser"]
highlight_language = "text"
exclude_patterns = ["benchmarks"]
html_theme = "furo"
html_title = f"cvworker {__version__}"
html_copy_source = False
html_show_copyright = False
myst_heading_anchors = 4  # as GitHub makes them, so that links to headings work in both places
