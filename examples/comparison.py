"""Compares ways to train an encoder without labels on any samples; signals.py, tabular.py and views.py hold data.

    python examples/comparison.py RECORDS.jsonl PAGE.md

writes tables of records into a page, between ``<!-- table: DATA -->`` and ``<!-- end -->``.

Every method trains on pairs of augmented views without a queue, chooses its settings on held-out training groups, and
is judged on held-out groups by its neighbours and by a linear classifier. Methods with mixed queries take two thirds of
the steps, since a step costs them three passes where the others have two. Beside labels from what is known stand its
rivals: that itself, untrained, and the encoder that predicts it. Where it is a number, such as a recording's, samples
of one number can be each other's positives instead, which is SupCon, or be left out of the negatives.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, StratifiedKFold, train_test_split
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn
from tqdm import tqdm

from slr_plugin import CosineConfidence, MomentumMixup, SLRLoss

Record = dict[str, Any]

TEMPERATURE = 0.2
RATES, SHARPENINGS = (0.01, 0.03, 0.1), (1.0, 0.5)
MIXED = ("mixup", "both")
GROUPED = ("supcon", "apart")  # told which samples belong together


class Task(NamedTuple):
    """Samples, how an encoder is trained on them, and the classes by which it is judged."""

    samples: Tensor  # (n, ...), the first dimension is the samples'
    classes: Tensor  # (n,)
    encoder: Callable[[], nn.Module]  # samples to features (s, 128), with a batch norm that has seen them
    augment: Callable[[Tensor, Tensor], Tensor]  # samples, and all training samples, to a random view
    raw: Tensor  # (n, r), the features that an encoder has to beat
    groups: Tensor | None = None  # (n,), such as subjects, none of which is trained on and judged on
    estimators: Mapping[str, Tensor] = {}  # (n, e) each, what labels may be estimated from instead
    batch: int = 256
    partner: Task | None = None  # another measurement of the same samples, which may be the second view


class Settings(NamedTuple):
    """What is chosen on held-out training groups."""

    rate: float
    sharpening: float = 1.0


class Scores(NamedTuple):
    """Accuracy in per cent."""

    knn: float
    linear: float


def methods(task: Task) -> dict[str, str]:
    """What is compared, and how a table calls it."""
    names = {
        "raw": "raw features",
        "nt-xent": "NT-Xent",
        "mixup": "momentum mixup",
        "refined": "refined labels, the paper's rule",
        "both": "refined labels and mixup",
    }
    for name, table in task.estimators.items():
        names[name] = f"labels from {name}"
        if is_number(table):
            names[f"supcon {name}"] = f"SupCon with {name}"
            names[f"apart {name}"] = f"others of {name} left out"
        else:
            names[f"alone {name}"] = f"{name}, untrained"
            if not torch.equal(table, task.raw):
                names[f"joint {name}"] = f"raw features beside {name}, untrained"
            names[f"predict {name}"] = f"{name} predicted"
            names[f"beside {name}"] = f"labels from {name}, beside {name}"
    if task.partner:
        names["contrast"] = "NT-Xent with the other measurement"
    return names | {"classes": "labels that are told the classes"}


UNTRAINED = ("raw", "alone", "joint")


def is_number(table: Tensor) -> bool:
    """Whether the rows (n, e) of an estimator are one-hot."""
    return bool((table.sum(1) == 1).all() and (table.amax(1) == 1).all())


def taken_apart(method: str, task: Task) -> tuple[str, str]:
    """What is done and with what estimator, if with any: ("labels", "statistics"), ("nt-xent", "")."""
    kind, _, name = method.partition(" ")
    if name in task.estimators:
        return kind, name
    return ("labels", method) if method in task.estimators else (method, "")


def head() -> nn.Module:
    """The projection that is thrown away after training."""
    return nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 64))


def loss_of(method: str, sharpening: float, steps: int) -> SLRLoss:
    """The criterion of a method."""
    if method == "apart":
        return SLRLoss(TEMPERATURE, confidence=0.0, same_group="ignored")
    if method in ("nt-xent", "contrast", "mixup", "supcon"):
        return SLRLoss(TEMPERATURE, confidence=0.0)
    assert method not in UNTRAINED
    if method in ("refined", "both"):
        return SLRLoss(TEMPERATURE, sharpening=sharpening, confidence=CosineConfidence(0.0, 1.0, steps))
    # Beyond any confidence of the paper, the one-hot part is gone and the label is what the estimator says.
    return SLRLoss(TEMPERATURE, sharpening=sharpening, confidence=1000.0, refined_weight=1.0)


def train(method: str, task: Task, chosen: Tensor, settings: Settings, steps: int, seed: int = 0) -> nn.Module:
    """Train an encoder on some of the samples."""
    torch.manual_seed(seed)
    kind, known = taken_apart(method, task)
    method = known if kind == "beside" else kind if kind in GROUPED else method
    encoder, projection = task.encoder(), head()
    networks, second = [encoder, projection], None
    if kind == "predict":
        predictor = nn.Linear(64, task.estimators[known].shape[1])
        networks.append(predictor)
    if method == "contrast":
        assert task.partner
        second = nn.Sequential(task.partner.encoder(), head())
        networks.append(second)
    steps = round(steps * 2 / 3) if method in MIXED else steps
    parameters = [parameter for network in networks for parameter in network.parameters()]
    optimizer = torch.optim.SGD(parameters, settings.rate, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    criterion, mixup = loss_of(method, settings.sharpening, steps), MomentumMixup(kappa=2.0)
    estimators = {**task.estimators, "classes": F.one_hot(task.classes).float()}
    pool = task.samples[chosen]
    for _ in range(steps):
        batch = chosen[torch.randperm(len(chosen))[: task.batch]]
        first, other = (task.augment(task.samples[batch], pool) for _ in range(2))
        if second is None:
            projections = projection(encoder(torch.cat([first, other]))).chunk(2)
        else:
            partner = task.partner.augment(task.partner.samples[batch], task.partner.samples[chosen])
            projections = projection(encoder(first)), second(partner)
        if kind == "predict":
            target = task.estimators[known][batch]
            loss = 1 - torch.stack([F.cosine_similarity(predictor(part), target) for part in projections]).mean()
        elif kind in GROUPED:
            loss = criterion(*projections, groups=task.estimators[known][batch].argmax(1))
        elif method in MIXED:
            mixed, mix = mixup(first, other)
            loss = criterion(*projections, projection(encoder(mixed)), mix)
        else:
            estimator = estimators[method][batch] if method in estimators else None
            loss = criterion(*projections, estimator=estimator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return encoder.eval()


def judge(features: Tensor, classes: Tensor, train_part: Tensor, test_part: Tensor) -> Scores:
    """Ten neighbours, and a linear classifier, on frozen features."""
    table, target = F.normalize(features).numpy(), classes.numpy()
    judges = KNeighborsClassifier(10), LogisticRegression(C=10, max_iter=1000)
    return Scores(
        *(
            100 * float(judge.fit(table[train_part], target[train_part]).score(table[test_part], target[test_part]))
            for judge in judges
        )
    )


@torch.no_grad()
def features_of(encoder: nn.Module, task: Task) -> Tensor:
    """The features (n, 128) of all samples."""
    return torch.cat([encoder(part) for part in task.samples.split(1024)])


def run(
    method: str, task: Task, train_part: Tensor, test_part: Tensor, settings: Settings, steps: int, seed: int = 0
) -> Scores:
    """Train on one part and judge on the other."""
    kind, known = taken_apart(method, task)
    if kind in ("raw", "joint"):
        features = task.raw
    elif kind == "alone":
        features = task.estimators[known]
    else:
        features = features_of(train(method, task, train_part, settings, steps, seed), task)
    if kind in ("beside", "joint"):
        features = torch.cat([F.normalize(part) for part in (features, task.estimators[known])], dim=1)
    return judge(features, task.classes, train_part, test_part)


def folds(task: Task, count: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Training and judged samples, ``count`` times; no group is in both. Another seed has other folds."""
    if task.groups is None:
        parts = StratifiedKFold(count, shuffle=True, random_state=seed).split(task.raw, task.classes)
    else:
        fixed = {"shuffle": True, "random_state": seed} if seed else {}
        parts = GroupKFold(count, **fixed).split(task.raw, task.classes, task.groups)
    return [(torch.from_numpy(train_part), torch.from_numpy(test_part)) for train_part, test_part in parts]


