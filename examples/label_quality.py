"""Where refined labels lie, told by classes that training never sees."""

from __future__ import annotations

import torch
from torch import Tensor


class QueueClasses:
    """The classes of the keys in a queue, in step with it; -1 for the random keys that fill it at first."""

    def __init__(self, size: int) -> None:
        self.classes = torch.full((size,), -1)
        self.start = 0

    def enqueue(self, classes: Tensor) -> None:
        """Call it once for every batch that enters the queue."""
        places = (self.start + torch.arange(len(classes))) % len(self.classes)
        newest = slice(-len(self.classes), None)
        self.classes[places[newest]] = classes[newest]
        self.start = (self.start + len(classes)) % len(self.classes)


def measure_labels(labels: Tensor, classes: Tensor, queue_classes: Tensor) -> tuple[float, float]:
    """Label mass beyond the own positive, in per cent: on keys of the own class and on keys of other classes.

    ``labels`` (s, K) are ``criterion.labels(queries, keys)`` before the call that enqueues the keys; a one-hot label
    has no such mass. Random keys, class -1, count in neither. With ``in_batch_keys=False`` K is 1 + queue, the own
    positive coming first.
    """
    is_shared = labels.shape[1] == len(classes) + len(queue_classes)
    key_classes = torch.cat([classes, queue_classes]) if is_shared else torch.cat([classes[:1], queue_classes])
    same = classes[:, None] == key_classes
    elsewhere = labels.clone()
    if is_shared:
        elsewhere.fill_diagonal_(0)  # key i is the positive of row i
    else:
        elsewhere[:, 0] = 0
    other = ~same & (key_classes >= 0)
    return tuple(100 * (elsewhere * mask).sum(1).mean().item() for mask in (same, other))
