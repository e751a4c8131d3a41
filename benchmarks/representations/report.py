"""Tables and figures of the records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import t as student

from benchmarks.representations.budgets import COPIES
from benchmarks.representations.features import LABELLED as GUESSED_FROM
from benchmarks.representations.features import TOLD
from benchmarks.representations.harness import Record, best, records, tuning
from benchmarks.representations.methods import KNOWN, METHODS, PLAIN

Records = Mapping[str, Mapping[int, Record]]  # method, seed, record
MEASURES = ("knn", "linear")
DRAWN = ("moco", "moco-longer", "mm", "sane", "sane-lambda-1.0", "sane-lambda-1.0-longer")
LABELLED = ("p", "q", "p+q", "sane")


class Study(NamedTuple):
    """A question, the methods that answer it and, where the paper answers it too, its numbers."""

    title: str
    reference: str  # differences are paired with this method's runs
    methods: tuple[str, ...]
    paper: Mapping[str, str] = {}
    budgets: tuple[str, ...] = ("cpu", "gpu", "gpu-100", "smoke")  # that it is run with
    primary: tuple[str, str] | None = None  # method and measure of the comparison that was to decide, before it was run
    seeds: range = range(100)  # in its table


STUDIES = {
    "methods": Study(
        "Methods",
        "moco",
        (
            "moco",
            "moco-longer",
            "simclr",
            "dcl",
            "nnclr",
            "co2",
            "sce",
            "vanilla",
            "one-hot",
            "p+q",
            "mm",
            "sane",
            "sane-lambda-1.0",
            "sane-lambda-1.0-longer",
        ),
        {"moco": "92.5 / 93.9", "sane": "95.2 / 96.1"},
    ),
    "compute": Study(
        "Equal compute", "moco-longer", ("moco-longer", "vanilla", "mm", "sane", "sane-lambda-1.0-longer", "sane-cold")
    ),
    "two-views": Study(
        "Two trained views, temperature 0.1",
        "simclr-cold",
        (
            "simclr",
            "simclr-cold",
            "dcl",
            "dcl-longer",
            "simclr-cold-p+q",
            "simclr-cold-whole-gradients",
            "simclr-cold-mm",
            "simclr-cold-sane",
        ),
    ),
    "two-views-compute": Study(
        "The same at equal compute", "dcl-longer", ("dcl-longer", "simclr-cold-mm", "simclr-cold-sane")
    ),
    "cold": Study("A queue, temperature 0.1", "moco-cold", ("moco", "moco-cold", "mm-cold", "sane-cold")),
    "components": Study(
        "Components",
        "one-hot",
        ("one-hot", "p", "q", "mm", "p+q", "p+mm", "q+mm", "sane"),
        {
            name: f"- / {linear}"
            for name, linear in {
                "one-hot": 93.7,
                "p": 94.6,
                "q": 94.5,
                "mm": 94.8,
                "p+q": 94.9,
                "p+mm": 95.2,
                "q+mm": 95.1,
                "sane": 95.9,
            }.items()
        },
    ),
    "lambda": Study(
        "The weight of the refined term",
        "sane",
        ("one-hot", "sane-lambda-0.25", "sane", "sane-lambda-0.75", "sane-lambda-1.0"),
        {
            "one-hot": "- / 94.3",
            "sane-lambda-0.25": "- / 95.8",
            "sane": "- / 95.9",
            "sane-lambda-0.75": "- / 95.5",
            "sane-lambda-1.0": "- / 94.5",
        },
    ),
    "mixup": Study(
        "Vanilla and momentum mixup",
        "vanilla",
        ("vanilla", "mm", "vanilla-strong", "mm-strong", "sane-strong"),
        {"vanilla": "- / 93.7", "mm": "- / 94.2", "vanilla-strong": "- / 93.3", "mm-strong": "- / 94.8"},
    ),
    "refinement": Study(
        "Does refinement add to momentum mixup?", "mm", ("mm", "sane", "p+mm", "q+mm", "sane-sharp", "half-q+mm")
    ),
    "refinement-cold": Study("The same at temperature 0.1", "mm-cold", ("mm", "mm-cold", "sane-cold")),
    "refinement-two-views": Study(
        "The same with two trained views", "simclr-cold-mm", ("simclr-cold-mm", "simclr-cold-sane")
    ),
    "refinement-weak": Study(
        "The same with weak keys", "mm-weak", ("mm", "mm-weak", "sane-weak", "sane-weak-sharp", "half-q+mm-weak")
    ),
    "purity": Study(
        "What if the estimator were told the classes?",
        "mm",
        (
            "mm",
            "half-q+mm",
            "oracle-0.5",
            "oracle-1.0",
            "oracle-flat-0.25",
            "oracle-flat-0.5",
            "oracle-flat-1.0",
            "oracle-flat-1.0-all",
            "supervised",
        ),
    ),
    "byol": Study("BYOL", "byol", ("byol", "byol-longer", "byol-mm", "byol-alike", "byol-mm-alike")),
    "estimators": Study(
        "Labels from other features, a queue",
        "one-hot",
        (
            "one-hot",
            "one-hot-twice",
            "p+q",
            "whole",
            "whole-pixels",
            "whole-plain",
            "whole-teacher",
            "whole-gradients",
            "sharp-gradients",
            "whole-guesses",
            "eliminate",
            "attract",
            "whole-classes",
            "alone-gradients",
            "alone-guesses",
        ),
        budgets=("fashion",),
    ),
    "estimators-two-views": Study(
        "Labels from other features, two trained views",
        "simclr-cold",
        (
            "simclr-cold",
            "dcl",
            "simclr-cold-whole-pixels",
            "simclr-cold-whole-gradients",
            "simclr-cold-sharp-gradients",
            "simclr-cold-whole-guesses",
            "simclr-cold-whole-classes",
            "alone-gradients",
            "alone-guesses",
        ),
        budgets=("fashion",),
    ),
    # The references are those that the held-out images chose, as results/representations/teacher/README.md says.
    "teacher": Study(
        "A teacher that is gone in use",
        "decoupled",
        (
            "one-hot-batch",
            "decoupled",
            "imagenet-labels",
            "imagenet-clusters",
            "imagenet-regression",
            "imagenet-supcon",
            "alone-imagenet",
        ),
        budgets=("teacher", "teacher-all"),
        primary=("imagenet-labels", "linear"),
        seeds=range(5),
    ),
    "teacher-again": Study(
        "The teacher, five other seeds",
        "decoupled",
        ("one-hot-batch", "decoupled", "imagenet-labels", "imagenet-clusters"),
        budgets=("teacher",),
        primary=("imagenet-labels", "linear"),
        seeds=range(5, 10),
    ),
    "teacher-ten": Study(
        "The teacher, all ten seeds",
        "imagenet-labels",
        ("one-hot-batch", "decoupled", "imagenet-labels", "imagenet-clusters"),
        budgets=("teacher",),
    ),
    "teacher-rivals": Study(
        "Other ways to use the teacher",
        "imagenet-clusters",
        ("imagenet-clusters", "imagenet-labels", "imagenet-regression", "imagenet-supcon"),
        budgets=("teacher", "teacher-all"),
        seeds=range(5),
    ),
    # The reference is the one that the held-out images chose, as results/representations/fourteen/README.md says.
    "fourteen": Study(
        "Labels from all pixels, for images with a quarter of them",
        "one-hot-batch",
        (
            "one-hot-batch",
            "decoupled",
            "simclr-cold-sharp-gradients",
            "gradients-clusters",
            "gradients-regression",
            "alone-half-gradients",
            "alone-gradients",
        ),
        budgets=("fourteen",),
        primary=("simclr-cold-sharp-gradients", "linear"),
    ),
    "fourteen-rivals": Study(
        "Other ways to use all pixels",
        "gradients-clusters",
        ("gradients-clusters", "simclr-cold-sharp-gradients", "gradients-regression"),
        budgets=("fourteen",),
    ),
    # Decided before the runs of this budget.
    "guesses": Study(
        f"Guesses of a classifier, {GUESSED_FROM} images labelled, drawn for every seed",
        "drawn-cross-entropy",
        ("simclr-cold", "drawn-labels", "drawn-cross-entropy", "drawn-supcon", "alone-drawn"),
        budgets=("known",),
        primary=("drawn-labels", "linear"),
    ),
    "known-classes": Study(
        "Classes known for some of the images, as groups",
        "simclr-cold",
        (
            "simclr-cold",
            *(f"{kind}-{percent}" for percent in KNOWN for kind in ("groups", "classified")),
            "supcon-classes",
        ),
        budgets=("known",),
        primary=("groups-5", "linear"),
    ),
    "histograms": Study(
        "Labels from histograms of gradients, and other ways to use them",
        "simclr-cold",
        (
            "simclr-cold",
            "simclr-cold-sharp-gradients",
            "gradients-clusters",
            "gradients-regression",
            "alone-gradients",
        ),
        budgets=("known",),
        primary=("simclr-cold-sharp-gradients", "linear"),
    ),
    "histograms-rivals": Study(
        "The same against clusters",
        "gradients-clusters",
        ("gradients-clusters", "simclr-cold-sharp-gradients", "gradients-regression"),
        budgets=("known",),
    ),
    "burst": Study(
        "Copies, told by groups",
        "one-hot",
        ("one-hot", "burst-groups", "burst-apart"),
        budgets=("burst",),
        primary=("burst-groups", "linear"),
    ),
    "long": Study(
        "Long trainings",
        "one-hot",
        (
            "one-hot",
            "one-hot-longer",
            "p+q",
            "mm",
            "sane",
            "one-hot-batch",
            "decoupled",
            "decoupled-longer",
            "simclr-cold-mm",
            "simclr-cold-sane",
        ),
        budgets=("cpu-long",),
    ),
    "how-pure": Study(
        "How pure labels must be, a queue",
        "one-hot",
        ("one-hot", *(f"half-{name}" for name in TOLD), *(f"whole-{name}" for name in TOLD)),
        budgets=("purity", "purity-long"),
    ),
    "how-pure-two-views": Study(
        "How pure labels must be, two trained views",
        "one-hot-batch",
        ("one-hot-batch", *(f"simclr-cold-whole-{name}" for name in TOLD)),
        budgets=("purity", "purity-long"),
    ),
    "few": Study(
        "A queue longer than the data set",
        "one-hot",
        ("one-hot", "one-hot-short", "p+q", "eager", "sharp", "eliminate", "sharp-copies"),
        budgets=("few", *COPIES),
    ),
}

TITLES = {"labels": "Labels", "rates": "Learning rates, on held-out training images"}


def table(study: Study, records: Records) -> str:
    """The study as Markdown: mean and standard deviation, paired differences with Student's 95 % interval, cost."""
    records = {
        method: {seed: run for seed, run in runs.items() if seed in study.seeds or not METHODS[method].trains}
        for method, runs in records.items()
    }
    present = [method for method in study.methods if records.get(method)]
    reference = records.get(study.reference, {})
    header = ["method", "seeds", "kNN %", "linear %", "kNN difference", "linear difference", "cost"]
    lines = ["| " + " | ".join(header + ["paper's kNN / linear"] * bool(study.paper)) + " |"]
    lines.append("|---|" + "--:|" * (lines[0].count("|") - 2))
    for method in present:
        runs, trains = records[method], METHODS[method].trains
        cells = [f"{method}: {METHODS[method].summary}", str(len(runs)) if trains else ""]
        cells += [spread([run[measure] for run in runs.values()]) for measure in MEASURES]
        if not trains:  # the same for every seed of the others
            runs = dict.fromkeys(reference, runs[0])
        paired = sorted(set(runs) & set(reference))
        if method == study.reference or not paired:
            cells += ["", ""]
        else:
            for measure in MEASURES:
                cell = interval([runs[seed][measure] - reference[seed][measure] for seed in paired])
                cells.append(f"**{cell}**" if (method, measure) == study.primary else cell)
        cells.append(f"{cost(method):.2f}")
        cells += [study.paper.get(method, "")] * bool(study.paper)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cost(method: str) -> float:
    """Passes of all images through the encoder over a run, relative to MoCo's."""
    return METHODS[method].passes * METHODS[method].stretch / PLAIN


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    return f"{np.mean(values):.2f}" + (f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else "")


