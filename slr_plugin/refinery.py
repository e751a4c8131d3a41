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

and because :math:`p_{ik} = (1 - p_{ii}) q_{ik}` off the positive, with the known label :math:`y^0_i`, which is one-hot
where no groups are known,

.. math::
    \bar y_i = \tfrac{1}{z_i}\, y^0_i + \alpha_i p_{ii}\, \mathrm{onehot}_i + v_i\, q_i, \quad
    v_i = \alpha_i (1 - p_{ii}) + \beta_i .

The loss sees the label only through its target centroid, with :math:`g_i` the positive and :math:`t^0_i` the centroid
of the known label,

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

    known_weight: Tensor  # 1 / z, the weight of the known label
    own_weight: Tensor  # alpha p_ii, what p adds to the positive
    rest_weight: Tensor  # v, what lies on q
    alpha: Tensor  # the share of p
    beta: Tensor  # the share of q
    positive_share: Tensor | float  # weight of the positive in the known label
    rest_entropy: Tensor  # of what lies on other keys, in nats

    def targets(self, known: Tensor, positives: Tensor, centroids: Tensor) -> Tensor:
        """The target centroids t, (r, d), from those of the known labels, the positives, and of q."""
        targets = torch.lerp(positives, centroids, self.rest_weight[:, None])
        return targets if known is positives else targets + self.known_weight[:, None] * (known - positives)

    def averages(self) -> dict[str, Tensor]:
        """The means of positive weight, alpha, beta and entropy of the whole label, by their names in SLRLoss.stats."""
        positive = self.known_weight * self.positive_share + self.own_weight
        rest = 1 - positive
        entropy = rest * self.rest_entropy + torch.special.entr(positive) + torch.special.entr(rest)
        means = {"positive_weight": positive, "alpha": self.alpha, "beta": self.beta, "label_entropy": entropy}
        return {name: value.mean() for name, value in means.items()}


def refine(
    stats: SoftmaxStats,
    positive_logit: Tensor,
    mean_logit: Tensor | None,
    confidence: Tensor | float,
    positive_share: Tensor | float,
) -> Labels:
    r"""Equation (5) from the estimators' softmax statistics over the keys other than their positive.

    Args:
        stats: of r estimators; a label is one-hot where there are no other keys.
        positive_logit: (r,) :math:`s_{ii}`.
        mean_logit: (r,) :math:`\sum_k q_{ik} s_{ik}`, for the entropy; None leaves that not a number.
        confidence: the prior confidence mu >= 0.
        positive_share: (r,) or 1.0, the weight of the positive in the known label.
    """
    margin, q_max = stats.logsumexp_minus(positive_logit), stats.max_weight
    p_own, p_others = torch.sigmoid(-margin), torch.sigmoid(margin)  # never 1 - p, which cancels
    p_max = torch.maximum(p_own, p_others * q_max)
    scaled = torch.stack([p_max, q_max]) * confidence
    known = (1 + scaled.sum(0)).reciprocal()
    alpha, beta = scaled * known
    entropy = torch.full_like(known, torch.nan) if mean_logit is None else stats.logsumexp_minus(mean_logit)
    return Labels(
        known, alpha * p_own, torch.addcmul(beta, alpha, p_others), alpha, beta, positive_share, entropy.clamp(min=0)
    )


def unrefined(like: Tensor, positive_share: Tensor | float) -> Labels:
    """The labels at confidence 0, those that are known: ``positive_share``, (r,) or 1.0, on the positive.

    The rest is spread evenly, over ``1 / positive_share - 1`` other keys.
    """
    none = like.new_zeros(1)
    return Labels(
        none + 1, none, none, none, none, positive_share, (1 / (none + positive_share) - 1).clamp(min=1.0).log()
    )
