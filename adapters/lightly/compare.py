"""Does what you know of your images pay? The plain loss, the same loss with the knowledge, the knowledge alone.

    python -m slr_plugin.adapters.lightly compare --data DIR --seeds 5 --groups FILE --estimator FILE.npy [options]

Both losses are trained by the recipe (``cifar10 --help``) with the same options, for equally many epochs from the same
initial weights, and judged on the test images. ``--method`` is ``mocov2`` unless you say ``sane``: one-hot labels, no
mixup. ``--seed`` is the first of ``--seeds``.

The knowledge alone is judged without training: features by kNN and a linear classifier, groups by the vote of an
image's group (without one: the most frequent class). It has no rows for the test images, so every seed draws a fifth of
the training images, judged by the rest. With ``--test-estimator FILE.npy``, a row for each test image, features are
judged on these.

The same command again goes on where a training stopped. ``--output`` holds ``runs.jsonl``, ``table.md``,
``compare.png`` and a folder for each run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightly.utils.benchmarking import knn_predict
from matplotlib.figure import Figure
from pytorch_lightning import seed_everything
from torch import Tensor

from slr_plugin.adapters.knowledge import Knowledge, read, read_table
from slr_plugin.adapters.lightly import recipe, training

PLAIN, KNOWN = "plain loss", "with the knowledge"
MEASURES = {"knn": "kNN %", "linear": "linear %"}
# Student's 97.5 % quantiles for 1 to 30 degrees of freedom; beyond, the last one makes intervals a little too wide.
QUANTILES = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
Record = dict[str, Any]  # arm, seed, knn, linear


def main(argv: Sequence[str] | None = None) -> list[Record]:
    """Train what is missing, write records and table; returns the records."""
    parser = recipe.build_parser("python -m slr_plugin.adapters.lightly compare", __doc__)
    features = "features of the test images, as --estimator has them of the others"
    parser.add_argument("--test-estimator", type=Path, metavar="FILE.npy", help=features)
    parser.add_argument("--seeds", type=recipe.count, default=3, metavar="N", help="runs of each (default: 3)")
    parser.set_defaults(method="mocov2", output=Path("outputs/compare"))
    args = parser.parse_args(argv)
    try:
        data = training.load(args)
        tables = look_up(args, data)
    except ValueError as error:
        parser.error(str(error))

    records: list[Record] = []
    seeds = range(args.seed, args.seed + args.seeds)
    for seed in seeds:
        for arm, knowledge in ((PLAIN, {"groups": None, "estimator": None}), (KNOWN, {})):
            print(f"{arm}, seed {seed}", flush=True)
            output = args.output / f"{'plain' if arm == PLAIN else 'known'}-{seed}"
            own = {"seed": seed, "output": output, "resume": (output / "last.ckpt").is_file()}
            results = recipe.run(argparse.Namespace(**vars(args) | own | knowledge))
            records.append({"arm": arm, "seed": seed, "knn": results["knn"], "linear": results["linear"]})
    for seed in seeds:
        records += alone(data, tables, args, seed)
    (args.output / "runs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (args.output / "table.md").write_text(table(records) + "\n")
    draw(records, args.output / "compare.png")
    print(f"{table(records)}\nrecords and table: {args.output}")
    return records


def look_up(args: argparse.Namespace, data: training.Data) -> dict[str, Tensor]:
    """The rows of the images that are trained on, ``groups`` and ``estimator``, and ``tested``, of the test images."""
    if args.groups is None and args.estimator is None:
        raise ValueError("give what you know: --groups FILE or --estimator FILE.npy")
    if not data.judged:
        raise ValueError(f"--data: compare needs class folders in {args.data}/train and {args.data}/test")
    knowledge = Knowledge(**read("--", args.groups, args.estimator))
    knowledge.attach(data.views)
    tables = knowledge.of(torch.tensor(list(data.views.indices)))
    if args.test_estimator is not None:
        features, tested = read_table("--test-estimator", args.test_estimator), data.judged[1]
        wanted = (len(tested.dataset), knowledge.estimator_dim)
        if features.shape != wanted:
            raise ValueError(f"--test-estimator must be of shape {wanted}, got {tuple(features.shape)}")
        tables["tested"] = features[list(tested.indices)]
    return tables


def alone(data: training.Data, tables: dict[str, Tensor], options: argparse.Namespace, seed: int) -> list[Record]:
    """What the groups and the features give without a training; a fifth of the images is judged by the rest."""
    seed_everything(seed)
    classes, test_classes = (torch.tensor(part.dataset.targets)[list(part.indices)] for part in data.judged)
    order = torch.randperm(len(classes))
    judged, voting = order[: len(order) // 5], order[len(order) // 5 :]
    records: list[Record] = []
    if "groups" in tables:
        votes = vote_of_groups(tables["groups"][voting], classes[voting], tables["groups"][judged])
        accuracy = 100 * (votes == classes[judged]).float().mean().item()
        records.append({"arm": "groups alone", "seed": seed, "knn": accuracy, "linear": None})
    if "estimator" in tables:
        # Unit rows, as the loss takes them, and then about a unit of variance, as the linear classifier likes them.
        scale = tables["estimator"].shape[1] ** 0.5
        features = {name: scale * F.normalize(tables[name]) for name in tables.keys() - {"groups"}}
        train, test = ((features["estimator"][rows], classes[rows]) for rows in (voting, judged))
        if "tested" in tables:
            train, test = (features["estimator"], classes), (features["tested"], test_classes)
        knn = vote(train, test, len(data.classes))
        linear = training.judge_linearly(train, test, len(data.classes), options)
        records.append({"arm": "estimator alone", "seed": seed, "knn": knn, "linear": linear})
    return records


def vote(train: training.Features, test: training.Features, num_classes: int) -> float:
    """Test accuracy in per cent of lightly's kNN vote, as during training."""
    bank, classes = F.normalize(train[0]).T, train[1]
    k, parts = min(training.KNN_K, len(classes)), torch.split(F.normalize(test[0]), 500)
    votes = [knn_predict(part, bank, classes, num_classes, k, training.KNN_T)[:, 0] for part in parts]
    return 100 * (torch.cat(votes) == test[1]).float().mean().item()


