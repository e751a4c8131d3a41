"""MoCo and SANE side by side: same encoder, initial weights, data order, views and number of epochs.

    python examples/compare.py                            scikit-learn's digits, 2 minutes on 2 cores
    python examples/compare.py --data DIR --epochs 200    DIR/train/<class>/* and DIR/test/<class>/*, or DIR/<class>/*

Both train a query network against the outputs of its moving average, and differ in the loss alone:

- MoCo: ``SLRLoss(confidence=0, in_batch_keys=False)``, which is InfoNCE over the own positive and the queue;
- SANE: refined labels over batch and queue, and momentum mixup, at the paper's settings for CIFAR-10. Its mixed
  queries cost a second forward and backward pass per step: the table shows the seconds.

It prints the accuracies on held-out images and draws one figure. No class is seen in training: classes serve the
k-nearest-neighbour classifier and the linear probe, on the frozen encoder, and the measurement of the labels.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from comparison import interval
from images import Dataset, load_folder, load_scans, minibatches
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.base import ClassifierMixin
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from tqdm import tqdm

from slr_plugin import SLRLoss
from slr_plugin.diagnostics import LabelMonitor, LabelQuality
from slr_plugin.presets import CIFAR10

METHODS = ("MoCo", "SANE")
DIM = 128  # of the projected features
EMA_MOMENTUM = 0.99  # ImageNet's usual 0.999 averages over 1,000 steps, most of a short run


class Run(NamedTuple):
    """What one training run measured; accuracies in per cent."""

    epochs: list[int]  # at which knn was measured: 0 is the untrained encoder
    knn: list[float]
    linear: tuple[float, float]  # of the untrained and of the trained encoder
    labels: list[LabelQuality]  # per epoch
    seconds: float


def build_network(channels: int) -> nn.Sequential:
    """A small convolutional encoder, then the paper's three-layer projection head."""

    def stage(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

    stages = [*stage(channels, 32, 1), *stage(32, 64, 2), *stage(64, 128, 2)]
    encoder = nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    head = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, DIM))
    return nn.Sequential(encoder, head)


def build_loss(method: str, queue_size: int, total_steps: int) -> SLRLoss:
    """The difference between the methods, besides the mixed queries."""
    memory_bank_size = (queue_size, DIM)
    if method == "MoCo":
        return SLRLoss(CIFAR10.temperature, memory_bank_size, confidence=0, in_batch_keys=False)
    return CIFAR10.loss(DIM, total_steps, memory_bank_size=memory_bank_size)


def pretrain(method: str, data: Dataset, epochs: int, batch_size: int, seed: int, progress: tqdm) -> Run:
    """One run. Both methods get the same weights, order and views from a seed."""
    start = time.perf_counter()
    torch.manual_seed(seed)  # for the weights, then the random keys that fill the queue at first
    online = build_network(data.train.pixels.shape[1])
    target = copy.deepcopy(online).requires_grad_(False)
    # Two streams: SANE's mixing must not shift the order and the views.
    viewing, mixing = (torch.Generator().manual_seed(2 * seed + stream) for stream in (0, 1))

    # A third of an epoch at most: a longer queue holds earlier views of the batch's own images, as negatives. The gap
    # between two visits of an image has a triangular density on 0 to 2 epochs, so 1 in 18 still meets itself.
    queue_size = min(CIFAR10.queue_size, math.ceil(len(data.train) / 3))
    total_steps = epochs * (len(data.train) // batch_size)
    criterion, mixup = build_loss(method, queue_size, total_steps), CIFAR10.mixup(mixing)
    rate = CIFAR10.learning_rate * batch_size / CIFAR10.batch_size  # the linear scaling rule
    optimizer = torch.optim.SGD(online.parameters(), rate, CIFAR10.momentum, weight_decay=CIFAR10.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total_steps)

    evaluated, knn, labels = [0], [knn_accuracy(online[0], data)], []
    untrained = linear_accuracy(online[0], data)
    monitor = LabelMonitor(criterion)
    for epoch in range(1, epochs + 1):
        for x0, x1, classes in minibatches(data.train, data.views, batch_size, viewing):
            queries, keys = online(x0), target(x1)
            monitor.announce(classes, measure=method == "SANE")
            if method == "MoCo":
                loss = criterion(queries, keys)
            else:
                mixed, mix = mixup(x0, x1)
                loss = criterion(queries, keys, online(mixed), mix)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            update_average(target, online)
        labels.append(monitor.mean())
        if epoch % max(1, epochs // 10) == 0 or epoch == epochs:
            evaluated.append(epoch)
            knn.append(knn_accuracy(online[0], data))
        progress.update()
    linear = (untrained, linear_accuracy(online[0], data))
    return Run(evaluated, knn, linear, labels, time.perf_counter() - start)


@torch.no_grad()
def update_average(target: nn.Module, online: nn.Module) -> None:
    """The target network follows the online one as an exponential moving average."""
    for slow, fast in zip(target.parameters(), online.parameters(), strict=True):
        slow.lerp_(fast, 1 - EMA_MOMENTUM)


def knn_accuracy(encoder: nn.Module, data: Dataset) -> float:
    """Accuracy of the paper's vote: the 50 nearest neighbours, weighted by exp(cosine / 0.05)."""
    neighbours = min(50, len(data.train))
    vote = KNeighborsClassifier(neighbours, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.05))
    return accuracy(vote, encoder, data)


def linear_accuracy(encoder: nn.Module, data: Dataset) -> float:
    """Accuracy of logistic regression on standardised features."""
    return accuracy(make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)), encoder, data)


