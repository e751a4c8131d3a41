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

The same command again goes on where it stopped. ``--output`` holds ``runs.jsonl``, ``table.md``, ``compare.png``, and a
folder for each run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slr_plugin.adapters.lightly import recipe
from slr_plugin.adapters.lightly.knowledge import read, read_table

PLAIN, KNOWN = "plain loss", "with the knowledge"
MEASURES = {"knn": "kNN %", "linear": "linear %"}
# Student's 97.5 % quantiles for 1 to 30 degrees of freedom; beyond, the last one makes intervals a little too wide.
QUANTILES = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
Record = dict[str, Any]  # arm, seed, knn, linear


def main(argv: Sequence[str] | None = None) -> list[Record]:
    """Train what is missing, write records, table and figure; returns the records."""
    args, runs = parse(argv)
    from tqdm import tqdm  # type: ignore[import-untyped]

    folders = recipe.find_images(args.data)
    records: list[Record] = []
    epochs = runs[0][2].epochs
    with tqdm(total=len(runs) * epochs, unit="epoch") as bar:
        for number, (arm, seed, options) in enumerate(runs, start=1):
            bar.set_description(f"{arm}, seed {seed}")
            results = recipe.finished(options)
            if results is None:
                results = recipe.train(options, bar)
            records.append({"arm": arm, "seed": seed, "knn": results["knn"], "linear": results["linear"]})
            write(records, args.output)
            bar.update(number * epochs - bar.n)
    for seed in range(args.seeds):
        records += alone(args, runs[0][2], folders, seed)
        write(records, args.output)
    print(write(records, args.output))
    print(f"records, table and figure: {args.output}")
    return records


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[tuple[str, int, argparse.Namespace]]]:
    """The options, and those of every run: what it trains, its seed, what the recipe makes of its options."""
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
    try:
        folders = recipe.find_images(args.data)
        if folders is not None and folders.test is None:
            raise ValueError(f"--data: compare needs class folders in {args.data / 'train'} and {args.data / 'test'}")
        tables = read(args.estimator, args.groups, 50_000 if folders is None else folders.images)
        if args.test_estimator is not None:
            images = 10_000 if folders is None else folders.tested
            width = read_table("test-estimator", args.test_estimator, images).shape[1]
            if width != tables["estimator"].shape[1]:
                raise ValueError(f"--test-estimator has {width} features, --estimator {tables['estimator'].shape[1]}")
    except ValueError as error:
        parser.error(str(error))
    known = [f"--{name}={getattr(args, name)}" for name in ("groups", "estimator") if getattr(args, name) is not None]
    data = [] if args.data is None else ["--data", str(args.data)]
    runs = []
    for seed in range(args.seeds):
        for arm, folder, knowledge in ((PLAIN, "plain", []), (KNOWN, "known", known)):
            output = args.output / f"{folder}-{seed}"
            goes_on = ["--resume"] if (output / "last.ckpt").is_file() else []
            options = ["--method", "mocov2", *data, *rest, *knowledge, "--seed", str(seed), "--output", str(output)]
            runs.append((arm, seed, recipe.parse([*options, *goes_on])))
    return args, runs


