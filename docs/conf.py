"""How Sphinx builds the site: offline, and any warning is an error (`make docs`)."""

import importlib
import importlib.metadata
import inspect
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from sphinx.ext.autodoc.mock import mock

DOCS = Path(__file__).parent
ROOT = DOCS.parent
warnings.filterwarnings(
    "ignore", "pkg_resources is deprecated"
)  # of torchmetrics 0.11, whose source Sphinx reads
sys.path[:0] = [str(DOCS), str(ROOT)]

import _api  # noqa: E402  # these four lie beside this file
import _figures  # noqa: E402
import _inventories  # noqa: E402
import _pages  # noqa: E402
from slr_plugin import presets  # noqa: E402

project = "slr-plugin"
author = "The slr-plugin developers"
release = importlib.metadata.version("slr-plugin")
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "sphinx-mathjax-offline",  # MathJax and its fonts, copied into the site: nothing is loaded from elsewhere
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "_generated", "tutorials", "gallery/*.py"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 4
intersphinx_mapping = _inventories.write(DOCS / "_generated")
# Types that have no page to lead to; a misspelt reference to one of ours fails.
nitpick_ignore_regex = [
    ("py:class", r"pytorch_metric_learning\..*|Figure|Axes|Run|Confidence")
]
suppress_warnings = ["myst.header"]  # the included results begin with headings of their own

torch.set_num_threads(1)  # for the tutorials' small tensors

html_theme = "furo"
html_title = "slr-plugin"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_favicon = "_static/favicon.svg"
html_copy_source = False
html_use_index = html_domain_indices = (
    False  # the search finds names, and page API lists them
)
html_show_sphinx = False
html_show_copyright = False
copybutton_exclude = ".linenos, .gp, .go"

# The frameworks of the adapters need not be installed to read the adapters' docstrings.
autodoc_mock_imports = [
    "accelerate",
    "datasets",
    "hydra",
    "lightly",
    "lightning",
    "omegaconf",
    "pytorch_lightning",
    "pytorch_metric_learning",
    "sentence_transformers",
    "solo",
    "stable_pretraining",
    "timm",
    "torchmetrics",
    "torchvision",
    "transformers",
]
autodoc_default_options = {"members": True, "special-members": "__call__"}
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

sphinx_gallery_conf = {
    "examples_dirs": "tutorials",
    "gallery_dirs": "gallery",
    "filename_pattern": r"\.py$",  # all of them run
    "within_subsection_order": "FileNameSortKey",
    "download_all_examples": False,
    "show_memory": False,
    "show_signature": False,
    "write_computation_times": False,
    "abort_on_example_error": True,
    "doc_module": ("slr_plugin",),
    "reference_url": {
        "slr_plugin": None
    },  # names in their code lead to the pages of the API
}


def expand_page(app: Any, docname: str, source: list[str]) -> None:
    """Give Sphinx the page with its directives and what it includes."""
    page = DOCS / f"{docname}.md"
    if page.is_file():  # not of the API or of a tutorial
        source[0] = _pages.read(page)


def own_signature(
    app: Any, what: str, name: str, obj: Any, options: Any, signature: str, returns: str
) -> Any:
    """The arguments of our class's own constructor, where a mocked base would hide them."""
    if what == "class" and "__init__" in vars(obj):
        parameters = list(inspect.signature(obj.__init__).parameters.values())[1:]
        bare = [
            p.replace(annotation=inspect.Parameter.empty, default=named(p.default))
            for p in parameters
        ]
        return str(inspect.Signature(bare)), returns
    return None


def named(default: Any) -> Any:
    """A default that a signature shows by its name: a preset or a function."""
    known = {
        id(value): f"presets.{name}"
        for name, value in vars(presets).items()
        if name.isupper()
    }
    name = default.__name__ if inspect.isfunction(default) else known.get(id(default))
    return type("", (), {"__repr__": lambda self: name})() if name else default


def setup(app: Any) -> None:
    """Draw the figures first, and expand every page when it is read."""
    with mock(
        autodoc_mock_imports
    ):  # this class goes by another name, and would be listed as an alias only
        importlib.import_module(
            "slr_plugin.adapters.pytorch_metric_learning"
        ).SLRLoss.__name__ = "SLRLoss"
    app.connect("autodoc-process-signature", own_signature)
    app.connect("source-read", expand_page)
    app.connect("builder-inited", lambda _: _figures.draw(DOCS / "_generated"))
    _api.write(DOCS / "api")
