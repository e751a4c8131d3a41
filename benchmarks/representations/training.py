"""One run: a method, a seed, a budget; from random weights to a record of what was measured."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Generator
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, NamedTuple

import lightly
import numpy as np
import torch
from lightly.utils.benchmarking import knn_predict
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from benchmarks.machine import machine
from benchmarks.representations.budgets import Budget
from benchmarks.representations.data import Batch, Images, minibatches, normalize
from benchmarks.representations.features import FEATURES
from benchmarks.representations.methods import METHODS
from benchmarks.representations.objectives import DIM, Network, Setup
from benchmarks.representations.recorded import Recorded
from slr_plugin.diagnostics import LabelMonitor
from slr_plugin.presets import CIFAR10

KNN_NEIGHBOURS, KNN_TEMPERATURE = 50, 0.05  # the paper's
MEASURED_BATCHES = 8  # of an epoch in which labels are measured


class Features(NamedTuple):
    """Encoder features (n, d) of images, and their classes (n,)."""

    values: Tensor
    classes: Tensor


def train(*args: Any, **options: Any) -> dict[str, Any]:
    """Train to the end, see :func:`training`; returns the record."""
    return finished(training(*args, **options))


def finished(epochs: Generator[None, None, dict[str, Any]]) -> dict[str, Any]:
    """Go through all epochs; returns the record."""
    while True:
        try:
            next(epochs)
        except StopIteration as end:
            record: dict[str, Any] = end.value
            return record


def training(
    name: str,
    seed: int,
    budget: Budget,
    train_images: Images,
    test_images: Images,
    cache: Path,
    observe: Callable[[Network], None] = lambda network: None,
    rate: float | None = None,
    probes: Executor | None = None,
) -> Generator[None, None, dict[str, Any]]:
    """Train, show the network to ``observe``, evaluate; returns the record, accuracies in per cent.

    Yields after every epoch, so that a GPU, which computes on meanwhile, can be given the epochs of other runs.

    Args:
        name: of the method.
        seed: of weights, order, views and mixtures.
        budget: what all methods share.
        train_images: on the device that trains.
        test_images: likewise.
        cache: the folder for views.
        observe: is called with the trained network.
        rate: the learning rate; None takes the CIFAR-10 preset's, scaled to the batch.
        probes: fits the linear classifier elsewhere, while this generator yields.
    """
    method = METHODS[name]
    device = train_images.pixels.device
    if budget.threads and device.type == "cpu":
        torch.set_num_threads(budget.threads)
    epochs = round(method.stretch * budget.epochs)
    batches = len(train_images) // budget.batch_size

    torch.manual_seed(seed)
    online = Network(budget).to(device)
    mixing = torch.Generator(device).manual_seed(seed)
    estimators = FEATURES[method.features](train_images) if method.features else None
    objective = method.build(Setup((budget.queue_size, DIM), epochs * batches, mixing, estimators)).to(device)
    objective.start(online)
    monitor = LabelMonitor(objective.criterion) if hasattr(objective.criterion, "labels") else None

    parameters = [*online.parameters(), *(p for p in objective.parameters() if p.requires_grad)]
    rate = rate or CIFAR10.learning_rate * budget.batch_size / CIFAR10.batch_size
    optimizer = torch.optim.SGD(
        parameters,
        rate if device.type == "cpu" else torch.tensor(rate, device=device),  # a recorded step reads it there
        CIFAR10.momentum,
        weight_decay=CIFAR10.weight_decay,
        fused=device.type != "cpu",
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)

    def step(query: Tensor, key: Tensor, further: Tensor | None, *others: Tensor, measures: bool = False) -> Tensor:
        batch = Batch(normalize(query), normalize(key), None if further is None else normalize(further), *others)
        if monitor:
            monitor.announce(batch.classes, measures)
        loss = objective(online, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        objective.after_step(online)
        return loss.detach()

    recorded = Recorded(step, mixing)
    record: dict[str, Any] = {
        "method": name,
        "seed": seed,
        "rate": rate,
        "epochs": epochs,
        "passes": epochs * batches * method.passes,
    }
    evaluated = {round(epochs * part / budget.evaluations) for part in range(1, budget.evaluations + 1)}
    curve, labels, seconds = [], [], 0.0
    for epoch in range(1, epochs + 1):
        losses = []
        epoch_batches = list(minibatches(train_images, budget, seed, epoch, method.views, cache))
        start = time.perf_counter()
        for number, batch in enumerate(epoch_batches):
            if monitor and epoch in evaluated and number % -(-batches // MEASURED_BATCHES) == 0:
                losses.append(step(*batch, measures=True))
            else:
                losses.append(recorded(*batch))
            schedule.step()
        seconds += time.perf_counter() - start
        yield
        if epoch in evaluated:
            features = extract(online, train_images), extract(online, test_images)
            curve.append({"epoch": epoch, "loss": torch.stack(losses).mean().item(), "knn": knn_accuracy(*features)})
            if monitor:
                quality = monitor.mean()
                labels.append({"epoch": epoch, **{key: value.item() for key, value in quality._asdict().items()}})
    observe(online)
    arrays = [values.cpu().numpy() for part in features for values in part]
    if probes is None:
        linear = linear_accuracy(*arrays)
    else:
        probe = probes.submit(linear_accuracy, *arrays)
        while not probe.done():
            yield
        linear = probe.result()
    return record | {
        "knn": curve[-1]["knn"],
        "linear": linear,
        "seconds": round(seconds, 1),  # of the steps: without views and evaluation; on a GPU of asking for them
        "curve": curve,
        "labels": labels,
        "machine": machine(device.type),
        "torch": torch.__version__,
        "lightly": lightly.__version__,
        "date": datetime.date.today().isoformat(),
    }


def knn_accuracy(train: Features, test: Features) -> float:
    """The paper's vote of the nearest neighbours, by lightly."""
    bank, queries = (torch.nn.functional.normalize(part.values) for part in (train, test))
    count, neighbours = int(train.classes.max()) + 1, min(KNN_NEIGHBOURS, len(bank))
    votes = [
        knn_predict(part, bank.T, train.classes, count, neighbours, KNN_TEMPERATURE)[:, 0]
        for part in queries.split(512)
    ]
    return 100 * (torch.cat(votes) == test.classes).float().mean().item()


def linear_accuracy(train: np.ndarray, train_classes: np.ndarray, test: np.ndarray, test_classes: np.ndarray) -> float:
    """Logistic regression on standardised features (n, d)."""
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return 100 * float(probe.fit(train, train_classes).score(test, test_classes))


@torch.no_grad()
def extract(network: Network, images: Images) -> Features:
    """Encoder features of the images as they are."""
    network.eval()
    values = torch.cat([network.features(normalize(part)) for part in images.pixels.split(250)])
    network.train()
    return Features(values, images.classes)
