"""What is known of images beside their pixels: ids of groups, or features of another network.

A table has a row for each image in the data set's order: of torchvision's ImageFolder and lightly's LightlyDataset,
that of ``ImageFolder(DIR).samples``; of a folder that solo-learn reads without classes, files by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from slr_plugin.checks import check_float_tensor, check_index_tensor


class Indexed(Dataset[Any]):
    """A data set, such as torchvision's ImageFolder, whose items also say which they are: (views, target, index)."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> tuple[Any, Any, int]:
        views, target = self.dataset[index][:2]
        return views, target, int(index)

    def __len__(self) -> int:
        return len(self.dataset)


class Knowledge:
    """Tables by the names of the loss's arguments, ``groups`` (n,) and ``estimator`` (n, e); perhaps none.

    Raises:
        ValueError: a table is of the wrong shape, or holds values that are not finite.
        TypeError: a table is no tensor of whole numbers, or of floating point numbers.
    """

    def __init__(self, groups: Tensor | None = None, estimator: Tensor | None = None) -> None:
        self.tables: dict[str, Tensor] = {}
        self._rows: Any = None  # of each image, by its name or number; None: its number
        if groups is not None:
            check_index_tensor("groups", groups)
            if groups.ndim != 1:
                raise ValueError(f"groups must have shape (images,), an id for each, got {tuple(groups.shape)}")
            self.tables["groups"] = groups.to(torch.int64)
        if estimator is not None:
            check_float_tensor("estimator", estimator)
            if estimator.ndim != 2 or not estimator.isfinite().all():
                shape = tuple(estimator.shape)
                raise ValueError(f"estimator must have shape (images, features) and finite values, got {shape}")
            self.tables["estimator"] = estimator

    @property
    def estimator_dim(self) -> int | None:
        """The width of the features, None without any."""
        return self.tables["estimator"].shape[1] if "estimator" in self.tables else None

    def attach(self, dataset: Any) -> None:
        """Take the order of a data set, or of that of which it is a part; ValueError unless every image has a row."""
        while isinstance(dataset, Subset):
            dataset = dataset.dataset
        count = len(dataset)
        for name, table in self.tables.items():
            if len(table) != count:
                raise ValueError(f"{name} must have a row for each of the {count} training images, got {len(table)}")
        if hasattr(dataset, "get_filenames"):  # LightlyDataset, whose batches hold names
            self._rows = {name: row for row, name in enumerate(dataset.get_filenames())}
        elif isinstance(names := getattr(dataset, "images", None), list):  # solo-learn's folder, in no order
            self._rows = torch.from_numpy(np.argsort(np.argsort(names)))

    def of(self, images: Tensor | Sequence[str]) -> dict[str, Tensor]:
        """The rows of images, which are known by their numbers or names, as SLRLoss takes them."""
        if isinstance(images, Tensor):
            rows = images.cpu() if self._rows is None else self._rows[images.cpu()]
        else:
            rows = torch.tensor([self._rows[name] for name in images])
        return {name: table[rows] for name, table in self.tables.items()}


def read(prefix: str, groups: str | Path | None = None, estimator: str | Path | None = None) -> dict[str, Tensor]:
    """The tables in files, as :class:`Knowledge` takes them; ``prefix`` is what users write before their names.

    ``groups`` is a text with a whole number a line, or an .npy file of whole numbers (n,); ``estimator`` an .npy file
    of numbers (n, e). A file that is missing, damaged, or holds something else is a ValueError of one line.
    """
    files = {"groups": groups, "estimator": estimator}
    return {name: read_table(prefix + name, path, name == "groups") for name, path in files.items() if path is not None}


def read_table(option: str, path: str | Path, is_ids: bool = False) -> Tensor:
    """The table in one file, of ids or of features; features in float32 are read as they are needed."""
    try:
        is_text = Path(path).suffix != ".npy"
        table = np.loadtxt(path, dtype=np.int64, ndmin=1) if is_text else np.load(path, mmap_mode="c")
        if table.dtype.kind in "iu" or not is_ids:
            table = table.astype(np.int64 if is_ids else np.float32, copy=False)
        known = Knowledge(**{"groups" if is_ids else "estimator": torch.from_numpy(table)})
    except (OSError, EOFError, TypeError, ValueError) as error:
        raise ValueError(f"{option}: {path}: {' '.join(str(error).split())}") from error
    (found,) = known.tables.values()
    return found
