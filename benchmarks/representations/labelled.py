"""What a few labels are worth: encoders of the budget ``known`` again, judged by those 250 images of which they know.

Elsewhere every encoder is judged with the classes of all training images, which nobody has who has 250.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from benchmarks.representations import report
from benchmarks.representations.budgets import BUDGETS
from benchmarks.representations.data import Images, load
from benchmarks.representations.features import LABELLED, draw_labelled, gradients
from benchmarks.representations.harness import FILE, best_rate, read
from benchmarks.representations.methods import METHODS
from benchmarks.representations.objectives import Network
from benchmarks.representations.training import Features, extract, knn_accuracy, linear_accuracy, train

BUDGET = "known"
TRAINED = ("simclr-cold", "simclr-cold-sharp-gradients", "drawn-labels", "drawn-cross-entropy", "drawn-supcon")
UNTRAINED = "histograms"
STRENGTHS = tuple(10.0**power for power in range(-4, 2))  # of the classifier of few labels, by cross-validation


def run(seeds: int, data: Path, known: Path, results: Path, cache: Path) -> None:
    """Train and judge what is not in ``results`` yet, at the learning rates that ``known``'s records chose."""
    budget = BUDGETS[BUDGET]
    images = load(data, budget, torch.device("cpu"))
    histograms = tuple(Features(gradients(part, images[0]), part.classes) for part in images)
    done = {(record["method"], record["seed"]) for record in read(results)}
    results.mkdir(parents=True, exist_ok=True)
    for seed, method in tqdm(list(itertools.product(range(seeds), (UNTRAINED, *TRAINED)))):
        if (method, seed) in done:
            continue
        if method == UNTRAINED:
            records = [{"beside": False, **scores} for scores in judged(histograms, seed)]
        else:
            rate, networks = best_rate(method, budget.rates, known), list[Network]()
            train(method, seed, budget, *images, cache, observe=networks.append, rate=rate)
            records = [{"rate": rate, **scores} for scores in _judged_twice(networks[0], images, histograms, seed)]
        with (results / FILE).open("a") as file:  # all of a training or nothing
            file.writelines(json.dumps({"method": method, "seed": seed, **record}) + "\n" for record in records)


def _judged_twice(
    network: Network, images: tuple[Images, Images], histograms: tuple[Features, ...], seed: int
) -> Iterator[dict[str, Any]]:
    """The encoder's features alone, and beside the histograms."""
    alone = tuple(extract(network, part) for part in images)
    both = tuple(
        Features(torch.cat([F.normalize(part.values) for part in parts], dim=1), parts[0].classes)
        for parts in zip(alone, histograms, strict=True)
    )
    for beside, features in ((False, alone), (True, both)):
        yield from ({"beside": beside, **scores} for scores in judged(features, seed))


def judged(features: tuple[Features, ...], seed: int) -> Iterator[dict[str, Any]]:
    """Accuracies on test images with the classes of the seed's few images, and with those of all.

    Args:
        features: of the training images and of the test images.
        seed: of the images with a class, which are those of the estimator ``drawn-guesses``.
    """
    table, test = features
    few = draw_labelled(len(table.classes), seed)
    for known, linear in ((few, few_labels_accuracy), (torch.arange(len(table.classes)), linear_accuracy)):
        part = Features(table.values[known], table.classes[known])
        arrays = [values.numpy() for one in (part, test) for values in one]
        yield {"labels": len(known), "knn": knn_accuracy(part, test), "linear": linear(*arrays)}


def few_labels_accuracy(*arrays: Any) -> float:
    """As :func:`linear_accuracy`, with a strength of regularisation by cross-validation: few labels need it."""
    train, train_classes, test, test_classes = arrays
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    chosen = GridSearchCV(probe, {"logisticregression__C": STRENGTHS}, cv=5).fit(train, train_classes)
    return 100 * float(chosen.score(test, test_classes))


def table(results: Path) -> str:
    """Means over the seeds, and differences to the histograms with few labels."""
    records = read(results)
    total = max(record["labels"] for record in records)
    lines = [
        f"| method | features | {LABELLED} labels: kNN % | linear % | linear difference | {total:,} labels: kNN % "
        "| linear % |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]

    def scores(measure: str, **wanted: Any) -> list[float]:
        found = [record for record in records if wanted.items() <= record.items()]
        return [record[measure] for record in sorted(found, key=lambda record: record["seed"])]

    few = functools.partial(scores, labels=LABELLED)
    base = few("linear", method=UNTRAINED)
    for method, beside in [(UNTRAINED, False), *itertools.product(TRAINED, (False, True))]:
        which = {"method": method, "beside": beside}
        title = f"{method}: {METHODS[method].summary}" if method in METHODS else UNTRAINED
        apart = [mine - theirs for mine, theirs in zip(few("linear", **which), base, strict=True)]
        cells = [title, "untrained" if method == UNTRAINED else "both" if beside else "encoder"]
        cells += [report.spread(few(measure, **which)) for measure in report.MEASURES]
        cells += [report.interval(apart) if method != UNTRAINED else ""]
        cells += [report.spread(scores(measure, labels=total, **which)) for measure in report.MEASURES]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