@torch.no_grad()
def accuracy(classifier: ClassifierMixin, encoder: nn.Module, data: Dataset) -> float:
    """Per cent of the held-out images that a classifier on the frozen encoder's features gets right."""
    encoder.eval()
    train, test = (
        torch.cat([encoder(part / 255) for part in images.pixels.split(64)]).numpy()
        for images in (data.train, data.test)
    )
    encoder.train()
    return 100 * classifier.fit(train, data.train.classes.numpy()).score(test, data.test.classes.numpy())


def report(data: Dataset, runs: dict[str, list[Run]]) -> str:
    """The table, and what it says."""
    rows = {"untrained": np.array([(run.knn[0], run.linear[0]) for run in runs["MoCo"]])}  # the same for SANE
    rows |= {method: np.array([(run.knn[-1], run.linear[1]) for run in runs[method]]) for method in METHODS}
    difference = rows["SANE"] - rows["MoCo"]  # (seeds, 2), paired by seed
    lines = [
        f"{data.name}: {len(data.train):,} training images, {len(data.test):,} held out",
        f"{runs['MoCo'][0].epochs[-1]} epochs, {len(difference)} seeds; accuracy in %, mean ± standard deviation",
        "",
        f"{'':12}{'kNN':>14}{'linear probe':>16}{'seconds a run':>16}",
    ]
    for name, accuracies in [*rows.items(), ("SANE - MoCo", difference)]:
        cells = [spread(column, "+" if accuracies is difference else "") for column in accuracies.T]
        seconds = f"{np.mean([run.seconds for run in runs[name]]):.0f}" if name in METHODS else ""
        lines.append(f"{name:12}{cells[0]:>14}{cells[1]:>16}{seconds:>16}".rstrip())
    last = LabelQuality.average(run.labels[-1] for run in runs["SANE"])
    lines += [
        "",
        verdict("kNN", difference[:, 0]),
        verdict("linear probe", difference[:, 1]),
        "",
        "SANE's labels in the last epoch (MoCo's are one-hot)",
        *str(last).splitlines()[1:],
    ]
    return "\n".join(lines)


def spread(values: np.ndarray, sign: str = "") -> str:
    """Mean and standard deviation."""
    return f"{values.mean():{sign}.2f}" + (f" ± {values.std(ddof=1):.2f}" if len(values) > 1 else "")


def verdict(measure: str, differences: np.ndarray) -> str:
    """What the paired differences allow to say: Student's 95 % interval of their mean."""
    if len(differences) < 2:
        one = f"{measure}: SANE {differences[0]:+.2f} points on one seed"
        return f"{one}; take --seeds 3 or more to tell it from chance"
    mean, margin = interval(differences)
    finding = "no clear difference" if abs(mean) <= margin else "SANE is ahead" if mean > 0 else "SANE is behind"
    return f"{measure}: {finding}; SANE {mean:+.2f} points, 95 % interval {mean - margin:+.2f} to {mean + margin:+.2f}"


