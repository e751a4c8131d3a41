"""How Sphinx builds the site: offline, and any warning is an error (`make docs`)."""

import importlib
import importlib.metadata
import inspect
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

from sphinx.ext.autodoc.mock import mock

DOCS = Path(__file__).parent
ROOT = DOCS.parent
warnings.filterwarnings(
    "ignore", "pkg_resources is deprecated"
)  # of torchmetrics 0.11, whose source Sphinx reads
sys.path[:0] = [str(DOCS), str(ROOT)]

import _figures  # noqa: E402  # beside this file
from slr_plugin import presets  # noqa: E402

project = "slr-plugin"
author = "The slr-plugin developers"
release = importlib.metadata.version("slr-plugin")
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",  # MathJax and its fonts, copied into the site: nothing is loaded from elsewhere
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 4
# Types that have their pages elsewhere; a misspelt reference to one of ours fails.
ELSEWHERE = r"(torch|collections\.abc|pathlib|pytorch_metric_learning)\..*|Tensor|nn\.Module|Figure|Axes|Run|Confidence"
nitpick_ignore_regex = [("py:class", ELSEWHERE)]
suppress_warnings = ["myst.header"]  # the included results begin with headings of their own

html_theme = "furo"
html_title = "slr-plugin"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
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
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

INCLUDE = re.compile(
    r"^(?:## (.+)\n\n)?```\{include\} (\S+)\n```$", re.MULTILINE
)  # with the heading above it
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#|mailto:)([^)\s#]+)(#[^)\s]*)?\)")


def pages_of_included() -> dict[Path, tuple[Path, str]]:
    """Which page shows which file of the repository, and under which of its anchors."""
    return {
        (page.parent / name).resolve(): (
            page,
            heading and "#" + heading.lower().replace(" ", "-"),
        )
        for page in DOCS.rglob("*.md")
        for heading, name in INCLUDE.findall(page.read_text(encoding="utf-8"))
    }


def expanded(text: str, source: Path, page: Path) -> str:
    """A page with the files that it includes, links and pictures of which then lead from the page.

    A link to a file that another page shows leads to that page; one to a file that no page shows becomes its name.
    """

    def link(match: re.Match[str]) -> str:
        is_image, words, name, anchor = match.groups()
        target = (source.parent / name).resolve()
        target, heading = shown.get(
            target / "README.md" if target.is_dir() else target, (target, "")
        )
        if not target.exists():
            raise FileNotFoundError(f"{source}: there is no {name}")
        if is_image or (target.is_relative_to(DOCS) and target.is_file()):
            return f"{is_image}[{words}]({os.path.relpath(target, page.parent)}{anchor or heading})"
        path = f"`{target.relative_to(ROOT)}`"
        return path if words.strip("`") in path else f"{words} ({path})"

    def included(match: re.Match[str]) -> str:
        heading, name = match.groups()
        file = (page.parent / name).resolve()
        above = f"## {heading}\n\n" if heading else ""
        return above + expanded(file.read_text(encoding="utf-8"), file, page)

    shown = pages_of_included()
    return INCLUDE.sub(included, LINK.sub(link, text))


def expand_page(app: Any, docname: str, source: list[str]) -> None:
    """Give Sphinx the page with what it includes."""
    page = DOCS / f"{docname}.md"
    source[0] = expanded(source[0], page, page)


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
