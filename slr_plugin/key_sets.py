"""Which keys each row sees, and which of them is its positive: the one place that knows.

A *row* is a trained feature with a positive. The streaming pass leaves the positive out, and the objective adds it
back; mixed queries see all keys.

========================  ==============================  ==========================  ==============================
key set                   rows                            keys                        a row does not see
========================  ==============================  ==========================  ==============================
the paper's               queries                         positives, queue
MoCo's                    queries                         queue                       the positives but its own
SimCLR's                  both views                      both views                  itself: ``self_index``
its mixed queries'        the second views                the second views
CLIP's                    images and texts                images and texts            its own kind: ``cross``
========================  ==============================  ==========================  ==============================

Further negatives join the keys, and groups may hide more. The last two come from ``for_mixed`` and
``build_cross_key_set``. To add a key set, write its case in ``build_key_set``. What a row does not see is an index: it
gets a field (``self_index`` means that rows are both views), and is left out in ``hidden`` for the pass, in
``same_group`` and ``column_classes``, in ``dense.unseen``, and in ``groups.group_labels`` if it hides keys of a row's
group. What is no index, as ``cross``, goes through ``passes.Comparison`` to ``streaming/``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from slr_plugin._inputs import Features, unit_rows


class KeySet(NamedTuple):
    """Rows and the keys that they see. All features have unit length, and gradients are those of rows and keys.

    The columns of every dense matrix, such as labels, are ``keys`` and then ``queue``; where the positives are not
    among ``keys``, the positive of each row stands before them.
    """

    rows: Tensor  # (r, d), trained
    positives: Tensor  # (r, d), one per row; they estimate the labels unless ``estimator`` does
    keys: Tensor  # (b, d) keys of this step, which may be trained: the batch's, then further negatives
    queue: Tensor | None  # (n, d) constants
    positive_index: Tensor | None  # (r,) where the positives stand among ``keys``; None if they do not
    self_index: Tensor | None  # (r,) where the rows stand among ``keys``, themselves unseen; None if they do not
    batch_count: int  # how many of ``keys`` are the batch's
    keys_to_enqueue: Tensor  # (S, d), the positives of all processes
    estimator: KeySet | None = None  # the same keys in other features, which estimate the labels instead
    groups: Tensor | None = None  # (r,) ids of the rows' groups, negative for none
    key_groups: Tensor | None = None  # (K,) of ``keys`` and then ``queue``
    groups_to_enqueue: Tensor | None = None  # (S,)
    ignores_group: bool = False  # whether rows do not see other keys of their group; else those are positives too
    cross: bool = False  # images and texts are rows, and see the other kind only, with their positive among it

    # Methods, since torch.compile cannot trace a property of a tuple in torch 2.4.

    def sees_both_views(self) -> bool:
        """Whether rows are both views and see both; rows i and i + r/2 are of one sample, and each other's positive."""
        return self.self_index is not None

    def rows_are_keys(self) -> bool:
        """Whether rows and keys are one tensor, as both views are on one process, whose pass is then symmetric."""
        return self.keys is self.rows

    def hidden(self) -> Tensor | None:
        """The keys (r, h) that the pass leaves out: each row's positive, and the row itself."""
        indices = [index for index in (self.positive_index, self.self_index) if index is not None]
        return torch.stack(indices, dim=1) if len(indices) > 1 else indices[0][:, None] if indices else None

    def for_mixed(self) -> KeySet:
        """The key set that mixed queries see and their labels spread over: of both views, the second ones."""
        if self.positive_index is None or self.self_index is None:
            return self
        samples, first_views = len(self.rows) // 2, self.batch_count // 2  # counts: keys are first, then second views
        positives, index = self.positives[:samples], self.positive_index[:samples] - first_views
        return KeySet(
            positives,
            positives,
            self.keys[first_views:],
            queue=None,
            positive_index=index,
            self_index=None,
            batch_count=first_views,
            keys_to_enqueue=self.keys_to_enqueue,
            estimator=None if self.estimator is None else self.estimator.for_mixed(),
            groups=None if self.groups is None else self.groups[:samples],
            key_groups=None if self.key_groups is None else self.key_groups[first_views:],
            groups_to_enqueue=self.groups_to_enqueue,
            ignores_group=self.ignores_group,
        )

    # ------------------------------------------------------------------------- dense matrices, for looking at and tests

    def similarity(self, features: Tensor) -> Tensor:
        """The cosines (r, K) of features (r, d), one per row, with the row's columns."""
        table = self.keys if self.queue is None else torch.cat([self.keys, self.queue.to(self.keys)])
        cosines = features @ table.T
        if self.positive_index is not None:
            return cosines
        return torch.cat([(features * self.positives).sum(1, keepdim=True), cosines], dim=1)

    def positive_columns(self) -> Tensor:
        """The column (r,) of each row's positive."""
        index = self.positive_index
        return self.rows.new_zeros(len(self.rows), dtype=torch.long) if index is None else index

    def same_group(self) -> Tensor:
        """Whether a column (r, K) is another key of the row's group."""
        count = len(self.keys) + (0 if self.queue is None else len(self.queue))
        same = torch.zeros(len(self.rows), count, dtype=torch.bool, device=self.rows.device)
        if self.groups is not None and self.key_groups is not None:
            same = (self.groups[:, None] == self.key_groups) & (self.groups[:, None] >= 0)
        if self.positive_index is None:
            same = torch.cat([torch.zeros_like(same[:, :1]), same], dim=1)
        elif self.self_index is not None:
            same = same.scatter(1, self.self_index[:, None], False)
        return same.scatter(1, self.positive_columns()[:, None], False)

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
        if self.positive_index is None:
            columns = torch.cat([local[:, None], columns.expand(len(local), -1)], dim=1)
        if self.self_index is not None:
            columns = columns.expand(len(self.rows), -1).scatter(1, self.self_index[:, None], -1)
        return local.repeat(len(self.rows) // len(local)), columns


def build_key_set(
    features: Features,
    queue: Tensor | None = None,
    estimator_queue: Tensor | None = None,
    *,
    in_batch_keys: bool,
    symmetric: bool,
    gather: Callable[[Tensor], Tensor] | None = None,
    offset: int = 0,
    queue_groups: Tensor | None = None,
    ignores_group: bool = False,
) -> KeySet:
    """Build the key set of a call: SimCLR's of both views, the paper's, or MoCo's without the batch's other keys.

    Args:
        features: of the call.
        queue: (n, d) further keys.
        estimator_queue: (n, e), the same in the estimator's features.
        in_batch_keys: whether the batch's other keys are seen.
        symmetric: whether both views are rows.
        gather: brings the rows of all processes; None where there is one.
        offset: the index of this process's first sample among them.
        queue_groups: (n,) ids of the queue's groups.
        ignores_group: whether other keys of a row's group are left out; else they are positives too.
    """
    queries, positives, negatives = features.queries, features.positives, features.negatives
    if features.mixes and not in_batch_keys:
        raise ValueError(
            "mixed queries need labels over the batch's keys: set in_batch_keys=True, or leave out mixed and mix"
        )
    if not (symmetric or in_batch_keys) and negatives is None and (queue is None or not len(queue)):
        raise ValueError("in_batch_keys=False and no queue leave no key but the own positive: pass negatives")
    estimator = None
    if features.estimator is not None:
        estimator = build_key_set(
            Features(features.estimator, features.estimator, groups=features.groups if ignores_group else None),
            estimator_queue,
            in_batch_keys=in_batch_keys,
            symmetric=symmetric,
            gather=gather,
            offset=offset,
            queue_groups=queue_groups,
            ignores_group=ignores_group,
        )
    index = torch.arange(offset, offset + len(queries), device=queries.device)
    positive_index: Tensor | None
    self_index: Tensor | None
    if symmetric:
        rows = batch = unit_rows(torch.cat([queries, positives]))
        if gather:
            views_of_samples = torch.cat(rows.chunk(2), dim=1)  # side by side, for one exchange
            batch = torch.cat(gather(views_of_samples).chunk(2, dim=1))
        views, first_views = 2, len(batch) // 2
        positives, to_enqueue = rows.roll(len(queries), 0), batch[first_views:]
        self_index = torch.cat([index, index + first_views])
        positive_index = self_index.roll(len(queries))
    else:
        rows, positives = unit_rows(queries), unit_rows(positives)
        # Where the batch's keys are not seen, they only enter the queue.
        batch = gather(positives if in_batch_keys else positives.detach()) if gather else positives
        to_enqueue, views = batch, 1
        positive_index, self_index = index if in_batch_keys else None, None
    sees_batch = symmetric or in_batch_keys
    keys = [batch] if sees_batch else []
    if negatives is not None:
        negatives = unit_rows(negatives)
        keys.append(gather(negatives) if gather else negatives)

    groups, to_enqueue_groups, key_groups = features.groups, None, None
    if groups is not None:
        to_enqueue_groups = gather(groups) if gather else groups
        unknown = groups.new_full((1,), -1)
        ids = [to_enqueue_groups] * views if sees_batch else []
        ids += [] if negatives is None else [unknown.expand(len(keys[-1]))]
        ids += [] if queue is None else [unknown.expand(len(queue)) if queue_groups is None else queue_groups]
        groups, key_groups = groups.repeat(views), torch.cat([part.to(groups.device) for part in ids])
    return KeySet(
        rows,
        positives,
        keys=torch.cat(keys) if len(keys) > 1 else keys[0] if keys else positives[:0],
        queue=queue,
        positive_index=positive_index,
        self_index=self_index,
        batch_count=len(batch) if sees_batch else 0,
        keys_to_enqueue=to_enqueue,
        estimator=estimator,
        groups=groups,
        key_groups=key_groups,
        groups_to_enqueue=to_enqueue_groups,
        ignores_group=ignores_group,
    )


def build_cross_key_set(features: Features) -> KeySet:
    """Build the key set of images and texts: both are rows, and each sees the keys of the other kind only."""
    size, ids = len(features.queries), features.groups
    rows = unit_rows(torch.cat([features.queries, features.positives]))
    groups = key_groups = None
    if ids is not None:  # an image is in the group of texts only, which has an even number, and a text of images
        number = 2 * torch.searchsorted(ids.sort().values, ids)
        groups = torch.cat([number, number + 1]).where(ids.repeat(2) >= 0, -1)
        key_groups = groups.roll(size)
    return KeySet(
        rows,
        rows.roll(size, 0),
        keys=rows,
        queue=None,
        positive_index=torch.arange(2 * size, device=rows.device).roll(size),
        self_index=None,
        batch_count=2 * size,
        keys_to_enqueue=rows[size:],
        groups=groups,
        key_groups=key_groups,
        cross=True,
    )


def warn_if_alone(key_set: KeySet, loss: Tensor, stacklevel: int) -> None:
    """Warn of a loss that trains nothing, since no row sees a key besides its positive."""
    views = 2 if key_set.cross or key_set.sees_both_views() else 1
    sees_none = key_set.positive_index is not None and key_set.queue is None and len(key_set.keys) == views
    if sees_none and loss.requires_grad and not torch.compiler.is_compiling():
        warnings.warn(
            "one sample and no queue leave no negative: this loss and its gradient are 0; take larger batches (a "
            "DataLoader's drop_last=True leaves out a last batch of one), pass negatives, or use a queue",
            stacklevel=stacklevel,
        )
