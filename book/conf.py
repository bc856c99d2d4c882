"""How Sphinx builds the book; `make book` calls it. The sources are written by medcook/book."""

from medcook import __version__
from medcook.book.api import as_rest

project = "medcook"
author = "The medcook authors"
copyright = "the medcook authors; figures carry the licence of their data"
release = __version__

extensions = ["myst_nb", "sphinx.ext.autodoc"]
html_theme = "furo"
html_title = "medcook"
html_static_path = ["_static"]
html_css_files = ["book.css"]
html_js_files = ["ledger.js"]
html_copy_source = False
html_show_sourcelink = False

nb_execution_mode = "off"  # what is shown is what was committed
nb_merge_streams = True
myst_heading_anchors = 3

add_module_names = False
toc_object_entries = False  # with them, every page took seconds
autodoc_typehints = "signature"
default_role = "code"


def setup(app):
    """Our docstrings are plain text."""

    def translate(app, what, name, obj, options, lines):
        lines[:] = as_rest(lines)

    app.connect("autodoc-process-docstring", translate)
