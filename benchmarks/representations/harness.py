"""Runs what is missing, one line of a file per run, and then draws the tables."""

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

from benchmarks.representations.budgets import BUDGETS, Budget
from benchmarks.representations.data import Images, load
from benchmarks.representations.methods import METHODS
from benchmarks.representations.training import finished, training

Record = dict[str, Any]
Start = Callable[..., Generator[None, None, Record]]


class Run(NamedTuple):
    """One training."""

    method: str
    seed: int
    rate: float | None = None  # None: the preset's
    held_out: bool = False  # evaluated on held-out training images, to choose the rate

    def is_done(self, found: Sequence[Record]) -> bool:
        """Whether there is a record, at this learning rate."""
        mine = (self.method, self.seed, self.held_out)
        return any(_key(record) == mine and self.rate in (None, record.get("rate")) for record in found)


FILE = "records.jsonl"  # of a budget's folder, a line for each run


def run(
    methods: Sequence[str], seeds: int, budget: str, data: Path, device: str, jobs: int, results: Path, cache: Path
) -> None:
    """Train every method with every seed, but for the runs whose record lies in ``results`` already.

    If the budget names learning rates, each method is trained with all of them first, and its seeds with that one which
    was best on held-out training images. ``jobs`` runs go on at a time: on CPUs each in a process of its own, on a GPU
    each on a stream of its own. All methods of a seed come before the next seed.
    """
    spent = BUDGETS[budget]
    trained = [method for method in methods if METHODS[method].trains]
    start = functools.partial(_start, budget=budget, data=data, device=device, cache=cache)
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        go = _in_processes if device == "cpu" else functools.partial(_on_streams, jobs=jobs)

        def finish(wanted: Sequence[Run]) -> None:
            found = read(results)
            missing = [one for one in wanted if not one.is_done(found)]
            for one, record in tqdm(go(missing, start, pool), total=len(missing), unit="run"):
                _append(results, record | ({"held_out": True} if one.held_out else {}))
                tqdm.write(f"{one}: kNN {record['knn']:.2f}, linear {record['linear']:.2f}")

        seeds_of_rates = list(itertools.product(spent.rates, range(spent.tuning_seeds)))
        wanted = [Run(method, seed, rate, True) for method in trained for rate, seed in seeds_of_rates]
        while wanted and len(spent.rates) > 1:
            finish(wanted)
            found = tuning(results)
            wanted = [one for method in trained for one in further_runs(method, found[method], spent)]
        best = {method: best_rate(method, spent.rates, results) for method in trained}
        finish(
            [
                Run(method, seed, best.get(method))
                for seed in range(seeds)
                for method in methods
                if seed == 0 or method in trained
            ]
        )


def read(results: Path) -> list[Record]:
    """All records of a budget's folder, of a run that was repeated the last."""
    path = results / FILE
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def _key(record: Record) -> tuple[str, int, bool]:
    return record["method"], record["seed"], record.get("held_out", False)


def _append(results: Path, record: Record) -> None:
    results.mkdir(parents=True, exist_ok=True)
    with (results / FILE).open("a") as file:
        file.write(json.dumps(record) + "\n")


def tuning(results: Path) -> dict[str, dict[float, list[Record]]]:
    """The runs on held-out images: method, learning rate, records."""
    found: dict[str, dict[float, list[Record]]] = {}
    for record in sorted((record for record in read(results) if record.get("held_out")), key=_key):
        found.setdefault(record["method"], {}).setdefault(record["rate"], []).append(record)
    return found


def best_rate(method: str, rates: Sequence[float], results: Path) -> float | None:
    """The learning rate with the best mean of kNN and linear accuracy on held-out training images."""
    if len(rates) < 2:
        return rates[0] if rates else None
    return best(tuning(results)[method])


def best(runs: Mapping[float, Sequence[Record]]) -> float:
    """The learning rate whose runs have the best mean of kNN and linear accuracy."""
    return max(runs, key=lambda rate: sum(run["knn"] + run["linear"] for run in runs[rate]) / len(runs[rate]))


def further_runs(method: str, runs: Mapping[float, Sequence[Record]], spent: Budget) -> list[Run]:
    """What is to be trained before a learning rate is chosen: one beyond the best, or the best with one more seed."""
    rate = further_rate(runs) if spent.widens else None
    if rate:
        return [Run(method, seed, rate, True) for seed in range(spent.tuning_seeds)]
    leader = best(runs)
    return [Run(method, len(runs[leader]), leader, True)] if len(runs[leader]) < spent.confirmations else []


def further_rate(runs: Mapping[float, Sequence[Record]]) -> float | None:
    """The next learning rate beyond the best one, if this is the largest or the smallest; None otherwise."""
    rates, chosen = sorted(runs), best(runs)
    factor = rates[1] / rates[0]
    if chosen == rates[-1]:
        return round(chosen * factor, 4)
    return round(chosen / factor, 4) if chosen == rates[0] else None


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
    for record in sorted((record for record in read(results) if not record.get("held_out")), key=_key):
        found.setdefault(record["method"], {})[record["seed"]] = record
    return found


def _start(
    one: Run, budget: str, data: Path, device: str, cache: Path, probes: Executor | None = None
) -> Generator[None, None, Record]:
    images = _images(data, budget, device, one.held_out)
    return training(one.method, one.seed, BUDGETS[budget], *images, cache, rate=one.rate, probes=probes)


def _exhaust(start: Start, one: Run) -> Record:
    return finished(start(one))


@functools.cache
def _images(data: Path, budget: str, device: str, held_out: bool) -> tuple[Images, Images]:
    return load(data, BUDGETS[budget], torch.device(device), held_out)
