r"""Self-labeling refinery, equation (5): how much of each label stays on the positive, and where the rest points.

.. math::
    \bar y_i = (1 - \alpha_i - \beta_i)\, \mathrm{onehot}_i + \alpha_i\, p_i + \beta_i\, q_i, \qquad
    \alpha_i = \mu \max_k p_{ik} / z_i, \quad \beta_i = \mu \max_k q_{ik} / z_i, \quad
    z_i = 1 + \mu \max_k p_{ik} + \mu \max_k q_{ik} \tag{5}

with p the softmax of an estimator's similarities to all keys, q the same without the positive, and the confidence mu. A
refined label over K keys is never written out. With :math:`s_{ii}` the logit of the estimator with its positive and
:math:`\ell_i, m_i, a_i` its softmax statistics over the *other* keys (:mod:`slr_plugin.streaming`),

.. math::
    p_{ii} = \sigma(s_{ii} - \ell_i), \quad
    \max_k q_{ik} = m_i, \quad
    \max_k p_{ik} = \max(p_{ii}, (1 - p_{ii}) \max_k q_{ik}),

and because :math:`p_{ik} = (1 - p_{ii}) q_{ik}` off the positive and :math:`1 - \alpha_i - \beta_i = 1 / z_i`, with the
known label :math:`y^0_i`, which is one-hot where no groups are known,

.. math::
    \bar y_i = \tfrac{1}{z_i}\, y^0_i + \alpha_i p_{ii}\, \mathrm{onehot}_i + v_i\, q_i, \quad
    v_i = \alpha_i (1 - p_{ii}) + \beta_i
        = \frac{\max_k p_{ik}\, (1 - p_{ii}) + \max_k q_{ik}}{1 / \mu + \max_k p_{ik} + \max_k q_{ik}} .

These weights sum to 1, so that :math:`\alpha_i p_{ii} = 1 - v_i - 1/z_i`. The loss sees the label only through its
target centroid, with :math:`g_i` the positive and :math:`t^0_i` the centroid of the known label,

.. math::
    t_i = \sum_k \bar y_{ik} \bar b_k = (1 - v_i)\, g_i + v_i\, a_i + \tfrac{1}{z_i} (t^0_i - g_i) .
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from slr_plugin.streaming import SoftmaxStats


class Labels(NamedTuple):
    """Refined labels in closed form; fields are (r,), or (1,) where equal for all rows, and constant to autograd."""

    rest_weight: Tensor  # v, what lies on q
    p_own: Tensor  # p_ii
    p_max: Tensor
    q_max: Tensor
    confidence: Tensor | float  # mu
    positive_share: Tensor | float  # weight of the positive in the known label
    rest_entropy: Tensor  # of what lies on other keys, in nats

    def known_weight(self) -> Tensor:
        """1 / z, the weight of the known label."""
        return (1 + self.confidence * (self.p_max + self.q_max)).reciprocal()

    def targets(self, known: Tensor, positives: Tensor, centroids: Tensor) -> Tensor:
        """The target centroids t, (r, d), from those of the known labels, the positives, and of q."""
        targets = torch.lerp(positives, centroids, self.rest_weight[:, None])
        return targets if known is positives else targets + self.known_weight()[:, None] * (known - positives)

    def averages(self) -> dict[str, Tensor]:
        """The means over the rows by their names in SLRLoss.stats; the entropy is that of the whole label."""
        known = self.known_weight()
        share = self.confidence * known
        alpha = share * self.p_max
        positive = torch.addcmul(known * self.positive_share, alpha, self.p_own).clamp(max=1.0)  # rounding may exceed 1
        rest, entr = 1 - positive, torch.special.entr
        entropy = rest * self.rest_entropy.clamp(min=0) + entr(positive) + entr(rest)
        values = {"positive_weight": positive, "alpha": alpha, "beta": share * self.q_max, "label_entropy": entropy}
        mu = (known.new_zeros(1) + self.confidence)[0]  # no copy from the host, which a CUDA graph could not record
        return {name: value.mean() for name, value in values.items()} | {"mu": mu}


def refine(
    stats: SoftmaxStats,
    positive_cosine: Tensor,
    mean_cosine: Tensor | None,
    scale: Tensor | float,
    confidence: Tensor | float,
    positive_share: Tensor | float,
) -> Labels:
    r"""Equation (5) from the estimators' softmax statistics over the keys other than their positive.

    Args:
        stats: of r estimators; a label is one-hot where there are no other keys.
        positive_cosine: (r,) of each estimator with its positive.
        mean_cosine: (r,) with the mean of the others, for the entropy; None leaves that not a number.
        scale: 1 / (tau tau'), which makes logits of cosines.
        confidence: the prior confidence mu >= 0.
        positive_share: (r,) or 1.0, the weight of the positive in the known label.
    """
    margin, q_max = stats.logsumexp_minus(positive_cosine, scale), stats.max_weight
    p_own, p_others = torch.sigmoid(-margin), torch.sigmoid(margin)  # never 1 - p, which cancels
    p_max = torch.maximum(p_own, p_others * q_max)
    rest_weight = torch.addcmul(q_max, p_max, p_others) / (p_max + q_max + 1 / confidence)
    entropy = torch.full_like(p_own, torch.nan) if mean_cosine is None else stats.logsumexp_minus(mean_cosine, scale)
    return Labels(rest_weight, p_own, p_max, q_max, confidence, positive_share, entropy)


def unrefined(like: Tensor, positive_share: Tensor | float) -> Labels:
    """The labels at confidence 0, those that are known: ``positive_share``, (r,) or 1.0, on the positive.

    The rest is spread evenly, over ``1 / positive_share - 1`` other keys.
    """
    none = like.new_zeros(1)
    return Labels(none, none, none, none, 0.0, positive_share, (1 / (none + positive_share) - 1).clamp(min=1.0).log())
