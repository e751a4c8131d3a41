r"""What the streaming pass computes.

For rows :math:`r_i`, keys :math:`b_k` with values :math:`v_k`, a scale :math:`c` (an inverse temperature) and the keys
:math:`V_i` that row i sees,

.. math::
    \ell_i = \log \sum_{k \in V_i} e^{c \langle r_i, b_k \rangle}, \qquad
    s_{ik} = e^{c \langle r_i, b_k \rangle - \ell_i}, \qquad
    m_i = \max_{k \in V_i} s_{ik}, \qquad
    a_i = \sum_{k \in V_i} s_{ik} v_k .

This is attention with its statistics; the values are usually the keys themselves. Online softmax gathers the sums tile
by tile, so memory is O(rows * d + one tile) and no ``rows x K`` matrix exists. The gradient of the log-sum-exp needs
nothing more: :math:`\partial \ell_i / \partial r_i = c\, a_i` where the values are the keys.
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


class Plan(NamedTuple):
    """How the backends compute a pass; the arguments of ``softmax_stats``."""

    hidden: Tensor | None  # (r, h) int64, and the next two: see softmax_stats
    row_groups: Tensor | None
    key_groups: Tensor | None
    scale: float
    bound: float
    symmetric: bool
    chunk: int  # 0: chosen by device


class SoftmaxStats(NamedTuple):
    r"""Softmax statistics of r rows, each over the keys that it sees.

    The log-sum-exp comes in two parts, because every use subtracts a logit x from it:
    :math:`(\rho_i - x) + (\ell_i - \rho_i)` keeps digits that :math:`\ell_i - x` loses.
    """

    reference: Tensor  # (r,) rho in bits (rho / ln 2), as the backends have it; without gradient
    offset: Tensor  # (r,) l - rho, with the gradient of l; -inf where a row sees no key
    max_weight: Tensor  # (r,) m, without gradient; 0 where a row sees no key
    mean: Tensor  # (r, v) a; 0 where a row sees no key

    def logsumexp_minus(self, logit: Tensor) -> Tensor:
        """The log-sum-exp minus a logit (r,): large numbers are subtracted first."""
        return (self.reference * LN2 - logit) + self.offset

    def roll(self, count: int) -> SoftmaxStats:
        """The statistics with every row ``count`` further on, the last ones first."""
        return SoftmaxStats(*(x.roll(count, 0) for x in self))

    def split(self, counts: list[int]) -> list[SoftmaxStats]:
        """The statistics of the first ``counts[0]`` rows, of the next ``counts[1]``, and so on."""
        return [SoftmaxStats(*part) for part in zip(*(torch.split(x, counts) for x in self), strict=True)]
