"""Rows of numbers: letters, and spoken vowels judged on speakers that were not trained on.

Views replace a share of the values by those of other rows. The data lie in a Debian package, and ``pip install pyreadr
pandas`` reads them:

    apt-get download r-cran-mlbench && dpkg-deb -x r-cran-mlbench_*.deb mlbench
    python examples/tabular.py --data mlbench/usr/lib/R/site-library/mlbench/data

Without ``--data``: scikit-learn's wines and tumours.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from comparison import Layers, Task, corrupt, main, standardised
from sklearn.datasets import load_breast_cancer, load_wine
from torch import Tensor


def tasks(data: Path | None) -> dict[str, Task]:
    """The data sets of a folder."""

    def task(table: Tensor, classes: Tensor, groups: Tensor | None = None) -> Task:
        table = standardised(table.float())
        return Task(table, classes, functools.partial(Layers, table.shape[1]), corrupt, table, groups)

    if data is None:
        sets = {"wines": load_wine(), "tumours": load_breast_cancer()}
        return {name: task(torch.from_numpy(x.data), torch.from_numpy(x.target)) for name, x in sets.items()}
    import pyreadr

    letters = pyreadr.read_r(str(data / "LetterRecognition.rda"))["LetterRecognition"]
    vowels = pyreadr.read_r(str(data / "Vowel.rda"))["Vowel"]
    numbers = vowels.columns[1:-1]  # the first column is the speaker, the last one the vowel
    speakers = torch.tensor(vowels["V1"].astype(int).to_numpy())
    return {
        "letters": task(torch.tensor(letters.iloc[:, 1:].to_numpy(float)), codes(letters.iloc[:, 0])),
        "vowels": task(torch.tensor(vowels[numbers].to_numpy(float)), codes(vowels.iloc[:, -1]), speakers),
    }


def codes(column: object) -> Tensor:
    """Numbers of the categories of a column."""
    return torch.tensor(column.astype("category").cat.codes.to_numpy(), dtype=torch.int64)


if __name__ == "__main__":
    main(__doc__, tasks, steps=400)