def interval(differences: Sequence[float]) -> str:
    """The mean of paired differences and Student's 95 % interval."""
    count, mean = len(differences), np.mean(differences)
    if count < 2:
        return f"{mean:+.2f}"
    margin = student.ppf(0.975, count - 1) * np.std(differences, ddof=1) / count**0.5
    return f"{mean:+.2f} ({mean - margin:+.2f} to {mean + margin:+.2f})"


LABELS = ("own", "same", "other", "purity", "chance", "nearest", "distance", "one_hot_distance", "blind_distance")


def label_table(methods: Sequence[str], records: Records) -> str:
    """Label quality at the end of training, mean over the seeds, of the methods whose labels are not one-hot."""
    lines = [
        "| method | seeds | own % | same class % | other % | purity % | chance % | nearest % | distance | one-hot's "
        "| blind's |",
        "|---|" + "--:|" * 10,
    ]
    for method in methods:
        if runs := [run["labels"][-1] for run in records.get(method, {}).values() if run.get("labels")]:
            last = {name: float(np.mean([_label(run, name) for run in runs])) for name in LABELS}
            if last["own"] == 1:
                continue
            cells = [f"{100 * last[name]:.1f}" for name in LABELS[:6]] + [f"{last[name]:.4f}" for name in LABELS[6:]]
            lines.append("| " + " | ".join([method, str(len(runs)), *cells]) + " |")
    return "\n".join(lines)


