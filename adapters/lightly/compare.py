"""Does what you know of your images pay? The plain loss, the same loss with the knowledge, the knowledge alone.

    python -m slr_plugin.adapters.lightly compare --data DIR --seeds 5 --groups FILE --estimator FILE.npy [options]

DIR holds train/<class>/* and test/<class>/*. A line or row of a file stands for each training image, class by class and
name by name, as ``sorted`` orders them. Both losses are trained by the recipe, for equally many epochs from the same
initial weights, and judged on the test images. The other options are the recipe's (``cifar10 --help``) and hold for
both; here ``--method`` is ``mocov2`` unless you say ``sane``: one-hot labels, no mixup.

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
from torch import Tensor

from slr_plugin.adapters.lightly import recipe

PLAIN, KNOWN = "plain loss", "with the knowledge"
MEASURES = {"knn": "kNN %", "linear": "linear %"}
# Student's 97.5 % quantiles for 1 to 30 degrees of freedom; beyond, the last one makes intervals a little too wide.
QUANTILES = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
Record = dict[str, Any]  # arm, seed, knn, linear
Run = tuple[str, int, argparse.Namespace]  # what it trains, its seed, what the recipe makes of its options


def main(argv: Sequence[str] | None = None) -> list[Record]:
    """Train what is missing, write records and table; returns the records."""
    args, runs, data, tables = parse(argv)
    from tqdm import tqdm  # type: ignore[import-untyped]

    args.output.mkdir(parents=True, exist_ok=True)
    records: list[Record] = []
    epochs = runs[0][2].epochs
    with tqdm(total=len(runs) * epochs, unit="epoch") as bar:
        for number, (arm, seed, options) in enumerate(runs, start=1):
            bar.set_description(f"{arm}, seed {seed}")
            results = recipe.finished(options) or recipe.train(options, bar)
            records.append({"arm": arm, "seed": seed, "knn": results["knn"], "linear": results["linear"]})
            write(records, args.output)
            bar.update(number * epochs - bar.n)
    for seed in range(args.seeds):
        records += alone(data, tables, runs[0][2], seed)
    print(write(records, args.output))
    print(f"records and table: {args.output}")
    return records


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[Run], Any, dict[str, Tensor]]:
    """The options, the runs, the images, and what is known of those that are trained on; errors end the process."""
    prog = "python -m slr_plugin.adapters.lightly compare"
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("--data", type=Path, metavar="DIR", help="image folders; without it, torchvision's CIFAR-10")
    parser.add_argument("--groups", type=Path, metavar="FILE", help="ids, .npy or a text file, negative: alone")
    parser.add_argument("--estimator", type=Path, metavar="FILE.npy", help="features that the labels follow")
    parser.add_argument("--test-estimator", type=Path, metavar="FILE.npy", help="the same features of the test images")
    parser.add_argument("--seeds", type=recipe.number(int, 1), default=3, metavar="N", help="default: 3")
    parser.add_argument("--output", type=Path, default=Path("outputs/compare"), help="default: outputs/compare")
    args, rest = parser.parse_known_args(argv)
    if own := [option for option in rest if option.split("=")[0] in ("--resume", "--seed", "--beside")]:
        parser.error(f"{own[0]} is not for compare, which chooses it for each run")
    if args.groups is None and args.estimator is None:
        parser.error("give what you know: --groups FILE or --estimator FILE.npy")
    if args.test_estimator is not None and args.estimator is None:
        parser.error("--test-estimator goes with --estimator")
    known = [f"--{name}={getattr(args, name)}" for name in ("groups", "estimator") if getattr(args, name) is not None]
    images = [] if args.data is None else ["--data", str(args.data)]
    runs: list[Run] = []
    for seed in range(args.seeds):
        for arm, folder, knowledge in ((PLAIN, "plain", []), (KNOWN, "known", known)):
            output = args.output / f"{folder}-{seed}"
            goes_on = ["--resume"] if (output / "last.ckpt").is_file() else []
            options = ["--method", "mocov2", *images, *rest, *knowledge, "--seed", str(seed), "--output", str(output)]
            runs.append((arm, seed, recipe.parse([*options, *goes_on])))
    try:
        return args, runs, *look_up(args, runs[0][2])
    except ValueError as error:
        parser.error(str(error))


def look_up(args: argparse.Namespace, options: argparse.Namespace) -> tuple[Any, dict[str, Tensor]]:
    """The images, and the rows of those that the options choose, by ``groups``, ``estimator`` and ``tested``."""
    from slr_plugin.adapters.knowledge import Knowledge, read, read_table
    from slr_plugin.adapters.lightly import training

    data = training.load(options)
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
    return data, tables


def alone(data: Any, tables: dict[str, Tensor], options: argparse.Namespace, seed: int) -> list[Record]:
    """What the groups and the features give without a training; a fifth of the images is judged by the rest."""
    from pytorch_lightning import seed_everything

    from slr_plugin.adapters.lightly import training

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
        knn = training.vote(train, test, data.classes)
        linear = training.judge_linearly(train, test, data.classes, options)
        records.append({"arm": "estimator alone", "seed": seed, "knn": knn, "linear": linear})
    return records


def vote_of_groups(groups: Any, classes: Any, asked: Any) -> Any:
    """The most frequent class in each group that is asked for, or where nobody is in it, of all."""
    frequent = classes.bincount().argmax()
    votes = [classes[groups == group].bincount() if group >= 0 else classes[:0] for group in asked.tolist()]
    return frequent.new_tensor([int(vote.argmax()) if len(vote) else int(frequent) for vote in votes])


def write(records: Sequence[Record], output: Path) -> str:
    """Write records, table and figure; returns the table."""
    (output / "runs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    text = table(records)
    (output / "table.md").write_text(text + "\n")
    draw(records, output / "compare.png")
    return text


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
    """A point for each run and a bar at each mean, by what was measured."""
    from matplotlib.figure import Figure

    arms = list(dict.fromkeys(record["arm"] for record in records))
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, (name, label) in zip(figure.subplots(1, 2), MEASURES.items(), strict=True):
        for place, arm in enumerate(arms):
            found = list(values(records, arm, name).values())
            axes.plot([place] * len(found), found, "o", color=f"C{place}", alpha=0.6)
            if found:
                axes.hlines(np.mean(found), place - 0.2, place + 0.2, color=f"C{place}")
        axes.set_xticks(range(len(arms)), [arm.replace(" ", "\n", 1) for arm in arms])
        axes.set(ylabel=label, xlim=(-0.5, len(arms) - 0.5))
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
