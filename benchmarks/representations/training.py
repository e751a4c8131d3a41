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
from torch.nn import Parameter

from benchmarks.machine import machine
from benchmarks.representations.budgets import Budget
from benchmarks.representations.data import Batch, Images, halved, minibatches, normalize
from benchmarks.representations.features import known
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
    There it must run in a stream that is not the default one, whose work cannot be recorded.

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
    estimators = known(method.features, train_images, cache, seed=seed) if method.features else None
    if not method.trains:
        described = known(method.features, test_images, cache, train_images, seed)
        features = Features(estimators, train_images.classes), Features(described, test_images.classes)
        judged = {"knn": knn_accuracy(*features), "linear": (yield from _classified(features, probes))}
        return {"method": name, "seed": seed, "rate": None, "epochs": 0, "passes": 0} | judged | _circumstances(device)
    if budget.halves_side:
        train_images, test_images = halved(train_images), halved(test_images)
    if method.teacher:
        teachers: list[Network] = []
        yield from training(
            method.teacher, seed, budget, train_images, test_images, cache, teachers.append, rate, probes
        )
        estimators = extract(teachers[0], train_images).values
        estimators = estimators - estimators.mean(0)
    if budget.threads and device.type == "cpu":
        torch.set_num_threads(budget.threads)
    epochs = round(method.stretch * budget.epochs)
    batches = len(train_images) // budget.batch_size

    torch.manual_seed(seed)
    online = Network(budget).to(device)
    mixing = torch.Generator(device).manual_seed(seed)
    objective = method.build(Setup((budget.queue_size, DIM), epochs * batches, mixing, estimators)).to(device)
    objective.start(online)
    monitor = LabelMonitor(objective.criterion) if hasattr(objective.criterion, "labelled_keys") else None

    parameters = [*online.parameters(), *(p for p in objective.parameters() if p.requires_grad)]
    rate = rate or CIFAR10.learning_rate * budget.batch_size / CIFAR10.batch_size
    optimizer = _sgd(parameters, rate, device)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)

    def step(*tensors: Any, measures: bool = False) -> Tensor:
        batch = Batch(*tensors).normalized()
        if monitor:
            monitor.announce(batch.classes, measures)
        loss = objective(online, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        objective.after_step(online)
        return loss.detach()

    # lightly's losses read values back from the device, which no graph can record.
    reads_back = type(objective.criterion).__module__.startswith("lightly")
    usual = step if reads_back or device.type == "cpu" else Recorded(step, mixing)
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
                losses.append(usual(*batch))
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
    linear = yield from _classified(features, probes)
    return (
        record
        | {
            "knn": curve[-1]["knn"],
            "linear": linear,
            "seconds": round(seconds, 1)
            if device.type == "cpu"
            else None,  # of the steps: without views and evaluation
            "curve": curve,
            "labels": labels,
        }
        | _circumstances(device)
    )


def _circumstances(device: torch.device) -> dict[str, Any]:
    """What a record says of where and when."""
    return {
        "machine": machine(device.type),
        "torch": torch.__version__,
        "lightly": lightly.__version__,
        "date": datetime.date.today().isoformat(),
    }


def _sgd(parameters: list[Parameter], rate: float, device: torch.device) -> torch.optim.SGD:
    """The preset's; on a GPU with the learning rate on the device, where a recorded step reads it."""
    on_gpu = device.type != "cpu"
    return torch.optim.SGD(
        parameters,
        torch.tensor(rate, device=device) if on_gpu else rate,
        CIFAR10.momentum,
        weight_decay=CIFAR10.weight_decay,
        fused=on_gpu,
    )


def _classified(features: tuple[Features, Features], probes: Executor | None) -> Generator[None, None, float]:
    """The linear accuracy, fitted here or by ``probes``."""
    arrays = [values.cpu().numpy() for part in features for values in part]
    if probes is None:
        return linear_accuracy(*arrays)
    probe = probes.submit(linear_accuracy, *arrays)
    while not probe.done():
        time.sleep(0.001)  # leaves the core to the fits, where nothing else goes on
        yield
    return probe.result()


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
