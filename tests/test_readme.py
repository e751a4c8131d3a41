"""The Python of the README and of the pages in docs/ runs, block after block, and their links lead somewhere."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
LINKS = [(page, link) for page, text in TEXTS.items() for link in set(re.findall(r"\]\((?!http)([^)#]+)", text))]


def run_blocks(page):
    """The names that the blocks leave behind."""
    torch.manual_seed(0)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", TEXTS[page], flags=re.DOTALL):
        exec(compile(block, page.name, "exec"), names)
    return names


def test_the_readmes_python_runs(capsys):
    names = run_blocks(PAGES[0])
    assert names["loss"].isfinite()
    assert names["criterion"].step == 1
    assert "labels" in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_the_pages_python_runs(page):
    if "lightly" in TEXTS[page]:
        pytest.importorskip("lightly", reason='pip install "slr-plugin[lightly]"')
    run_blocks(page)


@pytest.mark.parametrize(("page", "link"), LINKS, ids=lambda value: str(getattr(value, "name", value)))
def test_links_lead_somewhere(page, link):
    assert (page.parent / link).exists()
