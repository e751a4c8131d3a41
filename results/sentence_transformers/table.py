"""The tables of results/sentence_transformers/README.md: python table.py FILE, what the example appended to it."""

import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from scipy.stats import t as student


def main(path: str) -> None:
    """A row per method, a column per share and kind of copies; differences from ``mnrl`` are paired by seeds."""
    runs: dict[tuple[bool, int], dict[str, dict[int, tuple[float, float]]]] = defaultdict(lambda: defaultdict(dict))
    for run in map(json.loads, Path(path).read_text().splitlines()):
        runs[run["near"], run["share"]][run["method"]][run["seed"]] = run["mrr"], run["ndcg10"]
    for (near, share), methods in sorted(runs.items()):
        print(f"\n{share} % in groups, {'near' if near else 'exact'} copies\n")
        print("| | seeds | MRR | nDCG@10 | MRR - mnrl, 95 % interval |\n|---|--:|--:|--:|--:|")
        for method, by_seed in methods.items():
            seeds = sorted(by_seed)
            values = np.array([by_seed[seed] for seed in seeds])
            difference = np.array([by_seed[seed][0] - methods["mnrl"][seed][0] for seed in seeds])
            if len(seeds) == 1:
                cells = [f"{value:.2f}" for value in values[0]] + [f"{difference[0]:+.2f}"]
            else:
                cells = [f"{column.mean():.2f} ± {column.std(ddof=1):.2f}" for column in values.T]
                margin = student.ppf(0.975, len(seeds) - 1) * difference.std(ddof=1) / len(seeds) ** 0.5
                cells.append(f"{difference.mean():+.2f} ± {margin:.2f}")
            cells[-1] = "" if method == "mnrl" else cells[-1]
            cells.insert(0, str(len(seeds)))
            print(f"| {method} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
