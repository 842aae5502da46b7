"""The site of the documentation: pages in Markdown, the API from docstrings, the options from the programs themselves.

`make docs` builds it into docs/_build/html; a warning is an error.
"""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).parent

project = "stablesr-kit"
author = "the stablesr-kit authors"
copyright = "the stablesr-kit authors, Apache-2.0"
release = version = metadata.version("stablesr-kit")

extensions = ["myst_parser", "sphinx.ext.apidoc", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"stablesr-kit {release}"
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
# Pages link files and folders of the repository as the repository shows them; the site has no copies of these.
suppress_warnings = ["myst.xref_missing"]

apidoc_modules = [{"path": "../stablesr_kit", "destination": "api", "separate_modules": True, "module_first": True}]
autoclass_content = "both"
napoleon_use_ivar = True
autodoc_typehints = "none"

# The option reference is what the command line says of itself.
command = "-m typer stablesr_kit.cli utils docs --name stablesr --output commands.md"
subprocess.run([sys.executable, *command.split()], cwd=HERE, check=True, stdout=subprocess.DEVNULL)
