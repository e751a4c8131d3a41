"""What is known of images beside their pixels: ids of groups, or features of another network.

A table has a row for each image of the data set, in its order; a batch says which images it has. Its third entry holds
their names, as lightly's LightlyDataset gives them, or their indices, as :class:`Indexed` does.
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
    """Tables (n, ...), by the names of the loss's arguments, ``groups`` and ``estimator``.

    Raises:
        ValueError: a table is of the wrong shape, holds values that are not finite, or has not one row per image.
        TypeError: a table is no tensor of int64, or of floating point numbers.
    """

    def __init__(self, groups: Tensor | None, estimator: Tensor | None) -> None:
        self.tables: dict[str, Tensor] = {}
        self._named: Any = None  # the data set whose names these are
        self._rows: dict[str, int] = {}
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

    def check_length(self, dataset: Any) -> None:
        """Raise unless the tables have as many rows as the data set images."""
        images = len(_whole(dataset))
        for name, table in self.tables.items():
            if len(table) != images:
                raise ValueError(f"{name} must have a row for each of the {images} training images, got {len(table)}")

    def look_up(self, batch: Any, dataset: Any) -> Any:
        """The batch with the rows of its images, by table, as its third entry; it may have them already."""
        which = batch[2] if isinstance(batch, Sequence) and len(batch) > 2 else None
        if isinstance(which, dict):
            return batch
        if isinstance(which, Sequence) and all(isinstance(name, str) for name in which):
            which = torch.tensor([self._names_of(_whole(dataset))[name] for name in which])
        if not isinstance(which, Tensor) or which.dtype != torch.int64:
            raise ValueError(
                f"with {' and '.join(self.tables)} a batch must be (views, targets, names or indices): take lightly's "
                "LightlyDataset, or wrap a data set in slr_plugin.adapters.lightly.Indexed"
            )
        rows = which.cpu()
        return [*batch[:2], {name: table[rows].to(batch[1].device) for name, table in self.tables.items()}]

    def _names_of(self, dataset: Any) -> dict[str, int]:
        """The row of each name, in the order of the folder."""
        if self._named is not dataset:
            if not hasattr(dataset, "get_filenames"):
                raise ValueError("a batch names its images, but the data set is no LightlyDataset with get_filenames()")
            self._named = dataset
            self._rows = {name: row for row, name in enumerate(dataset.get_filenames())}
        return self._rows


def read(estimator: Path | None = None, groups: Path | None = None, images: int | None = None) -> dict[str, Tensor]:
    """The tables in files, for a data set of so many images.

    Raises:
        ValueError: a file is missing or damaged, or has another length or dtype; one line that begins with its option.
    """
    files = (("estimator", estimator), ("groups", groups))
    return {name: read_table(name, path, images) for name, path in files if path is not None}


def read_table(option: str, path: Path, images: int | None = None) -> Tensor:
    """The table in the file of one option, which is ``groups`` or holds features; raises as :func:`read`."""
    try:
        table = (_read_groups if option == "groups" else _read_estimator)(path)
        if images is not None and len(table) != images:
            raise ValueError(f"has {len(table)} rows, but there are {images} images")
    except (OSError, EOFError, ValueError) as error:
        reason = f"there is no file {path}" if isinstance(error, FileNotFoundError) else f"{path}: {error}"
        raise ValueError(f"--{option}: {' '.join(reason.split())}") from error
    return torch.from_numpy(table)


def _read_estimator(path: Path) -> np.ndarray[Any, Any]:
    table: Any = np.load(path)
    if not isinstance(table, np.ndarray) or table.ndim != 2 or table.dtype.kind != "f" or not table.shape[1]:
        raise ValueError(f"must hold floating point numbers (images, features), got {_kind(table)}")
    features: np.ndarray[Any, Any] = table.astype(np.float32)
    if not np.isfinite(features).all():
        raise ValueError("holds values that are not finite")
    return features


def _read_groups(path: Path) -> np.ndarray[Any, Any]:
    if path.suffix != ".npy":
        return np.array([int(line) for line in path.read_text().splitlines()], dtype=np.int64)
    table: Any = np.load(path)
    if (
        not isinstance(table, np.ndarray)
        or table.ndim != 1
        or table.dtype.kind not in "iu"
        or not np.can_cast(table.dtype, np.int64)
    ):
        raise ValueError(f"must hold whole numbers (images,), got {_kind(table)}")
    ids: np.ndarray[Any, Any] = table.astype(np.int64)
    return ids


def _kind(table: Any) -> str:
    return f"{table.dtype} of shape {table.shape}" if isinstance(table, np.ndarray) else "several arrays"


def _whole(dataset: Any) -> Any:
    """The data set of which this is a part."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return dataset
