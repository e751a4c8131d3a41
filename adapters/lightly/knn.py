"""The kNN vote of lightly's benchmarks, inside of another module."""

from __future__ import annotations

from typing import Any

import torch
from lightly.utils.benchmarking import KNNClassifier
from torch import Tensor

from slr_plugin.distributed import world_size


class KNNVote(KNNClassifier):  # type: ignore[misc]  # lightly is untyped
    """lightly's KNNClassifier on features; of fewer than ``knn_k`` images all vote, and the module around it logs."""

    def __init__(self, num_classes: int, knn_k: int, knn_t: float, topk: tuple[int, ...]) -> None:
        super().__init__(None, num_classes, knn_k, knn_t, 0, 1, topk)
        self.most, self.images = knn_k, 0

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # lists that grow would be compiled anew at every batch
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int) -> Any:
        """Remember features and targets of loader 0; return the accuracies of a batch of loader 1."""
        if dataloader_idx == 0:
            self.images = len(batch[1]) + (self.images if batch_idx else 0)
        self.knn_k = min(self.most, self.images * world_size())
        with torch.autocast(batch[0].device.type, enabled=False):
            return super().validation_step(batch, batch_idx, dataloader_idx)

    def log_dict(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: Lightning lets only the outermost module log."""
