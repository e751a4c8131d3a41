"""What README.md and RESULTS.md say of the committed records."""

import functools
import itertools
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
if not (ROOT / "RESULTS.md").is_file():
    pytest.skip("installed without the repository", allow_module_level=True)
for package in ("lightly", "kornia", "matplotlib", "sklearn"):
    pytest.importorskip(package, reason='pip install "slr-plugin[dev]"')
sys.path.insert(0, str(ROOT))

sys.path.insert(0, str(ROOT / "examples"))

import comparison

from benchmarks.representations import harness, report
from benchmarks.representations.methods import METHODS

RESULTS = ROOT / "results"
BUDGETS = sorted(path.parent for path in RESULTS.glob(f"representations/*/{harness.FILE}"))
FOLDS = [RESULTS / name / harness.FILE for name in ("views", "modalities")]
PAGES = {path: path.read_text() for path in (ROOT / "RESULTS.md", ROOT / "results" / "representations" / "README.md")}


def test_the_tables_are_those_of_the_records():
    tables = {}
    for budget in BUDGETS:
        tables |= {f"{budget.name}/{name}": text for name, text in report.sections(budget).items()}
    assert sorted(re.findall(r"<!-- table: (\S+) -->", "".join(PAGES.values()))) == sorted(tables)
    for path, text in PAGES.items():
        assert report.fill(text, tables) == text, (
            f"run: python -m benchmarks representations --only-report --documents {path.relative_to(ROOT)}"
        )


@pytest.mark.parametrize("path", FOLDS, ids=lambda path: path.parent.name)
def test_the_tables_of_folds_are_those_of_the_records(path):
    page = path.with_name("README.md")
    filled = comparison.fill(page.read_text(), comparison.Records(path))
    assert filled == page.read_text(), f"run: python examples/comparison.py {path} {page}"


def numbers(text):
    """Intervals, kNN / linear accuracies, and single differences, as text has them."""
    return (
        set(re.findall(r"([+-]\d+\.\d\d) to ([+-]\d+\.\d\d)", text)),
        set(re.findall(r"(?<![\d.+-])(\d\d\.\d\d) / (\d\d\.\d\d)", text)),
        set(re.findall(r"(?<![\d.])[+-]\d+\.\d\d(?![\d.])", text)),
    )


def difference(found, mine, other, measure, seeds):
    """Of two methods of a budget, as tables have it."""
    seeds = sorted(set(found[other]).intersection(seeds, found[mine] if METHODS[mine].trains else found[other]))
    runs = found[mine] if METHODS[mine].trains else dict.fromkeys(seeds, found[mine][0])
    return report.interval([runs[seed][measure] - found[other][seed][measure] for seed in seeds]) if seeds else ""


@functools.cache
def recorded():
    """All accuracies and every difference between two methods, from the records of budgets and of folds.

    And what stands in tables of comparisons whose records are files of another kind.
    """
    recorded = {"representations", "views", "modalities", "labelled"}
    others = [path.read_text() for path in RESULTS.glob("*/README.md") if path.parent.name not in recorded]
    texts = ["\n".join(re.findall(r"^\|.*$", text, flags=re.MULTILINE)) for text in others]
    for budget in BUDGETS:
        found = harness.records(budget)
        texts += report.sections(budget).values()
        for runs in found.values():
            texts.append(" / ".join(f"{sum(run[m] for run in runs.values()) / len(runs):.2f}" for m in report.MEASURES))
        ranges = {study.seeds for study in report.STUDIES.values() if budget.name in study.budgets}
        for (mine, other), some in itertools.product(itertools.permutations(found, 2), ranges):
            texts += [difference(found, mine, other, measure, some) for measure in report.MEASURES]
    for path in FOLDS:
        records = comparison.Records(path)
        for name, folds in sorted({(record["data"], record["folds"]) for record in records.found}):
            scores = {title: list(zip(*rows, strict=True)) for title, rows in records.results(name, folds).items()}
            texts += [" / ".join(f"{sum(part) / len(part):.2f}" for part in parts) for parts in scores.values()]
            for mine, other in itertools.permutations(scores.values(), 2):
                if len(mine[0]) == len(other[0]):
                    texts += [comparison.difference(*parts, folds) for parts in zip(mine, other, strict=True)]
    ranked = {}
    for line in (RESULTS / "sentence_transformers" / "groups.jsonl").read_text().splitlines():
        run = json.loads(line)
        ranked.setdefault(run["method"], []).append(run["mrr"])
    texts += [report.interval(np.subtract(*pair)) for pair in itertools.permutations(ranked.values(), 2)]
    return tuple(set.union(*parts) for parts in zip(*map(numbers, texts), strict=True))


@pytest.mark.parametrize(
    "document",
    [
        "RESULTS.md",
        "results/representations/README.md",
        "results/representations/teacher/README.md",
        "results/views/README.md",
        "results/labelled/README.md",
        "results/modalities/README.md",
        "README.md",
        "docs/choose.md",
        "docs/diagnostics.md",
        "docs/groups.md",
        "docs/index.md",
        "docs/sentence-transformers.md",
    ],
)
def test_every_interval_accuracy_and_difference_is_that_of_the_records(document):
    for said, known in zip(numbers((ROOT / document).read_text()), recorded(), strict=True):
        assert not said - known


def test_the_comparisons_that_were_to_decide_are_known_and_few():
    primary = {name: study.primary for name, study in report.STUDIES.items() if study.primary}
    assert set(primary) <= {"teacher", "fourteen", "guesses", "known-classes", "histograms", "burst"}
    for name, (method, measure) in primary.items():
        assert method in report.STUDIES[name].methods
        assert measure in report.MEASURES


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