def _label(row: Mapping[str, float], name: str) -> float:
    """A measured value; purity is the share of the own class in what leaves the positive."""
    if name == "purity":
        return row["same"] / max(row["same"] + row["other"], 1e-12)  # 0 of nothing for a one-hot label
    return row[name]


def draw_accuracy(methods: Sequence[str], records: Records) -> Figure:
    """KNN accuracy over epochs and over compute: mean of the seeds, and their range."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for number, method in enumerate(name for name in methods if name in records):
        runs = list(records[method].values())
        epochs = np.array([row["epoch"] for row in runs[0]["curve"]])
        knn = [[row["knn"] for row in run["curve"]] for run in runs]
        for axes, x in ((left, epochs), (right, epochs * METHODS[method].passes / PLAIN)):
            band(axes, x, knn, method, f"C{number}")
    left.set(title="Equal epochs", xlabel="epoch", ylabel="kNN accuracy (%)")
    right.set(title="Equal compute", xlabel="encoder passes, in epochs of MoCo")
    left.legend(frameon=False)
    return figure


def draw_labels(methods: Sequence[str], records: Records) -> Figure:
    """Label quality over training."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    panels = dict(zip(("distance", "purity", "nearest"), figure.subplots(1, 3), strict=True))
    runs = []
    for number, method in enumerate(name for name in methods if name in records):
        runs = [run["labels"] for run in records[method].values() if run["labels"]]
        for measure, axes in panels.items():
            values = [[_label(row, measure) for row in run] for run in runs]
            band(axes, [row["epoch"] for row in runs[0]], values, method, f"C{number}")
    for measure, level, name in (
        ("distance", "one_hot_distance", "one-hot"),
        ("purity", "chance", "chance"),
        ("nearest", "chance", "chance"),
    ):
        for run in runs[:1]:
            x, y = [row["epoch"] for row in run], [row[level] for row in run]
            panels[measure].plot(x, y, "--", color="tab:grey", label=name)
    panels["distance"].set(title="Distance from the true labels", ylabel="E ||ybar - y*||")
    panels["purity"].set(title="Purity: own class in what leaves the positive")
    panels["nearest"].set(title="Nearest key of the own class")
    for axes in panels.values():
        axes.set(xlabel="epoch")
        axes.legend(frameon=False)
    return figure