def alone(args: argparse.Namespace, options: argparse.Namespace, folders: Any, seed: int) -> list[Record]:
    """What the groups and the features give without a training; from its file where it was measured before."""
    path = args.output / f"alone-{seed}.json"
    settings = recipe.plain(args) | {"seeds": None, "limit": options.limit, "linear_epochs": options.linear_epochs}
    if path.is_file() and (before := json.loads(path.read_text()))["settings"] == settings:
        return list(before["records"])
    import torch
    from pytorch_lightning import seed_everything

    from slr_plugin.adapters.lightly import training

    seed_everything(seed)
    parts: list[Any] = [training.part(options, folders, place) for place in ("train", "test")]
    (train, test), num_classes = parts, len(parts[0].dataset.classes)
    classes, test_classes = (torch.tensor(part.dataset.targets)[list(part.indices)] for part in parts)
    tables = {name: table[list(train.indices)] for name, table in read(args.estimator, args.groups).items()}
    order = torch.randperm(len(classes))
    judged, voting = order[: len(order) // 5], order[len(order) // 5 :]
    records = []
    if "groups" in tables:
        votes = vote_of_groups(tables["groups"][voting], classes[voting], tables["groups"][judged])
        accuracy = 100 * (votes == classes[judged]).float().mean().item()
        records.append({"arm": "groups alone", "seed": seed, "knn": accuracy, "linear": None})
    if "estimator" in tables:
        # Unit rows, as the loss takes them, and then about a unit of variance, as the linear classifier likes them.
        scale = tables["estimator"].shape[1] ** 0.5
        features = scale * torch.nn.functional.normalize(tables["estimator"])
        pairs = (features[voting], classes[voting]), (features[judged], classes[judged])
        if args.test_estimator is not None:
            rows = read_table("test-estimator", args.test_estimator)[list(test.indices)]
            pairs = (features, classes), (scale * torch.nn.functional.normalize(rows), test_classes)
        scores = {"knn": training.vote(pairs[0], pairs[1], num_classes)}
        scores["linear"] = training.judge_linearly(pairs[0], pairs[1], num_classes, options)
        records.append({"arm": "estimator alone", "seed": seed, **scores})
    path.write_text(json.dumps({"settings": settings, "records": records}))
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
    for arm in arms(records):
        seeds = len([record for record in records if record["arm"] == arm])
        cells = [interval(values(records, arm, name).values()) for name in MEASURES]
        lines.append(f"| {arm} | {seeds} | {' | '.join(cells)} |")
    pairs = {name: [values(records, arm, name) for arm in (PLAIN, KNOWN)] for name in MEASURES}
    seeds = len(pairs["knn"][0].keys() & pairs["knn"][1].keys())
    cells = [interval([b[seed] - a[seed] for seed in a if seed in b], sign="+") for a, b in pairs.values()]
    return "\n".join([*lines, f"| difference, paired by seed | {seeds} | {' | '.join(cells)} |"])


def interval(numbers: Iterable[float], sign: str = "") -> str:
    """The mean and, from two numbers on, Student's 95 % interval of it."""
    numbers = list(numbers)
    if len(numbers) < 2:
        return f"{numbers[0]:{sign}.2f}" if numbers else "-"
    quantile = QUANTILES[min(len(numbers) - 1, len(QUANTILES)) - 1]
    mean, margin = np.mean(numbers), quantile * np.std(numbers, ddof=1) / len(numbers) ** 0.5
    return f"{mean:{sign}.2f} ({mean - margin:{sign}.2f} to {mean + margin:{sign}.2f})"


def arms(records: Sequence[Record]) -> list[str]:
    """What was measured, in the order of the table."""
    return list(dict.fromkeys(record["arm"] for record in records))


def values(records: Sequence[Record], arm: str, name: str) -> dict[int, float]:
    """A measure by seed, where there is one."""
    return {r["seed"]: r[name] for r in records if r["arm"] == arm and r[name] is not None}


def draw(records: Sequence[Record], path: Path) -> None:
    """A point for each run, a line between the two of a seed, and a bar at each mean."""
    from matplotlib.figure import Figure

    names = arms(records)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, (name, label) in zip(figure.subplots(1, 2), MEASURES.items(), strict=True):
        columns = [values(records, arm, name) for arm in names]
        for place, column in enumerate(columns):
            axes.plot([place] * len(column), list(column.values()), "o", color=f"C{place}", alpha=0.6)
            if column:
                axes.hlines(np.mean(list(column.values())), place - 0.2, place + 0.2, color=f"C{place}")
        for seed in columns[0].keys() & (columns[1].keys() if len(columns) > 1 else set()):
            axes.plot([0, 1], [columns[0][seed], columns[1][seed]], color="grey", linewidth=0.7, zorder=0)
        axes.set_xticks(range(len(names)), [arm.replace(" ", "\n", 1) for arm in names])
        axes.set(ylabel=label, xlim=(-0.5, len(names) - 0.5))
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
