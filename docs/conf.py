"""The documentation site: `make docs` writes it to output/docs, from the pages and the docstrings.

The source folder is the project's, so that README's links and those among the pages are the same
here and on the page of the repository. The site loads nothing from elsewhere: formulas are MathML.
"""

import re
import sys
from itertools import zip_longest
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

project = "TokenBridge"
copyright = "the TokenBridge contributors, MIT"
root_doc = "docs/index"
include_patterns = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md", "docs/*.rst"]
exclude_patterns = [".*", "output*", "data", "build", "pretrained_models", "fid_stats", "tests"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]

# --- pages

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
suppress_warnings = ["myst.header"]
smartquotes = False  # two hyphens begin a flag
pygments_style, pygments_dark_style = "friendly", "github-dark"

# --- the API, from docstrings that are plain text

autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_preserve_defaults = True
maximum_signature_line_length = 88

# --- the site

html_theme = "furo"
html_title = "TokenBridge"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_additional_pages = {"index": "to_the_start.html"}
templates_path = ["static"]
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0b5fa5", "color-brand-content": "#0b5fa5"},
    "dark_css_variables": {"color-brand-primary": "#7cc0ff", "color-brand-content": "#7cc0ff"},
}


def as_paragraphs(app, what, name, obj, options, lines):
    """A docstring's lines as RST: indented ones stay as they are, each argument is a paragraph."""
    found, indented = [], False
    for line in lines:
        if line.strip() and line.startswith(" ") != indented:
            indented = not indented
            found += ["", "::", ""] if indented else [""]
        if re.match(r"[*\w]+(, [*\w]+)*: |Returns |Raises |Source: ", line):
            found.append("")
        found.append(line if indented else escaped(line))
    lines[:] = found


def escaped(line: str) -> str:
    """Names in backticks are code; other signs of RST are what they are."""
    parts = line.split("`")
    plain = [re.sub(r"([\\*|_])", r"\\\1", part) for part in parts[::2]]
    code = [f"``{part}``" for part in parts[1::2]]
    return "".join(a + b for a, b in zip_longest(plain, code, fillvalue=""))


def formula(display: str):
    """What writes a node of mathematics into the page."""

    def write(writer, node):
        writer.body.append(convert(node.astext(), display=display))
        raise nodes.SkipNode

    return write


def setup(app):
    app.connect("autodoc-process-docstring", as_paragraphs)
    inline, block = formula("inline"), formula("block")
    app.add_html_math_renderer("mathml", (inline, None), (block, None))


html_math_renderer = "mathml"