def band(axes: Axes, x: Sequence[float], curves: Sequence[Sequence[float]], label: str, colour: str) -> None:
    """The mean of one curve per seed, and their range."""
    axes.plot(x, np.mean(curves, axis=0), color=colour, label=label)
    axes.fill_between(x, np.min(curves, axis=0), np.max(curves, axis=0), color=colour, alpha=0.2, linewidth=0)
    axes.spines[["top", "right"]].set_visible(False)


def rate_table(tuned: Mapping[str, Mapping[float, Sequence[Record]]]) -> str:
    """Accuracy on held-out training images at every learning rate, kNN / linear, each method's best in bold."""
    rates = sorted({rate for runs in tuned.values() for rate in runs})
    lines = ["| method | seeds | " + " | ".join(map(str, rates)) + " | cost |", "|---|--:|" + "--:|" * (len(rates) + 1)]
    for method in (name for name in METHODS if name in tuned):
        runs = tuned[method]
        chosen = best(runs)
        cells = [f"{method}: {METHODS[method].summary}", str(len(runs[chosen]))]
        for rate in rates:
            means = (float(np.mean([run[measure] for run in runs.get(rate, [])])) for measure in MEASURES)
            cell = " / ".join(f"{mean:.2f}" for mean in means) if rate in runs else ""
            cells.append(f"**{cell}**" if rate == chosen else cell)
        lines.append("| " + " | ".join([*cells, f"{cost(method):.2f}"]) + " |")
    return "\n".join(lines)


def sections(results: Path) -> dict[str, str]:
    """Every table that there are records for in a budget's folder, by the name of its study or of TITLES."""
    found, tuned, budget = records(results), tuning(results), results.name
    tables = {
        name: table(study, found)
        for name, study in STUDIES.items()
        if budget in study.budgets and any(method in found for method in study.methods)
    }
    tables |= {"labels": label_table(list(METHODS), found)} if found else {}
    return tables | ({"rates": rate_table(tuned)} if tuned else {})


def write(results: Path) -> str:
    """Draw the figures of a budget's records beside them, if it has any; returns the tables."""
    found = records(results)
    if found and results.name in STUDIES["methods"].budgets:
        draw_accuracy(DRAWN, found).savefig(results / "accuracy.png", dpi=150)
        draw_labels(LABELLED, found).savefig(results / "labels.png", dpi=150)
    titles = TITLES | {name: study.title for name, study in STUDIES.items()}
    return "\n\n".join(f"### {titles[name]}\n\n{text}" for name, text in sections(results).items())


def fill(document: str, tables: Mapping[str, str]) -> str:
    """The document with every table put between its marks, ``<!-- table: NAME -->`` and ``<!-- end -->``."""
    for name, text in tables.items():
        mark = f"<!-- table: {name} -->\n"
        before, found, rest = document.partition(mark)
        if found:
            document = before + mark + text + "\n<!-- end -->" + rest.partition("<!-- end -->")[2]
    return document