def vote_of_groups(groups: Tensor, classes: Tensor, asked: Tensor) -> Tensor:
    """The most frequent class in each group that is asked for, or where nobody is in it, of all."""
    frequent = classes.bincount().argmax()
    votes = [classes[groups == group].bincount() if group >= 0 else classes[:0] for group in asked.tolist()]
    return frequent.new_tensor([int(vote.argmax()) if len(vote) else int(frequent) for vote in votes])


def table(records: Sequence[Record]) -> str:
    """Means over the seeds with Student's 95 % intervals, and the difference, paired by seed."""
    lines = [f"| | seeds | {' | '.join(MEASURES.values())} |", "|---|--:|--:|--:|"]
    for arm in dict.fromkeys(record["arm"] for record in records):
        cells = [interval(values(records, arm, name).values()) for name in MEASURES]
        lines.append(f"| {arm} | {len(values(records, arm, 'knn'))} | {' | '.join(cells)} |")
    cells = []
    for name in MEASURES:
        plain, known = (values(records, arm, name) for arm in (PLAIN, KNOWN))
        cells.append(interval([known[seed] - plain[seed] for seed in plain if seed in known], sign="+"))
    seeds = len(values(records, KNOWN, "knn"))
    return "\n".join([*lines, f"| difference, paired by seed | {seeds} | {' | '.join(cells)} |"])


def interval(numbers: Iterable[float], sign: str = "") -> str:
    """The mean and, from two numbers on, Student's 95 % interval of it."""
    numbers = list(numbers)
    if len(numbers) < 2:
        return f"{numbers[0]:{sign}.2f}" if numbers else "-"
    quantile = QUANTILES[min(len(numbers) - 1, len(QUANTILES)) - 1]
    mean, margin = np.mean(numbers), quantile * np.std(numbers, ddof=1) / len(numbers) ** 0.5
    return f"{mean:{sign}.2f} ({mean - margin:{sign}.2f} to {mean + margin:{sign}.2f})"


def values(records: Sequence[Record], arm: str, name: str) -> dict[int, float]:
    """A measure by seed, where there is one."""
    return {r["seed"]: r[name] for r in records if r["arm"] == arm and r[name] is not None}


def draw(records: Sequence[Record], path: Path) -> None:
    """A point for each run, by what was measured."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, (name, label) in zip(figure.subplots(1, 2), MEASURES.items(), strict=True):
        found = [record for record in records if record[name] is not None]
        axes.plot([record["arm"] for record in found], [record[name] for record in found], "o", alpha=0.6)
        axes.set(ylabel=label)
        axes.margins(x=0.2)
    figure.savefig(path, dpi=150)
