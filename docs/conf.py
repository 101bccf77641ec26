"""Configuration of the documentation: Sphinx, MyST and furo. Build it with `make docs`."""

import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import config_reference

from flowmatch import __version__

project = "flowmatch"
author = "flowmatch contributors"
project_copyright = "flowmatch contributors, Apache-2.0"
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
]
exclude_patterns = ["_build"]
templates_path: list[str] = []

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"flowmatch {release}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_show_sphinx = False
pygments_style = "friendly"
pygments_dark_style = "github-dark"

linkcheck_timeout = 20
linkcheck_anchors = False


def escape(line: str) -> str:
    """Escape the characters of a docstring that reStructuredText takes for markup."""
    parts = re.split(r"(``.*?``|:\w+:`[^`]*`|`[^`]*`)", line)
    for i, part in enumerate(parts):
        if not i % 2:
            parts[i] = re.sub(r"([*|])", r"\\\1", part)
        elif part.startswith("`") and not part.startswith("``"):
            parts[i] = f"`{part}`"
    return "".join(parts)


def escape_docstring(app: Any, what: str, name: str, it: Any, options: Any, lines: list[str]) -> None:
    """Escape a docstring before napoleon reads its sections."""
    lines[:] = [line if ".. math::" in line else escape(line) for line in lines]


def setup(app: Any) -> None:
    """Connect the two hooks."""
    app.connect("builder-inited", lambda app: config_reference.write(HERE / "reference/config"))
    app.connect("autodoc-process-docstring", escape_docstring, priority=400)
