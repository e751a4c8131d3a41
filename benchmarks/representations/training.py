"""One run: a method, a seed, a budget; from random weights to a record of what was measured."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightly
import torch
from lightly.utils.benchmarking import knn_predict
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from benchmarks.machine import machine
from benchmarks.representations.budgets import Budget
from benchmarks.representations.data import Images, minibatches, normalize
from benchmarks.representations.features import FEATURES
from benchmarks.representations.methods import METHODS
from benchmarks.representations.objectives import DIM, Network, Setup
from slr_plugin.diagnostics import LabelMonitor
from slr_plugin.presets import CIFAR10

KNN_NEIGHBOURS, KNN_TEMPERATURE = 50, 0.05  # the paper's
MEASURED_BATCHES = 8  # of an epoch in which labels are measured


class Features(NamedTuple):
    """Encoder features (n, d) of images, and their classes (n,)."""

    values: Tensor
    classes: Tensor


def train(
    name: str,
    seed: int,
    budget: Budget,
    train_images: Images,
    test_images: Images,
    cache: Path,
    observe: Callable[[Network], None] = lambda network: None,
    rate: float | None = None,
) -> dict[str, Any]:
    """Train, show the network to ``observe``, evaluate; returns the record, accuracies in per cent.

    ``rate`` is the learning rate; None takes the CIFAR-10 preset's, scaled to the batch.
    """
    method = METHODS[name]
    device = train_images.pixels.device
    if budget.threads and device.type == "cpu":
        torch.set_num_threads(budget.threads)
    epochs = round(method.stretch * budget.epochs)
    batches = len(train_images) // budget.batch_size

    torch.manual_seed(seed)
    online = Network(budget).to(device)
    mixing = torch.Generator().manual_seed(seed)
    estimators = FEATURES[method.features](train_images) if method.features else None
    objective = method.build(Setup((budget.queue_size, DIM), epochs * batches, mixing, estimators)).to(device)
    objective.start(online)
    monitor = LabelMonitor(objective.criterion) if hasattr(objective.criterion, "labels") else None

    parameters = [*online.parameters(), *(p for p in objective.parameters() if p.requires_grad)]
    rate = rate or CIFAR10.learning_rate * budget.batch_size / CIFAR10.batch_size
    optimizer = torch.optim.SGD(parameters, rate, CIFAR10.momentum, weight_decay=CIFAR10.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)

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
        for step, batch in enumerate(epoch_batches):
            if monitor:
                monitor.announce(batch.classes, epoch in evaluated and step % -(-batches // MEASURED_BATCHES) == 0)
            loss = objective(online, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            objective.after_step(online)
            losses.append(loss.detach())
        mean_loss = torch.stack(losses).mean().item()  # waits for the device
        seconds += time.perf_counter() - start
        if epoch in evaluated:
            features = extract(online, train_images), extract(online, test_images)
            curve.append({"epoch": epoch, "loss": mean_loss, "knn": knn_accuracy(*features)})
            if monitor:
                quality = monitor.mean()
                labels.append({"epoch": epoch, **{key: value.item() for key, value in quality._asdict().items()}})
    observe(online)
    return record | {
        "knn": curve[-1]["knn"],
        "linear": linear_accuracy(*features),
        "seconds": round(seconds, 1),  # of the steps: without views and evaluation
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


def linear_accuracy(train: Features, test: Features) -> float:
    """Logistic regression on standardised features."""
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    (train_values, train_classes), (test_values, test_classes) = (
        (part.values.cpu().numpy(), part.classes.cpu().numpy()) for part in (train, test)
    )
    return 100 * float(probe.fit(train_values, train_classes).score(test_values, test_classes))


@torch.no_grad()
def extract(network: Network, images: Images) -> Features:
    """Encoder features of the images as they are."""
    network.eval()
    values = torch.cat([network.features(normalize(part)) for part in images.pixels.split(250)])
    network.train()
    return Features(values, images.classes)
