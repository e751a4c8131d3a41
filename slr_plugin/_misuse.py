"""Warns of uses that raise no error and yet compute something else than is meant."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from slr_plugin._torch_internals import current_backward
from slr_plugin.key_sets import KeySet

_ALONE = (
    "one sample and no queue leave no negative: this loss and its gradient are 0; take larger batches (a DataLoader's "
    "drop_last=True leaves out a last batch of one), pass negatives, or "
)
ALONE, ALONE_IN_FUNCTION = f"{_ALONE}set memory_bank_size", f"{_ALONE}a queue"
SUMMED = (
    "two calls of this loss were summed in one backward, and their keys show the same images: each call advances the "
    "queue and the schedule, and the second takes the first one's keys, of its own images, as negatives; give each "
    "direction a loss of its own, or pass update=False to all calls but the last"
)

ALIKE = (
    "the features given as estimator hardly tell the samples apart: none is negative and every two have a cosine above "
    "0.9, or some are 0 altogether; subtract their mean over the training data, and divide by their deviation"
)


def is_alone(key_set: KeySet) -> bool:
    """Whether no row sees a key besides its own: there is one sample, whose views are all keys."""
    return key_set.queue is None and len(key_set.keys) == len(key_set.own) > 0


class Watch:
    """Warns once of each misuse of one loss.

    Reads no value from a device, but for the first features of an estimator, and where two calls were summed.
    """

    def __init__(self) -> None:
        self._told: set[str] = set()
        self._saw_estimator = False
        self._summed = 0  # how often two calls were summed
        self._last: tuple[int, Tensor] | None = None  # the newest backward, and the keys of the call in it

    def follow(self, key_set: KeySet, loss: Tensor, enqueues: bool) -> None:
        """Look at a call that is trained; a call that enqueues is looked at in its backward too."""
        if torch.compiler.is_compiling() or not loss.requires_grad:
            return
        if is_alone(key_set):
            self._tell(ALONE)
        estimator = key_set.estimator_keys
        if estimator is not None and not self._saw_estimator and not _is_capturing(loss):
            self._saw_estimator = True
            if _are_alike(estimator.positives):
                self._tell(ALIKE)
        if enqueues and SUMMED not in self._told:
            keys = key_set.positives.detach()
            loss.register_hook(lambda grad: self._backward(keys))  # type: ignore[no-untyped-call]

    def _backward(self, keys: Tensor) -> None:
        backward, last = current_backward(), self._last
        self._last = (backward, keys)
        if last is None or last[0] != backward or last[1].shape != keys.shape or last[1].device != keys.device:
            return
        self._summed += 1
        # Different batches may be summed, and comparing keys waits for the device: look at the sums 1, 2, 4, 8, ...
        if self._summed & (self._summed - 1) == 0 and _show_the_same(last[1], keys):
            self._tell(SUMMED)
            self._last = None

    def _tell(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            warnings.warn(message, stacklevel=6)  # the caller of the module; in a backward, torch


def _is_capturing(like: Tensor) -> bool:
    """Whether a CUDA graph is recorded, which cannot read values."""
    return like.is_cuda and torch.cuda.is_current_stream_capturing()


def _are_alike(features: Tensor) -> bool:
    """Whether unit rows are useless as they are: not negative and alike, or of length 0."""
    features = features[:256]
    cosines = features @ features.T
    alike = (cosines.min() > 0.9) & (features.min() >= 0) & (features.shape[1] > 1)
    return len(features) > 1 and bool(alike | (cosines.diagonal().min() < 0.5))


def _show_the_same(first: Tensor, second: Tensor) -> bool:
    """Whether row i of both is of one image: the products of these rows against those of all others.

    Of unrelated rows, the mean of s products has the deviation of one divided by sqrt(s); 6 of these do not come by
    chance.
    """
    if _is_capturing(first):
        return False
    products = (first - first.mean(0)) @ (second - second.mean(0)).T
    others = products - torch.diag_embed(products.diagonal())
    deviation = (others.square().sum() / max(1, others.numel() - len(others))).sqrt()
    return bool(products.diagonal().mean() > 6 * deviation / len(first) ** 0.5)
