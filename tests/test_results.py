"""What RESULTS.md says of the committed records."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
if not (ROOT / "RESULTS.md").is_file():
    pytest.skip("installed without the repository", allow_module_level=True)
for package in ("lightly", "kornia", "matplotlib", "sklearn"):
    pytest.importorskip(package, reason='pip install "slr-plugin[dev]"')
sys.path.insert(0, str(ROOT))

from benchmarks.representations import report

PAGES = {path: path.read_text() for path in (ROOT / "RESULTS.md", ROOT / "results" / "representations" / "README.md")}


def test_the_tables_are_those_of_the_records():
    tables = {}
    for budget in (ROOT / "results" / "representations").iterdir():
        if budget.is_dir():
            tables |= {f"{budget.name}/{name}": text for name, text in report.sections(budget).items()}
    assert sorted(re.findall(r"<!-- table: (\S+) -->", "".join(PAGES.values()))) == sorted(tables)
    for path, text in PAGES.items():
        assert report.fill(text, tables) == text, (
            f"run: python -m benchmarks representations --only-report --documents {path.relative_to(ROOT)}"
        )


def test_fill_replaces_what_is_between_the_marks_only():
    document = "a\n<!-- table: x/y -->\nold\n<!-- end -->\nb\n<!-- table: z -->\nkept\n<!-- end -->\nc\n"
    filled = document.replace("old", "new\ntable")
    assert report.fill(document, {"x/y": "new\ntable", "absent": "?"}) == filled
    assert report.fill(filled, {"x/y": "new\ntable"}) == filled


@pytest.mark.parametrize("document", ["README.md", "RESULTS.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(document):
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", (ROOT / document).read_text()):
        if "://" not in link:
            assert (ROOT / link).exists(), link
