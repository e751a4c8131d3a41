"""From the Markdown of a page, which GitHub shows as it is, to what Sphinx reads.

Tabs, figures and what is for the site alone stand in comments, so that GitHub prints no directive::

    <!-- tabs -->            #### begins a tab, up to <!-- end of tabs -->
    *What a figure shows.* <!-- figure NAME -->        that of _figures.py takes the sentence's place
    <!-- site                MyST that only the site has, up to -->

A paragraph in docs/results/ that is one link is replaced by the file that it leads to.
"""

import os
import re
from pathlib import Path

import _api  # beside this file

DOCS = Path(__file__).parent
ROOT = DOCS.parent
INCLUDE = r"^(?:## (?P<heading>.+)\n\n)?\[`[^`]+`\]\((?P<file>\S+\.md)\)$"
LINK = (
    r"(?P<image>!?)\[(?P<words>[^\]]*)\]"
    r"\((?!https?:|#|mailto:)(?P<name>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)"
)
TABS = re.compile(r"<!-- tabs -->\n(.*?)<!-- end of tabs -->", re.DOTALL)
FIGURE = r"^\*(.+)\* <!-- figure ([\w-]+) -->$"
START = "[The start of every snippet](_start.py)"
DROPDOWN = """:::{dropdown} The start of every snippet
```{literalinclude} _start.py
```
:::"""


def read(page: Path) -> str:
    """The page with directives, and with the files that it includes."""
    text = re.sub(r"<!-- site\n(.*?)\n-->", r"\1", page.read_text("utf-8"), flags=re.DOTALL)
    text = TABS.sub(tabs, text.replace(START, DROPDOWN))
    text = re.sub(FIGURE, figure(page), text, flags=re.MULTILINE)
    return expanded(text, page, page)


def expanded(text: str, source: Path, page: Path) -> str:
    """A text with the files that it includes, links and pictures of which then lead from the page.

    A link to a file that another page shows, or is made of, leads to that page; one to a file that no page shows
    becomes its name.
    """
    shown = included_files() | made_pages()

    def replaced(match: re.Match[str]) -> str:
        if match["file"]:
            file = (page.parent / match["file"]).resolve()
            above = f"## {match['heading']}\n\n" if match["heading"] else ""
            return above + expanded(file.read_text("utf-8"), file, page)
        words, name, anchor = match.group("words", "name", "anchor")
        target = (source.parent / name).resolve()
        target = target / "README.md" if (target / "README.md").is_file() else target
        if not target.exists():
            raise FileNotFoundError(f"{source}: there is no {name}")
        path = f"`{target.relative_to(ROOT)}`"
        leads, heading = shown.get(target, (target, ""))
        if (
            match["image"]
            or leads != target
            or (leads.is_relative_to(DOCS) and leads.is_file())
        ):
            to = os.path.relpath(leads, page.parent)
            return f"{match['image']}[{words}]({to}{anchor or heading})"
        return path if words.strip("`") in path else f"{words} ({path})"

    return re.sub(f"{INCLUDE}|{LINK}", replaced, text, flags=re.MULTILINE)


def tabs(match: re.Match[str]) -> str:
    """A tab for each heading."""
    _, *parts = re.split(r"^#### (.+)\n", match[1], flags=re.MULTILINE)
    items = zip(parts[::2], parts[1::2], strict=True)
    inner = "".join(
        f":::{{tab-item}} {name}\n{text.strip()}\n:::\n" for name, text in items
    )
    return f"::::{{tab-set}}\n{inner}::::"


def figure(page: Path) -> str:
    """The directives of a figure, in colours for a light and for a dark page."""
    folder = os.path.relpath(DOCS / "_generated", page.parent)
    return "\n".join(
        f"```{{image}} {folder}/\\2-{style}.svg\n:class: only-{style}\n:alt: \\1\n```"
        for style in ("light", "dark")
    )


def included_files() -> dict[Path, tuple[Path, str]]:
    """Which page shows which file of the repository, and under which of its anchors."""
    return {
        (page.parent / match["file"]).resolve(): (
            page,
            "#" + match["heading"].lower().replace(" ", "-") if match["heading"] else "",
        )
        for page in DOCS.rglob("*.md")
        for match in re.finditer(INCLUDE, page.read_text("utf-8"), re.MULTILINE)
    }


def made_pages() -> dict[Path, tuple[Path, str]]:
    """Which page is made of which file: of a tutorial, of the tutorials' introduction, of a module."""
    tutorials = {
        path: f"gallery/{'index' if path.stem == 'README' else path.stem}.rst"
        for path in (DOCS / "tutorials").iterdir()
    }
    modules = {_api.source(module): f"api/{module}.rst" for module in _api.PAGES}
    return {source: (DOCS / page, "") for source, page in (tutorials | modules).items()}
