"""The table of results/solo_cifar10/README.md from the runs' files: python table.py FILE [FILE ...]."""

import json
import sys
from pathlib import Path

import numpy as np

METHODS = ("mocov2plus", "ressl", "nnclr", "sane")
FIGURES = ("val_knn_acc1", "val_acc1")


def main(paths: list[str]) -> None:
    """One row per method: the last epoch's accuracies, mean and both seeds; then how sane differs from the others."""
    runs = [json.loads(Path(path).read_text()) for path in paths]
    table = {
        method: np.array(
            [
                [run["epochs"][-1][figure] for figure in FIGURES]
                for run in sorted(runs, key=lambda run: run["seed"])
                if run["method"] == method
            ]
        )
        for method in METHODS
    }
    print("| | kNN % | online linear % |\n|---|--:|--:|")
    rows = table | {f"sane - {method}": table["sane"] - table[method] for method in METHODS[:-1]}
    for name, values in rows.items():
        sign = "+" if " - " in name else ""
        cells = (f"{c.mean():{sign}.2f} ({', '.join(f'{value:{sign}.2f}' for value in c)})" for c in values.T)
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main(sys.argv[1:])
