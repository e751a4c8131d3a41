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

and because :math:`p_{ik} = (1 - p_{ii}) q_{ik}` off the positive, the three-way mix of (5) is a two-way one,

.. math::
    \bar y_i = w_i\, \mathrm{onehot}_i + v_i\, q_i, \quad
    w_i = 1 / z_i + \alpha_i p_{ii}, \quad
    v_i = \alpha_i (1 - p_{ii}) + \beta_i = 1 - w_i .

The loss sees the label only through its target centroid :math:`t_i = \sum_k \bar y_{ik} \bar b_k = w_i g_i + v_i a_i`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from slr_plugin.streaming import SoftmaxStats


class Labels(NamedTuple):
    """Refined labels in closed form; every field is (r,) and constant to autograd."""

    positive_weight: Tensor  # w, the weight left on the positive
    rest_weight: Tensor  # v = 1 - w, the weight that q spreads over the other keys
    alpha: Tensor  # the share of p
    beta: Tensor  # the share of q
    q_entropy: Tensor  # of q, in nats

    def targets(self, positives: Tensor, centroids: Tensor) -> Tensor:
        """The target centroids t, (r, d), from the positives g and the q-weighted centroids a of the other keys."""
        return torch.lerp(positives, centroids, self.rest_weight[:, None])

    def shared(self, given: Tensor) -> Labels:
        """The labels after the positive gave some of its weight (r,) to other keys of its group."""
        return Labels(self.positive_weight - given, self.rest_weight + given, self.alpha, self.beta, self.q_entropy)

    def averages(self) -> dict[str, Tensor]:
        """The means of positive weight, alpha, beta and entropy of the whole label, by their names in SLRLoss.stats."""
        entropy = (
            self.rest_weight * self.q_entropy
            + torch.special.entr(self.positive_weight)
            + torch.special.entr(self.rest_weight)
        )
        names = ("positive_weight", "alpha", "beta", "label_entropy")
        return dict(
            zip(names, torch.stack([self.positive_weight, self.alpha, self.beta, entropy]).mean(1), strict=True)
        )


@torch.no_grad()
def estimate(
    stats: SoftmaxStats, positive_logit: Tensor, mean_logit: Tensor | None, confidence: Tensor | float, key_count: int
) -> Labels:
    r"""Equation (5) from the estimators' softmax statistics over the keys other than their positive.

    Args:
        stats: of r estimators; a label is one-hot where there are no other keys.
        positive_logit: (r,) :math:`s_{ii}`.
        mean_logit: (r,) :math:`\sum_k q_{ik} s_{ik}`, for the entropy; None leaves that not a number.
        confidence: the prior confidence mu >= 0.
        key_count: how many keys there are at most, whose logarithm bounds the entropy.
    """
    margin, q_max = -stats.logsumexp_minus(positive_logit), stats.max_weight
    p_positive, p_others = torch.sigmoid(margin), torch.sigmoid(-margin)  # never 1 - p, which cancels
    p_max = torch.maximum(p_positive, p_others * q_max)
    shares = confidence * torch.stack([p_max, q_max])
    z = 1 + shares.sum(0)
    alpha, beta = shares / z
    positive, rest = 1 / z + alpha * p_positive, alpha * p_others + beta
    if mean_logit is None:
        q_entropy = torch.full_like(positive, torch.nan)
    else:  # beyond its bounds by the rounding of large logits, and minus infinity without other keys
        most = positive_logit.new_full((), key_count).log()
        q_entropy = stats.logsumexp_minus(mean_logit).clamp(min=0.0).minimum(most)
    return Labels(positive, rest, alpha, beta, q_entropy)


def unrefined(like: Tensor, share: Tensor) -> Labels:
    """The labels at confidence 0, for as many rows as ``like`` has: ``share`` (r,) or (1,) on the positive.

    The rest is spread evenly, over ``1 / share - 1`` other keys.
    """
    zeros = like.new_zeros(len(like))
    positive = zeros + share
    return Labels(positive, 1 - positive, zeros, zeros, (1 / positive - 1).clamp(min=1.0).log())