def choose(method: str, task: Task, train_part: Tensor, steps: int) -> Settings:
    """The settings with the best accuracy on about a fifth of the training samples, in groups of their own."""
    kind, _ = taken_apart(method, task)
    refines = kind in ("refined", "both", "classes", "labels", "beside")
    candidates = [Settings(*pair) for pair in itertools.product(RATES, SHARPENINGS if refines else (1.0,))]
    if kind in UNTRAINED:
        return candidates[0]
    if task.groups is None:
        strata = task.classes[train_part]
        inner, held_out = train_test_split(train_part, test_size=0.2, random_state=0, stratify=strata)
    else:
        parts = GroupKFold(4).split(train_part, groups=task.groups[train_part])
        inner, held_out = (train_part[part] for part in next(parts))
    return max(candidates, key=lambda settings: sum(run(method, task, inner, held_out, settings, steps)))


def interval(differences: Sequence[float], folds: int | None = None) -> tuple[float, float]:
    """The mean of paired differences, and how far Student's 95 % interval reaches to both sides.

    Folds share training samples, so that their differences are not independent. Nadeau and Bengio (2003) put the
    variance of the mean at s^2 (1/n + judged/trained) in place of s^2/n; of K folds that share is 1/(K - 1).

    Args:
        differences: one for each fold, of one or more seeds.
        folds: K; None: the differences share no samples, or are of seeds alone.
    """
    count, shared = len(differences), 1 / (folds - 1) if folds else 0.0
    error = np.std(differences, ddof=1) * (1 / count + shared) ** 0.5
    return float(np.mean(differences)), float(stats.t.ppf(0.975, count - 1) * error)


