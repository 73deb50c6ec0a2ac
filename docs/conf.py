"""How Sphinx builds the site; `make docs`. No step needs a network, and the pages load nothing from one."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
for folder in ("proto", "server", "client", "tools"):
    sys.path.insert(0, str(ROOT / folder))

project = "Gramophone"
author = "the authors of Gramophone"
release = re.findall(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0]
version = release

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_argparse_cli", "docs_site"]
myst_enable_extensions = ["deflist", "colon_fence"]
myst_heading_anchors = 3  # as on GitHub, so that links work there and here

default_role = "py:obj"  # of docstrings, which write `name`
nitpicky = True  # a name that leads nowhere is an error; docs_site says which may
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autoclass_content = "both"
add_module_names = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88  # one parameter a line in longer signatures

smartquotes = False  # --flags and "strings" stay as they are typed

html_theme = "furo"
html_title = "Gramophone"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}
pygments_style = "friendly"
pygments_dark_style = "github-dark"
