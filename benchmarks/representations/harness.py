"""Runs what is missing, one JSON file per run, and then draws the tables."""

from __future__ import annotations

import functools
import itertools
import json
import multiprocessing
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from benchmarks.representations.budgets import BUDGETS
from benchmarks.representations.data import Images, load
from benchmarks.representations.training import finished, training

Record = dict[str, Any]
Start = Callable[..., Generator[None, None, Record]]


class Run(NamedTuple):
    """One training."""

    method: str
    seed: int
    rate: float | None = None  # None: the preset's
    held_out: bool = False  # evaluated on held-out training images, to choose the rate

    def path(self, results: Path) -> Path:
        """Where its record lies."""
        if self.held_out:
            return results / "held-out" / f"{self.method}-rate{self.rate}-seed{self.seed}.json"
        return results / f"{self.method}-seed{self.seed}.json"

    def is_done(self, results: Path) -> bool:
        """Whether there is a record, at this learning rate."""
        path = self.path(results)
        return path.exists() and (self.rate is None or _read(path)["rate"] == self.rate)


TUNING_SEEDS = 2  # by whose mean a learning rate is chosen


def run(
    methods: Sequence[str], seeds: int, budget: str, data: Path, device: str, jobs: int, results: Path, cache: Path
) -> None:
    """Train every method with every seed, but for the runs whose record lies in ``results`` already.

    If the budget names learning rates, each method is trained with all of them first, and its seeds with that one which
    was best on held-out training images. ``jobs`` runs go on at a time: on CPUs each in a process of its own, on a GPU
    each on a stream of its own. All methods of a seed come before the next seed.
    """
    rates = BUDGETS[budget].rates
    start = functools.partial(_start, budget=budget, data=data, device=device, cache=cache)
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        go = _in_processes if device == "cpu" else functools.partial(_on_streams, jobs=jobs)

        def finish(wanted: Sequence[Run]) -> None:
            missing = [one for one in wanted if not one.is_done(results)]
            for one, record in tqdm(go(missing, start, pool), total=len(missing), unit="run"):
                _write(one.path(results), record)
                tqdm.write(f"{one}: kNN {record['knn']:.2f}, linear {record['linear']:.2f}")

        if len(rates) > 1:
            finish([Run(*triple, held_out=True) for triple in itertools.product(methods, range(TUNING_SEEDS), rates)])
        best = {method: best_rate(method, rates, results) for method in methods}
        finish([Run(method, seed, best[method]) for seed in range(seeds) for method in methods])


def tuning(results: Path) -> dict[str, dict[float, list[Record]]]:
    """The runs on held-out images: method, learning rate, records."""
    found: dict[str, dict[float, list[Record]]] = {}
    for path in sorted((results / "held-out").glob("*-seed*.json")):
        record = _read(path)
        found.setdefault(record["method"], {}).setdefault(record["rate"], []).append(record)
    return found


def best_rate(method: str, rates: Sequence[float], results: Path) -> float | None:
    """The learning rate with the best mean of kNN and linear accuracy on held-out training images."""
    if len(rates) < 2:
        return rates[0] if rates else None

    return best(
        {
            rate: [_read(Run(method, seed, rate, held_out=True).path(results)) for seed in range(TUNING_SEEDS)]
            for rate in rates
        }
    )


def best(runs: Mapping[float, Sequence[Record]]) -> float:
    """The learning rate whose runs have the best mean of kNN and linear accuracy."""
    return max(runs, key=lambda rate: sum(run["knn"] + run["linear"] for run in runs[rate]) / len(runs[rate]))


def _read(path: Path) -> Record:
    record: Record = json.loads(path.read_text())
    return record


def _in_processes(runs: Sequence[Run], start: Start, pool: Executor) -> Iterator[tuple[Run, Record]]:
    """Runs and their records, each computed in a process."""
    tasks = {pool.submit(_exhaust, start, one): one for one in runs}
    for task in as_completed(tasks):
        yield tasks[task], task.result()


def _on_streams(runs: Sequence[Run], start: Start, pool: Executor, jobs: int) -> Iterator[tuple[Run, Record]]:
    """The same on one GPU, whose launches take turns, an epoch each; processes fit the linear classifiers."""
    waiting, going = deque(runs), deque[tuple[Run, torch.cuda.Stream, Generator[None, None, Record]]]()
    while waiting or going:
        while waiting and len(going) < jobs:
            one = waiting.popleft()
            going.append((one, torch.cuda.Stream(), start(one, probes=pool)))
        one, stream, epochs = going.popleft()
        try:
            with torch.cuda.stream(stream):
                next(epochs)
            going.append((one, stream, epochs))
        except StopIteration as end:
            yield one, end.value


def records(results: Path) -> dict[str, dict[int, Record]]:
    """All finished runs: method, seed, record."""
    found: dict[str, dict[int, Record]] = {}
    for path in sorted(results.glob("*-seed*.json")):
        record = _read(path)
        found.setdefault(record["method"], {})[record["seed"]] = record
    return found


def _start(
    one: Run, budget: str, data: Path, device: str, cache: Path, probes: Executor | None = None
) -> Generator[None, None, Record]:
    images = _images(data, budget, device, one.held_out)
    return training(one.method, one.seed, BUDGETS[budget], *images, cache, rate=one.rate, probes=probes)


def _exhaust(start: Start, one: Run) -> Record:
    return finished(start(one))


def _write(path: Path, record: Record) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(record, indent=1) + "\n")
    unfinished.replace(path)


@functools.cache
def _images(data: Path, budget: str, device: str, held_out: bool) -> tuple[Images, Images]:
    return load(data, BUDGETS[budget], torch.device(device), held_out)