def draw(data: Dataset, runs: dict[str, list[Run]], path: Path) -> None:
    """Accuracy and label mass over training."""
    figure = Figure(figsize=(14, 4.2), layout="constrained")
    figure.suptitle(
        f"{data.name} (line: mean over the seeds, {len(runs['MoCo'])}; band: their range)", fontsize="medium"
    )
    accuracies, purity, mass = figure.subplots(1, 3)
    accuracies.set(title="Accuracy on held-out images", ylabel="kNN accuracy (%)")
    purity.set(title="Purity of what SANE's labels give away", ylabel="on keys of the own class (%)", ylim=(0, 100))
    mass.set(title="Label mass beyond the own positive", ylabel="share of the label (%)")

    def curve(panel: Axes, epochs: Sequence[int], values: np.ndarray, label: str, colour: str) -> None:
        panel.plot(epochs, values.mean(0), color=colour, label=label, marker="." if len(epochs) <= 30 else None)
        panel.fill_between(epochs, values.min(0), values.max(0), color=colour, alpha=0.2, linewidth=0)

    for method, colour in zip(METHODS, ("tab:grey", "tab:blue"), strict=True):
        curve(accuracies, runs[method][0].epochs, np.array([run.knn for run in runs[method]]), method, colour)
    labels = 100 * np.array([run.labels for run in runs["SANE"]])  # (seeds, epochs, fields); MoCo's are one-hot
    for panel, field, label, colour in (
        (purity, "purity", "labels", "tab:blue"),
        (purity, "chance", "chance: blind labels", "tab:grey"),
        (mass, "same", "on keys of the own class", "tab:blue"),
        (mass, "other", "on keys of other classes", "tab:red"),
    ):
        values = labels[:, :, LabelQuality._fields.index(field)]
        curve(panel, range(1, 1 + labels.shape[1]), values, label, colour)
    mass.set_ylim(bottom=0)
    for panel in (accuracies, purity, mass):
        panel.set_xlabel("epoch")
        panel.legend(frameon=False)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def at_least(low: int) -> Callable[[str], int]:
    """An argparse type."""

    def integer(text: str) -> int:
        if (value := int(text)) < low:
            raise argparse.ArgumentTypeError(f"must be {low} or more, got {value}")
        return value

    return integer


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Dataset]:
    """The options, and the images they name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, metavar="DIR", help="a folder of images; without it, scikit-learn's digits")
    add("--epochs", type=at_least(1), default=50, help="per run (default: %(default)s)")
    add("--seeds", type=at_least(1), default=3, help="runs of each method (default: %(default)s)")
    add("--batch-size", type=at_least(2), default=128, help="default: %(default)s")
    add("--size", type=at_least(8), default=32, help="side of the images of --data in pixels (default: %(default)s)")
    add("--limit", type=at_least(2), help="use at most so many training images, and so many held-out ones")
    add("--workers", type=at_least(0), default=0, help="processes that decode --data (default: %(default)s)")
    add("--output", type=Path, default=Path("outputs/demo.png"), help="the figure (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        data = load_folder(args.data, args.size, args.limit, args.workers) if args.data else load_scans(args.limit)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if len(data.train) < args.batch_size:
        count, batch = f"{len(data.train)} training images", f"a batch of {args.batch_size}"
        parser.error(f"{data.name}: {count}, fewer than {batch}; give more images or a smaller --batch-size")
    return args, data


def main(argv: Sequence[str] | None = None) -> None:
    """Train both methods with every seed, then print and draw."""
    args, data = parse(argv)
    if not args.data:
        torch.set_num_threads(1)  # at 8 x 8 pixels a second thread costs as much as it brings
    args.output.parent.mkdir(parents=True, exist_ok=True)
    runs: dict[str, list[Run]] = {method: [] for method in METHODS}
    with tqdm(total=len(METHODS) * args.seeds * args.epochs, unit="epoch") as progress:
        for seed in range(args.seeds):
            for method in METHODS:
                progress.set_description(f"{method}, seed {seed}")
                runs[method].append(pretrain(method, data, args.epochs, args.batch_size, seed, progress))
    print(report(data, runs))
    draw(data, runs, args.output)
    print(f"figure: {args.output}")


if __name__ == "__main__":
    main()
