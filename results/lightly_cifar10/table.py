"""The table of results/lightly_cifar10/README.md from runs' results.json: python table.py FILE [FILE ...]."""

import json
import sys
from pathlib import Path

import numpy as np
from scipy.stats import t as student

METHODS = ("mocov2", "sane")


def main(paths: list[str]) -> None:
    """One row per method: mean and standard deviation over the seeds; then their paired difference."""
    runs = [json.loads(Path(path).read_text()) for path in paths]
    accuracies = {
        method: np.array(
            [
                (run["knn"], run["linear"])
                for run in sorted(runs, key=lambda run: run["arguments"]["seed"])
                if run["arguments"]["method"] == method
            ]
        )
        for method in METHODS
    }
    print("| | kNN % | linear % |\n|---|--:|--:|")
    for method, values in accuracies.items():
        print(f"| {method} | " + " | ".join(f"{c.mean():.2f} ± {c.std(ddof=1):.2f}" for c in values.T) + " |")
    differences = accuracies["sane"] - accuracies["mocov2"]
    margin = student.ppf(0.975, len(differences) - 1) * differences.std(0, ddof=1) / len(differences) ** 0.5
    cells = zip(differences.mean(0), margin, strict=True)
    print("| sane - mocov2, 95 % interval | " + " | ".join(f"{m:+.2f} ± {w:.2f}" for m, w in cells) + " |")


if __name__ == "__main__":
    main(sys.argv[1:])
