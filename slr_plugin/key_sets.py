"""Which keys each row sees, which one is its own, and what the columns are called: the one place that knows.

A *row* is a trained feature with a positive, its *own* key. Every key set hides a row's own key in the streaming pass;
the objective adds it back. To add a key set, write its constructor, and let ``choose`` call it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from slr_plugin.streaming import Diagonal


class KeySet(NamedTuple):
    """Rows and the keys that they see. All features have unit length.

    Rows come in blocks of equal size, one per view. The columns of every dense matrix, such as labels, are ``keys`` and
    then ``queue``; where the own keys are not among ``keys``, the own key of each row stands before them.
    """

    rows: Tensor  # (r, d), trained
    positives: Tensor  # (s, d), one per sample
    keys: Tensor  # (b, d) keys of this step, which may be trained: the batch's, then further negatives
    queue: Tensor | None  # (n, d) constants
    batch: int  # how many of ``keys`` are the batch's
    own: tuple[int, ...]  # of each block: the key that is its first row's own; () if none of ``keys`` is
    left_out: tuple[int, ...] = ()  # of each block: a key that its first row does not see, such as the row itself
    is_symmetric: bool = False  # whether both views are rows: the second ones after the first ones, as in ``keys``
    is_square: bool = False  # whether the rows are all keys, in their order: half of the logits are then enough
    estimator: KeySet | None = None  # the same keys in other features, which estimate the labels instead

    @property
    def blocks(self) -> int:
        """The number of views that are rows."""
        return max(1, len(self.own))

    def own_keys(self) -> Tensor:
        """The own key (r, d) of each row, which also estimates its label."""
        return self.rows.roll(len(self.positives), 0) if self.is_symmetric else self.positives

    def hidden(self, first: int = 0) -> list[Diagonal]:
        """The keys that the pass leaves out, for rows (or their estimators) that begin at row ``first`` of the pass."""
        size = len(self.positives)
        starts = [(block, start) for of in (self.own, self.left_out) for block, start in enumerate(of)]
        return [Diagonal(first + block * size, start, size) for block, start in starts]

    def with_queue(self, queue: Tensor, estimator_queue: Tensor | None) -> KeySet:
        """The key set and these further keys, and their features that estimate labels if there is an estimator."""
        return self._with(queue, self.estimator and self.estimator._with(estimator_queue, None))

    def _with(self, queue: Tensor | None, estimator: KeySet | None) -> KeySet:
        # Not _replace, which torch.compile cannot trace in torch 2.4.
        layout = (self.batch, self.own, self.left_out, self.is_symmetric, self.is_square)
        return KeySet(self.rows, self.positives, self.keys, queue, *layout, estimator)

    def entering(self, gather: Callable[[Tensor], Tensor] | None) -> tuple[Tensor, Tensor | None]:
        """The positives of all processes and their estimators, which enter the queue."""
        if not self.batch:
            keys = gather(self.positives.detach()) if gather else self.positives
        else:
            keys = self.keys[self.batch // 2 if self.is_symmetric else 0 : self.batch]
        return keys, self.estimator and self.estimator.entering(gather)[0]

    def for_mixed(self) -> KeySet:
        """The key set of mixed queries: of both views these see the second ones only, which estimate their labels."""
        if not self.is_symmetric:
            return self
        second = self.batch // 2
        keys = self.keys[second:]
        estimator = self.estimator and self.estimator.for_mixed()
        return KeySet(self.rows[:0], self.positives, keys, None, second, (self.left_out[0],), estimator=estimator)

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
        batch = everyone.repeat(self.batch // len(everyone))
        columns = torch.cat([batch, batch.new_full((len(self.keys) - self.batch,), -1), queue])
        if not self.own:
            columns = torch.cat([local[:, None], columns.expand(len(local), -1)], dim=1)
        left_out = self.left_out_columns()
        if left_out is not None:
            columns = columns.expand(len(left_out), -1).scatter(1, left_out[:, None], -1)
        return local.repeat(self.blocks), columns


def batch_and_queue(
    queries: Tensor, positives: Tensor, batch: Tensor, negatives: Tensor | None = None, offset: int = 0
) -> KeySet:
    """The paper's key set: all positives of the batch, further negatives, the queue. Without a queue: one direction.

    Args:
        queries: (s, d), the rows.
        positives: (s, d), their own keys.
        batch: (S, d), the positives of all processes.
        negatives: (m, d), keys that are nobody's own.
        offset: the number of ``positives[0]`` in ``batch``.
    """
    return KeySet(queries, positives, _joined(batch, negatives), None, len(batch), (offset,))


def own_positive_and_queue(queries: Tensor, positives: Tensor, negatives: Tensor | None = None) -> KeySet:
    """MoCo's key set: the own positive, further negatives, the queue."""
    return KeySet(queries, positives, positives[:0] if negatives is None else negatives, None, 0, ())


