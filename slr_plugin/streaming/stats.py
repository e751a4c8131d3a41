r"""What the streaming pass computes.

For rows :math:`r_i`, keys :math:`b_k` with values :math:`v_k`, a scale :math:`c` (an inverse temperature) and the keys
:math:`V_i` that row i sees,

.. math::
    \ell_i = \log \sum_{k \in V_i} e^{c \langle r_i, b_k \rangle}, \qquad
    s_{ik} = e^{c \langle r_i, b_k \rangle - \ell_i}, \qquad
    m_i = \max_{k \in V_i} s_{ik}, \qquad
    a_i = \sum_{k \in V_i} s_{ik} v_k .

This is attention with its statistics; the values are usually the keys themselves. Online softmax gathers the sums tile
by tile, so memory is O(rows * d + one tile) and no ``rows x K`` matrix exists. Gradients need nothing more: that of the
log-sum-exp for a row is :math:`\partial \ell_i / \partial r_i = c\, a_i` where the values are the keys, and a key gets
:math:`\sum_i s_{ik} u_i`, from vectors :math:`u_i` of the rows.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

LN2 = math.log(2)


class Source(NamedTuple):
    """A table of keys and the values that are averaged with their weights."""

    keys: Tensor  # (n, d)
    values: Tensor  # (n, v), often the keys themselves


class Pass(NamedTuple):
    """Rows, and the keys that they are compared with."""

    rows: Tensor  # (r, d) float32 or float64
    keys: Tensor  # (b, d) of the same dtype and device; b may be 0
    queue: Tensor | None = None  # (n, d) further keys, numbered after ``keys``; any float dtype, any device
    values: Tensor | None = None  # (b, v), what is averaged, where that is not the keys
    queue_values: Tensor | None = None  # (n, v), likewise for ``queue``
    hidden: Tensor | None = None  # (q, h) int64, the numbers of the ``keys`` that the first q rows do not see; or -1
    row_groups: Tensor | None = None  # (q,) ids: these rows do not see the keys with their own one, if not negative
    key_groups: Tensor | None = None  # (b + n,) of the keys and then the queue
    scale: float = 1.0  # the factor c
    bound: float = math.inf  # no logit is larger in magnitude; a small bound saves the running maximum
    symmetric: bool = False  # rows are the keys, but for a factor, hidden pairs symmetric: half of the logits suffice
    cross: bool = False  # symmetric, and rows see the keys of the other half only
    chunk: int = 0  # keys per tile; 0 chooses by device

    # Methods, since torch.compile cannot trace a property of a tuple in torch 2.4.

    def sources(self) -> list[Source]:
        """The keys as they come, one or two tables, so that the queue is neither copied nor converted as a whole."""
        first = Source(self.keys, self.keys if self.values is None else self.values)
        if self.queue is None:
            return [first]
        return [first, Source(self.queue, self.queue if self.queue_values is None else self.queue_values)]


class SoftmaxStats(NamedTuple):
    r"""Softmax statistics of r rows, each over the keys that it sees.

    The log-sum-exp comes in two parts, because every use subtracts a logit x from it:
    :math:`(\rho_i - x) + (\ell_i - \rho_i)` keeps digits that :math:`\ell_i - x` loses.
    """

    reference_bits: Tensor  # (r,) rho / ln 2, as the pass has it; all else is in nats
    offset: Tensor  # (r,) l - rho; -inf where a row sees no key
    max_weight: Tensor  # (r,) m; 0 where a row sees no key
    mean: Tensor  # (r, v) a; 0 where a row sees no key

    def logsumexp_minus(self, cosine: Tensor, scale: float | Tensor) -> Tensor:
        """The log-sum-exp minus the logit of a cosine (r,): large numbers are subtracted first."""
        if isinstance(scale, Tensor):
            cosine, scale = cosine * scale, 1.0
        # offset - (scale cosine - rho)
        return self.offset.sub(cosine.sub(self.reference_bits, alpha=LN2 / scale), alpha=scale)

    def roll(self, count: int) -> SoftmaxStats:
        """The statistics with every row ``count`` further on, the last ones first."""
        return SoftmaxStats(*(x.roll(count, 0) for x in self))

    def split(self, counts: list[int]) -> list[SoftmaxStats]:
        """The statistics of the first ``counts[0]`` rows, of the next ``counts[1]``, and so on."""
        return [SoftmaxStats(*part) for part in zip(*(torch.split(x, counts) for x in self), strict=True)]
