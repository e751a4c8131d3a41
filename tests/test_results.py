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

from benchmarks.representations import harness, labelled, report
from benchmarks.representations.methods import METHODS

RESULTS = ROOT / "results"
BUDGETS = sorted(path.parent for path in RESULTS.glob(f"representations/*/{harness.FILE}"))
FOLDS = [RESULTS / name / harness.FILE for name in ("views", "modalities")]
README = (ROOT / "README.md").read_text()
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


def test_the_table_of_few_labels_is_that_of_the_records():
    page = (RESULTS / "labelled" / "README.md").read_text()
    assert report.fill(page, {"labelled": labelled.table(RESULTS / "labelled")}) == page


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
    from_records = {"representations", "views", "modalities", "labelled"}
    others = [path.read_text() for path in RESULTS.glob("*/README.md") if path.parent.name not in from_records]
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
    judged = {}
    for run in sorted(harness.read(RESULTS / "labelled"), key=lambda run: run["seed"]):
        for measure in report.MEASURES:
            judged.setdefault((run["labels"], measure), {}).setdefault((run["method"], run["beside"]), []).append(
                run[measure]
            )
    for scores in judged.values():
        texts += [report.interval(np.subtract(*pair)) for pair in itertools.permutations(scores.values(), 2)]
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
        "docs/results.md",
        "docs/sentence-transformers.md",
    ],
)
def test_every_interval_accuracy_and_difference_is_that_of_the_records(document):
    for said, known in zip(numbers((ROOT / document).read_text()), recorded(), strict=True):
        assert not said - known


def of_budget(name, mine, other, seeds=range(100)):
    """Both differences between two methods of a budget."""
    found = harness.records(RESULTS / "representations" / name)
    return [difference(found, mine, other, measure, seeds) for measure in report.MEASURES]


def of_folds(path, data, mine, other):
    """Both differences between two titles of a comparison on folds."""
    results = comparison.Records(RESULTS / path / harness.FILE).results(data, folds=5)
    columns = [zip(*results[title], strict=True) for title in (mine, other)]
    return [comparison.difference(*pair, 5) for pair in zip(*columns, strict=True)]


# What each row of the front page's table compares, in its order.
FRONT_PAGE = [
    lambda: of_budget("teacher", "imagenet-labels", "decoupled", range(5)),
    lambda: of_budget("teacher", "imagenet-labels", "decoupled", range(5, 10)),
    lambda: of_budget("teacher", "imagenet-labels", "imagenet-clusters"),
    lambda: of_budget("known", "simclr-cold-sharp-gradients", "simclr-cold"),
    lambda: of_budget("known", "simclr-cold-sharp-gradients", "gradients-clusters"),
    lambda: of_folds("views", "fou", "labels from the other views", "NT-Xent"),
    lambda: of_folds("views", "fou", "labels from the other views", "the other views predicted"),
    lambda: of_folds("modalities", "speech", "SupCon with the recording", "NT-Xent"),
    lambda: of_budget("known", "drawn-cross-entropy", "drawn-labels"),
    lambda: of_budget("cpu", "sane", "moco"),
    lambda: of_budget("cpu", "sane", "moco-longer"),
    lambda: of_budget("cpu", "simclr-cold", "sane-cold"),
]


def test_every_row_of_the_front_page_is_the_difference_it_names():
    rows = re.findall(
        r"^\|.*\| (\S.*) \| (\S.*) \|$", README.split("## Does it help?")[1].split("## ")[0], re.MULTILINE
    )[1:]
    said = [[cell.replace("**", "") for cell in row] for row in rows if "--:" not in row]
    assert len(said) == len(FRONT_PAGE)
    for cells, compared in zip(said, FRONT_PAGE, strict=True):
        for cell, computed in zip(cells, compared(), strict=True):
            assert computed.startswith(cell)


def test_the_comparisons_that_were_to_decide_are_known_and_few():
    primary = {name: study.primary for name, study in report.STUDIES.items() if study.primary}
    assert set(primary) <= {"teacher", "teacher-again", "fourteen", "guesses", "known-classes", "histograms", "burst"}
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