def difference(mine: Sequence[float], theirs: Sequence[float], folds: int) -> str:
    """A paired difference with its interval."""
    mean, margin = interval(np.subtract(mine, theirs), folds)
    return f"{mean:+.2f} ({mean - margin:+.2f} to {mean + margin:+.2f})"


class Records:
    """What was measured, a line of a file for each fold: a run that was stopped goes on where it was.

    Args:
        path: of the file; None keeps nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path and path.exists() else []
        self.found: list[Record] = [json.loads(line) for line in lines]

    def of(self, **circumstances: Any) -> list[Record]:
        """Those of the same data, title, seed or fold."""
        return [record for record in self.found if circumstances.items() <= record.items()]

    def add(self, record: Record) -> None:
        """Keep one more."""
        self.found.append(record)
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")

    def results(self, name: str, folds: int) -> Results:
        """All scores of a data set, in the order of seeds and folds."""
        ours = sorted(self.of(data=name, folds=folds), key=lambda record: (record["seed"], record["fold"]))
        titles = dict.fromkeys(record["method"] for record in self.of(data=name, folds=folds))
        return {
            title: [Scores(one["knn"], one["linear"]) for one in ours if one["method"] == title] for title in titles
        }


def compare(
    task: Task,
    steps: int,
    count: int,
    name: str = "",
    only: Sequence[str] = (),
    seeds: int = 1,
    records: Records | None = None,
) -> Results:
    """Choose settings on the first fold's training samples, train on every fold; NT-Xent and ``only``, or all.

    Without NT-Xent if nothing else is trained. The settings are the first seed's for all seeds.
    """
    records = records or Records(None)
    titles = methods(task)
    if unknown := set(only) - set(titles.values()):
        raise SystemExit(f"no method is called {', '.join(unknown)}; there are {', '.join(titles.values())}")
    wanted = {key: title for key, title in titles.items() if not only or title in only}
    if any(taken_apart(key, task)[0] not in UNTRAINED for key in wanted):
        wanted = {key: title for key, title in titles.items() if key in wanted or key == "nt-xent"}
    for method, title in tqdm(wanted.items(), desc=name, unit="method"):
        mine = {"data": name, "method": title, "steps": steps, "folds": count}
        known = records.of(**mine)
        if len(known) == seeds * count:
            continue
        settings = Settings(known[0]["rate"], known[0]["sharpening"]) if known else None
        settings = settings or choose(method, task, folds(task, count)[0][0], steps)
        for seed, fold in itertools.product(range(seeds), range(count)):
            if not records.of(**mine, seed=seed, fold=fold):
                scores = run(method, task, *folds(task, count, seed)[fold], settings, steps, seed)
                records.add({**mine, "seed": seed, "fold": fold, **settings._asdict(), **scores._asdict()})
        tqdm.write(f"{name} {title}: {settings}")
    return {title: scores for title, scores in records.results(name, count).items() if title in wanted.values()}


Results = dict[str, list[Scores]]  # of every fold, by title


def table(results: Mapping[str, Results], folds: int) -> str:
    """Means over the folds, and differences to NT-Xent paired by fold."""
    lines = ["| data | method | kNN % | linear % | kNN difference | linear difference |", "|---|---|--:|--:|--:|--:|"]
    for name, rows in results.items():
        base = list(zip(*rows.get("NT-Xent", []), strict=True))
        for title, scores in rows.items():
            mine = list(zip(*scores, strict=True))
            means = [f"{np.mean(values):.2f}" for values in mine]
            has_base = base and title != "NT-Xent"
            apart = [difference(*pair, folds) for pair in zip(mine, base, strict=True)] if has_base else ["", ""]
            lines.append("| " + " | ".join([name, title, *means, *apart]) + " |")
    return "\n".join(lines)


def fill(page: str, records: Records) -> str:
    """The page with a table of records between the marks of every data set."""

    def filled(found: re.Match[str]) -> str:
        name = found[2]
        folds = records.of(data=name)[0]["folds"]
        return f"{found[1]}{table({name: records.results(name, folds)}, folds)}\n"

    return re.sub(r"(<!-- table: ([^\n]+) -->\n).*?(?=<!-- end -->)", filled, page, flags=re.DOTALL)


def draw(results: Mapping[str, Results], folds: int, path: Path) -> None:
    """Differences to NT-Xent with their intervals, a panel for each data set."""
    titles = [title for title in dict.fromkeys(itertools.chain(*results.values())) if title != "NT-Xent"]
    figure = Figure(figsize=(4.5 + 2.5 * len(results), 1 + 0.4 * len(titles)), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(results), sharey=True))
    for panel, (name, rows) in zip(panels, results.items(), strict=True):
        for measure, colour, shift in (("knn", "tab:blue", -0.1), ("linear", "tab:orange", 0.1)):
            base = [getattr(scores, measure) for scores in rows["NT-Xent"]]
            for line, title in enumerate(titles):
                if title in rows:
                    mine = [getattr(scores, measure) for scores in rows[title]]
                    mean, margin = interval(np.subtract(mine, base), folds)
                    label = measure if line == 0 else None
                    panel.errorbar(mean, line + shift, xerr=margin, fmt="o", color=colour, capsize=3, label=label)
        panel.axvline(0, color="tab:grey", linewidth=1)
        panel.set(title=name, xlabel="points over NT-Xent")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(titles)), titles)
    panels[0].invert_yaxis()
    panels[0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main(description: str | None, tasks: Callable[[Path | None], Mapping[str, Task]], steps: int) -> None:
    """The command of an example: compares on every task, prints a table of each and draws a figure."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="see above")
    parser.add_argument("--only", nargs="*", help="these data sets only")
    parser.add_argument(
        "--methods", nargs="*", default=[], help="of these and NT-Xent only, by their names in the table"
    )
    parser.add_argument("--steps", type=int, default=steps, help="default: %(default)s")
    parser.add_argument("--folds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=1, help="of weights, views and folds (default: %(default)s)")
    parser.add_argument("--records", type=Path, help="keep the scores of every fold, and go on from those in this file")
    parser.add_argument("--output", type=Path, help="a figure")
    args = parser.parse_args()
    torch.set_num_threads(1)
    chosen = {name: task for name, task in tasks(args.data).items() if not args.only or name in args.only}
    results, records = {}, Records(args.records)
    for name, task in chosen.items():
        results[name] = compare(task, args.steps, args.folds, name, args.methods, args.seeds, records)
        print(table({name: results[name]}, args.folds), flush=True)
    if args.output:
        draw(results, args.folds, args.output)


# ------------------------------------------------------------------------------------------------- tables of numbers


class Layers(nn.Sequential):
    """Two layers for rows of numbers."""

    def __init__(self, width: int) -> None:
        super().__init__(
            nn.Linear(width, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 128), nn.BatchNorm1d(128), nn.ReLU()
        )


def corrupt(samples: Tensor, pool: Tensor, share: float = 0.4) -> Tensor:
    """Replace a share of the values by those of other samples, drawn for each value (SCARF, Bahri and others, 2022)."""
    drawn = pool[torch.randint(len(pool), samples.shape), torch.arange(samples.shape[1])]
    return torch.where(torch.rand(samples.shape) < share, drawn, samples)


def standardised(table: Tensor) -> Tensor:
    """Columns of mean 0 and deviation 1."""
    return (table - table.mean(0)) / table.std(0).clamp(min=1e-6)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write tables of records into a page, see above.")
    parser.add_argument("records", type=Path, help="a .jsonl file")
    parser.add_argument("page", type=Path, help="Markdown with marks")
    args = parser.parse_args()
    args.page.write_text(fill(args.page.read_text(), Records(args.records)))
