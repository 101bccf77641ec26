"""Configuration of the documentation: Sphinx, MyST and furo. Build it with `make docs`."""

import importlib
import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # a checkout, installed or not
config_reference = importlib.import_module("config_reference")

project = "flowmatch"
author = "flowmatch contributors"
project_copyright = "flowmatch contributors, Apache-2.0"
version = release = importlib.import_module("flowmatch").__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build", "models"]  # the cards of models are read beside their weights
templates_path: list[str] = []

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 140
smartquotes = False
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"flowmatch {release}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_show_sphinx = False
html_math_renderer = "mathml"
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


def escape_docstring(
    app: Any, what: str, name: str, it: Any, options: Any, lines: list[str]
) -> None:
    """Escape a docstring before napoleon reads its sections."""
    lines[:] = [line if ".. math::" in line else escape(line) for line in lines]


def math(translator: Any, node: Any, block: bool = False) -> None:
    """Write an equation as MathML, which browsers show without a script from another server."""
    translator.body.append(tex2mathml(node.astext(), as_block=block))
    raise nodes.SkipNode


def setup(app: Any) -> None:
    """Connect the hooks and the renderer of equations."""
    blocks = (lambda translator, node: math(translator, node, block=True), None)
    app.add_html_math_renderer("mathml", (math, None), blocks)
    app.connect("builder-inited", lambda app: config_reference.write(HERE / "reference/config"))
    app.connect("autodoc-process-docstring", escape_docstring, priority=400)
