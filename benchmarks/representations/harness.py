"""Runs what is missing, one JSON file per run, and then draws the tables."""

from __future__ import annotations

import functools
import json
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.representations.budgets import BUDGETS
from benchmarks.representations.data import Images, load
from benchmarks.representations.training import train


def run(
    methods: Sequence[str], seeds: int, budget: str, data: Path, device: str, jobs: int, results: Path, cache: Path
) -> None:
    """Train every method with every seed, but for the runs whose record lies in ``results`` already.

    ``jobs`` runs go on at a time, each in a process of its own. All methods of a seed come before the next seed.
    """
    results.mkdir(parents=True, exist_ok=True)
    missing = [
        (method, seed) for seed in range(seeds) for method in methods if not record_path(results, method, seed).exists()
    ]
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        runs = {pool.submit(_work, *pair, budget, data, device, results, cache): pair for pair in missing}
        for finished in tqdm(as_completed(runs), total=len(runs), unit="run"):
            method, seed = runs[finished]
            record = finished.result()
            tqdm.write(f"{method}, seed {seed}: kNN {record['knn']:.2f}, linear {record['linear']:.2f}")


def record_path(results: Path, method: str, seed: int) -> Path:
    """Where a run's record lies."""
    return results / f"{method}-seed{seed}.json"


def records(results: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """All finished runs: method, seed, record."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for path in sorted(results.glob("*-seed*.json")):
        record = json.loads(path.read_text())
        found.setdefault(record["method"], {})[record["seed"]] = record
    return found


def _work(method: str, seed: int, budget: str, data: Path, device: str, results: Path, cache: Path) -> dict[str, Any]:
    record = train(method, seed, BUDGETS[budget], *_images(data, budget, device), cache)
    path = record_path(results, method, seed)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(record, indent=1) + "\n")
    unfinished.replace(path)
    return record


@functools.cache
def _images(data: Path, budget: str, device: str) -> tuple[Images, Images]:
    return load(data, BUDGETS[budget], torch.device(device))
