"""What is known of the training images, in files with a row for each of them, looked up by their numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Knowledge:
    """The groups and the features of all training images, of which a batch's are looked up.

    Row i is of image i of solo-learn's data set, the number that comes with every image: of an ImageFolder, class
    folders and the files in them by name (``torchvision.datasets.ImageFolder(DIR).samples``); of CIFAR and STL-10, the
    order of torchvision's classes; of a folder without classes (``no_labels``), which has no order, files by name.

    Args:
        files: paths by name: ``groups``, a text with a whole number a line (negative: in no group), or an .npy file of
            whole numbers (n,); ``estimator``, an .npy file of numbers (n, e), read as it is needed. None for none.

    Raises:
        ValueError: a file is not there, or holds something else.
    """

    def __init__(self, files: Mapping[str, str | None]) -> None:
        self.files = {name: path for name, path in files.items() if path}
        self.tables = {name: _read(name, path) for name, path in self.files.items()}
        self._row: Any = None  # of each image; None: its own number

    @property
    def estimator_dim(self) -> int | None:
        """The width of the features, None without any."""
        return self.tables["estimator"].shape[1] if "estimator" in self.tables else None

    def check(self, dataset: Any) -> None:
        """Raise ValueError unless there is a row for every image."""
        for name, table in self.tables.items():
            if len(table) != len(dataset):
                raise ValueError(
                    f"method_kwargs.{name}: {self.files[name]} has {len(table):,} rows, and there are {len(dataset):,} "
                    "training images: write one for each, in the order of the data set (with data.fraction, of those "
                    "that it leaves)"
                )
        if isinstance(images := getattr(dataset, "images", None), list):  # solo-learn's CustomDatasetWithoutLabels
            self._row = np.argsort(np.argsort(images))

    def of(self, indexes: Tensor) -> dict[str, Tensor]:
        """The ids (s,) and the features (s, e) of images, on the CPU, as SLRLoss takes them."""
        rows = indexes.numpy() if self._row is None else self._row[indexes.numpy()]
        return {name: torch.from_numpy(table[rows].astype(_DTYPES[name])) for name, table in self.tables.items()}


_DTYPES: Any = {"groups": np.int64, "estimator": np.float32}


def _read(name: str, path: str) -> Any:
    try:
        is_array = Path(path).suffix == ".npy"
        table = np.load(path, mmap_mode="r") if is_array else np.loadtxt(path, dtype=np.int64, ndmin=1)
    except (OSError, ValueError) as error:
        raise ValueError(f"method_kwargs.{name}: {path} cannot be read: {error}") from error
    wanted = "numbers, one row (e,) for each image" if name == "estimator" else "whole numbers, one for each image"
    kinds, dims = ("iuf", 2) if name == "estimator" else ("iu", 1)
    if table.dtype.kind not in kinds or table.ndim != dims:
        raise ValueError(f"method_kwargs.{name}: {path} must hold {wanted}, got {table.dtype} of shape {table.shape}")
    return table