def both_views(
    rows: Tensor,
    positives: Tensor,
    batch: Tensor,
    negatives: Tensor | None = None,
    offset: int = 0,
    is_square: bool = False,
) -> KeySet:
    """SimCLR's key set: both views are rows and keys; a row sees all keys but itself, its other view is its own key.

    Args:
        rows: (2s, d), the first views and then the second ones.
        positives: (s, d), the second views.
        batch: (2S, d), the views of all processes; ``rows`` itself in one process.
        negatives: (m, d), keys that are nobody's own.
        offset: the number of ``rows[0]`` in ``batch``.
        is_square: whether ``batch`` is ``rows`` and there are no negatives.
    """
    second = len(batch) // 2
    keys = _joined(batch, negatives)
    return KeySet(
        rows, positives, keys, None, len(batch), (second + offset, offset), (offset, second + offset), True, is_square
    )


def check_choice(
    *, in_batch_keys: bool, symmetric: bool, has_queue: bool, has_mixed: bool, has_negatives: bool
) -> None:
    """Raise ValueError unless these settings leave every row of a call the keys that it needs."""
    if has_mixed and not in_batch_keys:
        raise ValueError(
            "mixed queries need labels over the batch's keys: set in_batch_keys=True, or leave out mixed and mix"
        )
    if not (has_queue or symmetric or in_batch_keys or has_negatives):
        raise ValueError("in_batch_keys=False and no queue leave no key but the own positive: pass negatives")


def choose(
    queries: Tensor,
    positives: Tensor,
    negatives: Tensor | None = None,
    estimator: Tensor | None = None,
    *,
    in_batch_keys: bool,
    symmetric: bool,
    gather: Callable[[Tensor], Tensor] | None = None,
    offset: int = 0,
) -> KeySet:
    """The key set of these settings, before its queue.

    Args:
        queries: (s, d).
        positives: (s, d).
        negatives: (m, d).
        estimator: (s, e), other features of the samples, which estimate the labels.
        in_batch_keys: whether the batch's other keys are seen.
        symmetric: whether both views are rows.
        gather: brings the features of all processes; None where there is one.
        offset: the number of this process's first sample among them.
    """
    if negatives is not None and gather:
        negatives = gather(negatives)
    if symmetric:
        batch = rows = torch.cat([queries, positives])
        if gather:
            both = gather(torch.cat([queries, positives], dim=1))  # one exchange
            batch = torch.cat(both.chunk(2, dim=1))
        key_set = both_views(rows, positives, batch, negatives, offset, is_square=not gather and negatives is None)
    elif in_batch_keys:
        key_set = batch_and_queue(queries, positives, gather(positives) if gather else positives, negatives, offset)
    else:
        key_set = own_positive_and_queue(queries, positives, negatives)
    if estimator is None:
        return key_set
    same = choose(estimator, estimator, in_batch_keys=in_batch_keys, symmetric=symmetric, gather=gather, offset=offset)
    return key_set._with(None, same)


def _joined(keys: Tensor, negatives: Tensor | None) -> Tensor:
    return keys if negatives is None else torch.cat([keys, negatives])
