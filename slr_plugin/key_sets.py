"""Which keys each row sees, which one is its own, and what the columns are called: the one place that knows.

A *row* is a trained feature with a positive, its *own* key. The streaming pass leaves out a row's own key, and the
objective adds it back; mixed queries see all keys. To add a key set, write its constructor, let ``choose`` call it, and
see that ``column_classes`` names its columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from slr_plugin._inputs import Features
from slr_plugin.streaming import Diagonal


class KeySet(NamedTuple):
    """Rows and the keys that they see. All features have unit length.

    Rows come in blocks of equal size, one per view. The columns of every dense matrix, such as labels, are ``keys`` and
    then ``queue``; where the own keys are not among ``keys``, the own key of each row stands before them.
    """

    rows: Tensor  # (r, d), trained
    positives: Tensor  # (s, d), one per sample
    keys: Tensor  # (b, d) keys of this step, which may be trained: the batch's, then further negatives
    batch_count: int  # how many of ``keys`` are the batch's
    own: tuple[int, ...]  # of each block: the key that is its first row's own; () if none of ``keys`` is
    entering: Tensor  # (S, d), the positives of all processes, which enter the queue after the call
    left_out: tuple[int, ...] = ()  # of each block: a key that its first row does not see, such as the row itself
    mixed_keys: KeySet | None = None  # what mixed queries see, where that is not what the rows see
    queue: Tensor | None = None  # (n, d) constants
    estimator_keys: KeySet | None = None  # the same keys in other features, which estimate the labels instead

    # Methods, since torch.compile cannot trace a property of a tuple in torch 2.4.

    def is_symmetric(self) -> bool:
        """Whether both views are rows: the second ones after the first ones, as in ``keys``."""
        return len(self.own) == 2

    def is_square(self) -> bool:
        """Whether the rows are all keys, in their order: half of the logits are then enough."""
        return self.is_symmetric() and self.keys is self.rows and self.queue is None

    def labelled(self, has_mixed: bool) -> KeySet:
        """The key set whose keys the labels spread over, with mixed queries or without."""
        return self if self.mixed_keys is None or not has_mixed else self.mixed_keys

    def own_keys(self) -> Tensor:
        """The own key (r, d) of each row, which also estimates its label."""
        return self.rows.roll(len(self.positives), 0) if self.is_symmetric() else self.positives

    def hidden(self, first: int = 0) -> list[Diagonal]:
        """The keys that the pass leaves out, for rows (or their estimators) that begin at row ``first`` of the pass."""
        size = len(self.positives)
        starts = [(block, start) for of in (self.own, self.left_out) for block, start in enumerate(of)]
        return [Diagonal(first + block * size, start, size) for block, start in starts]

    def with_queue(self, queue: Tensor | None, estimator_queue: Tensor | None) -> KeySet:
        """The key set and these further keys, and their features that estimate labels if there is an estimator."""
        estimator = self.estimator_keys
        # Not _replace, which torch.compile cannot trace in torch 2.4.
        return KeySet(
            rows=self.rows,
            positives=self.positives,
            keys=self.keys,
            batch_count=self.batch_count,
            own=self.own,
            entering=self.entering,
            left_out=self.left_out,
            mixed_keys=self.mixed_keys,
            queue=queue,
            estimator_keys=None if estimator is None else estimator.with_queue(estimator_queue, None),
        )

    # ------------------------------------------------------------------------- dense matrices, for looking at and tests

    def similarity(self, features: Tensor) -> Tensor:
        """The cosines (r, K) of features (r, d), one per row, with the row's columns."""
        table = self.keys if self.queue is None else torch.cat([self.keys, self.queue.to(self.keys)])
        cosines = features @ table.T
        if self.own:
            return cosines
        return torch.cat([(features * self.own_keys()).sum(1, keepdim=True), cosines], dim=1)

    def own_columns(self) -> Tensor:
        """The column (r,) of each row's own key."""
        rows = torch.arange(len(self.positives), device=self.positives.device)
        return torch.cat([rows + start for start in self.own]) if self.own else torch.zeros_like(rows)

    def left_out_columns(self) -> Tensor | None:
        """The column (r,) that each row does not see, or None."""
        first = torch.arange(len(self.positives), device=self.positives.device) + (0 if self.own else 1)
        return torch.cat([first + start for start in self.left_out]) if self.left_out else None

    def column_classes(self, local: Tensor, everyone: Tensor, queue: Tensor) -> tuple[Tensor, Tensor]:
        """The classes of rows, (r,), and of columns, (K,) or (r, K), from those of samples.

        -1 for further negatives, and for what a row does not see.

        Args:
            local: (s,) classes of this process's samples.
            everyone: (S,) of the samples of all processes.
            queue: (n,) of the queue's keys.
        """
        batch = everyone.repeat(self.batch_count // len(everyone))
        columns = torch.cat([batch, batch.new_full((len(self.keys) - self.batch_count,), -1), queue])
        if not self.own:
            columns = torch.cat([local[:, None], columns.expand(len(local), -1)], dim=1)
        left_out = self.left_out_columns()
        if left_out is not None:
            columns = columns.expand(len(left_out), -1).scatter(1, left_out[:, None], -1)
        return local.repeat(max(1, len(self.own))), columns


def batch_and_queue(
    queries: Tensor,
    positives: Tensor,
    batch: Tensor,
    negatives: Tensor | None = None,
    offset: int = 0,
    estimator: KeySet | None = None,
) -> KeySet:
    """The paper's key set: all positives of the batch, further negatives, the queue. Without a queue: one direction.

    Args:
        queries: (s, d), the rows.
        positives: (s, d), their own keys.
        batch: (S, d), the positives of all processes.
        negatives: (m, d), keys that are nobody's own.
        offset: the index of ``positives[0]`` in ``batch``.
        estimator: the same for other features of the samples.
    """
    keys = _with_negatives(batch, negatives)
    return KeySet(queries, positives, keys, len(batch), (offset,), entering=batch, estimator_keys=estimator)


def own_positive_and_queue(
    queries: Tensor,
    positives: Tensor,
    batch: Tensor,
    negatives: Tensor | None = None,
    estimator: KeySet | None = None,
) -> KeySet:
    """MoCo's key set: the own positive, further negatives, the queue. Arguments as above."""
    keys = positives[:0] if negatives is None else negatives
    return KeySet(queries, positives, keys, 0, (), entering=batch, estimator_keys=estimator)


def both_views(
    rows: Tensor,
    batch: Tensor,
    negatives: Tensor | None = None,
    offset: int = 0,
    estimator: KeySet | None = None,
) -> KeySet:
    """SimCLR's key set: both views are rows and keys; a row sees all keys but itself, its other view is its own key.

    Mixed queries see the second views only, which estimate their labels.

    Args:
        rows: (2s, d), the first views and then the second ones.
        batch: (2S, d), the views of all processes; ``rows`` itself in one process.
        negatives: (m, d), keys that are nobody's own.
        offset: the index of ``rows[0]`` in ``batch``.
        estimator: the same for other features of the samples.
    """
    second = len(batch) // 2
    positives, entering = rows[len(rows) // 2 :], batch[second:]
    mixed = batch_and_queue(rows[:0], positives, entering, negatives, offset, estimator and estimator.mixed_keys)
    return KeySet(
        rows,
        positives,
        _with_negatives(batch, negatives),
        len(batch),
        own=(second + offset, offset),
        entering=entering,
        left_out=(offset, second + offset),
        mixed_keys=mixed,
        estimator_keys=estimator,
    )


def choose(
    features: Features,
    *,
    in_batch_keys: bool,
    symmetric: bool,
    has_queue: bool,
    gather: Callable[[Tensor], Tensor] | None = None,
    offset: int = 0,
) -> KeySet:
    """The key set of a call, before its queue.

    Args:
        features: of the call.
        in_batch_keys: whether the batch's other keys are seen.
        symmetric: whether both views are rows.
        has_queue: whether a queue follows.
        gather: brings the rows of all processes; None where there is one.
        offset: the index of this process's first sample among them.

    Raises:
        ValueError: a row would have no keys, or mixed queries would lack their partner's positive.
    """
    positives, negatives = features.positives, features.negatives
    if features.mixes and not in_batch_keys:
        raise ValueError(
            "mixed queries need labels over the batch's keys: set in_batch_keys=True, or leave out mixed and mix"
        )
    if not (has_queue or symmetric or in_batch_keys) and negatives is None:
        raise ValueError("in_batch_keys=False and no queue leave no key but the own positive: pass negatives")
    queries, estimator = features.queries, None
    if features.estimator is not None:
        same = Features(features.estimator, features.estimator)
        how = {"in_batch_keys": in_batch_keys, "symmetric": symmetric, "has_queue": has_queue}
        estimator = choose(same, **how, gather=gather, offset=offset)
    if negatives is not None and gather:
        negatives = gather(negatives)
    if symmetric:
        batch = rows = torch.cat([queries, positives])
        if gather:
            batch = torch.cat(gather(torch.cat([queries, positives], dim=1)).chunk(2, dim=1))  # one exchange
        return both_views(rows, batch, negatives, offset, estimator)
    batch = gather(positives if in_batch_keys else positives.detach()) if gather else positives
    if in_batch_keys:
        return batch_and_queue(queries, positives, batch, negatives, offset, estimator)
    return own_positive_and_queue(queries, positives, batch, negatives, estimator)


def _with_negatives(keys: Tensor, negatives: Tensor | None) -> Tensor:
    return keys if negatives is None else torch.cat([keys, negatives])
