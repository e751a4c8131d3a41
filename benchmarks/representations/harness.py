"""Runs what is missing, one JSON file per run, and then draws the tables."""

from __future__ import annotations

import functools
import itertools
import json
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from benchmarks.representations.budgets import BUDGETS
from benchmarks.representations.data import Images, load
from benchmarks.representations.training import train


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
        return path.exists() and (self.rate is None or json.loads(path.read_text())["rate"] == self.rate)


TUNING_SEEDS = 2  # by whose mean a learning rate is chosen


def run(
    methods: Sequence[str], seeds: int, budget: str, data: Path, device: str, jobs: int, results: Path, cache: Path
) -> None:
    """Train every method with every seed, but for the runs whose record lies in ``results`` already.

    If the budget names learning rates, each method is trained with all of them first, and its seeds with that one which
    was best on held-out training images. ``jobs`` runs go on at a time, each in a process of its own. All methods of a
    seed come before the next seed.
    """
    rates = BUDGETS[budget].rates
    work = functools.partial(_work, budget=budget, data=data, device=device, results=results, cache=cache)
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        if len(rates) > 1:
            tuning = [Run(*triple, held_out=True) for triple in itertools.product(methods, range(TUNING_SEEDS), rates)]
            _finish(tuning, pool, work, results)
        best = {method: best_rate(method, rates, results) for method in methods}
        _finish([Run(method, seed, best[method]) for seed in range(seeds) for method in methods], pool, work, results)


def best_rate(method: str, rates: Sequence[float], results: Path) -> float | None:
    """The learning rate with the best mean of kNN and linear accuracy on held-out training images."""
    if len(rates) < 2:
        return rates[0] if rates else None

    def score(rate: float) -> float:
        runs = [Run(method, seed, rate, held_out=True).path(results).read_text() for seed in range(TUNING_SEEDS)]
        return sum(float(record["knn"] + record["linear"]) for record in map(json.loads, runs))

    return max(rates, key=score)


def _finish(
    wanted: Sequence[Run], pool: ProcessPoolExecutor, work: Callable[[Run], dict[str, Any]], results: Path
) -> None:
    """Do the runs that have no record yet."""
    runs = {pool.submit(work, one): one for one in wanted if not one.is_done(results)}
    for finished in tqdm(as_completed(runs), total=len(runs), unit="run"):
        record = finished.result()
        tqdm.write(f"{runs[finished]}: kNN {record['knn']:.2f}, linear {record['linear']:.2f}")


def records(results: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """All finished runs: method, seed, record."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for path in sorted(results.glob("*-seed*.json")):
        record = json.loads(path.read_text())
        found.setdefault(record["method"], {})[record["seed"]] = record
    return found


def _work(one: Run, budget: str, data: Path, device: str, results: Path, cache: Path) -> dict[str, Any]:
    images = _images(data, budget, device, one.held_out)
    record = train(one.method, one.seed, BUDGETS[budget], *images, cache, rate=one.rate)
    path = one.path(results)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(record, indent=1) + "\n")
    unfinished.replace(path)
    return record


@functools.cache
def _images(data: Path, budget: str, device: str, held_out: bool) -> tuple[Images, Images]:
    return load(data, BUDGETS[budget], torch.device(device), held_out)
