"""Activation checkpointing computes calls again in the backward, when queue and schedule may have moved on."""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slr_plugin._inputs import Features
from slr_plugin._torch_internals import (
    current_backward,
    is_in_reentrant_checkpoint,
    saves_tensors_by_hooks,
    without_modes,
)


def is_repeated() -> bool:
    """Whether the call under way is computed within a backward, for its gradient."""
    return not torch.compiler.is_compiling() and current_backward() != -1 and torch.is_grad_enabled()


def is_recomputed() -> bool:
    """Whether checkpointing is computing the current operator again; operators can ask inside compiled code too."""
    return current_backward() != -1 and (is_in_reentrant_checkpoint() or saves_tensors_by_hooks())


class Place(NamedTuple):
    """Where in the run a call stands."""

    step: Tensor  # of the schedule
    version: int  # of the queue; -1 if what was there then is lost
    advanced: bool = False
    fingerprint: Any = None  # of the features, a small tensor


class Standing(NamedTuple):
    """What the log knows of a call."""

    place: Place  # for a repeated one where it stood at first
    advances: bool
    is_repeated: bool = False
    follows_others: bool = False  # whether it is repeated and advances after calls that came later


class CallLog:
    """Knows the newest calls again when they are repeated in the backward."""

    def __init__(self) -> None:
        self._places: deque[Place] = deque(maxlen=64)  # more calls than lie between any forward and its backward

    def place(self, now: Place, updates: bool, matters: bool, features: Features) -> Standing:
        """Return where a call stands.

        Non-reentrant checkpointing records a gradient both times: only the first run advances. Reentrant checkpointing
        records none in the first run: only the repetition advances.

        Args:
            now: where the run stands.
            updates: whether the call asks to advance.
            matters: whether the loss depends on the place at all.
            features: of the call, by which it is known again.

        Raises:
            RuntimeError: a repeated call is not known any more.
        """
        if torch.compiler.is_compiling():
            return Standing(now, updates)
        repeated = is_repeated()
        reentrant = repeated and is_in_reentrant_checkpoint()
        advances = updates and (reentrant or not repeated)
        if not matters:
            return Standing(now, advances)
        if not repeated:
            numbers = _fingerprint(features)
            self._places.append(now._replace(step=now.step.clone(), advanced=updates, fingerprint=numbers))
            return Standing(now, advances)
        with without_modes():  # selective checkpointing takes no operation that the first run did not have
            seen = str(_fingerprint(features).tolist())  # as a string, of which nan equals itself
            for place in reversed(self._places):
                if place.advanced == (updates and not reentrant) and str(place.fingerprint.tolist()) == seen:
                    lost = advances and int(place.step) != int(now.step)
                    follows_others = advances and place is not self._places[-1]
                    return Standing(place._replace(version=-1) if lost else place, advances, True, follows_others)
        raise RuntimeError(
            "activation checkpointing repeats a call of SLRLoss too long ago, or with other features: checkpoint the "
            "encoder without the loss"
        )


def _fingerprint(features: Features) -> Tensor:
    """Numbers by which a repeated call is known.

    The dot product is shifted by one element, so that it changes where the two views change places.
    """
    queries, positives, crops, _, negatives, estimator = features
    products = torch.dot(queries.detach().flatten()[:-1], positives.detach().flatten()[1:])
    return torch.stack([products, *(x.detach().sum() for x in (*crops, negatives, estimator) if x is not None)])
