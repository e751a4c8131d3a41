r"""Self-labeling refinery, equation (5): how much of each label stays on the positive, and where the rest points.

A refined label over K keys is never written out. With :math:`s_{ii}` the logit of the estimator with its own key and
:math:`m_i, \ell_i, a_i` its maximum, log-sum-exp and weighted mean over the *other* keys (:mod:`slr_plugin.contrast`),

.. math::
    p_{ii} = \sigma(s_{ii} - \ell_i), \quad
    \max_k q_{ik} = e^{m_i - \ell_i}, \quad
    \max_k p_{ik} = \max(p_{ii}, (1 - p_{ii}) \max_k q_{ik}),

and because :math:`p_{ik} = (1 - p_{ii}) q_{ik}` off the own key, the three-way mix of (5) is a two-way one,

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


class Labels(NamedTuple):
    """Refined labels in closed form; every field is (s,) and constant to autograd."""

    own: Tensor  # w, the weight left on the positive
    rest: Tensor  # v = 1 - w, the weight that q spreads over the other keys
    alpha: Tensor  # the share of p
    beta: Tensor  # the share of q
    entropy: Tensor  # of the whole label, in nats

    def target(self, positives: Tensor, peers: Tensor) -> Tensor:
        """The target centroid t, (s, d), from the positives g and the q-weighted means a of the other keys."""
        return self.own[:, None] * positives + self.rest[:, None] * peers


@torch.no_grad()
def refine(
    own_logit: Tensor, maximum: Tensor, excess: Tensor, mean_logit: Tensor, confidence: float | Tensor
) -> Labels:
    """Equation (5) from the estimator's view of its keys.

    Args:
        own_logit: (s,) the estimator's logit with its own key, :math:`s_{ii}`.
        maximum: (s,) over the other keys; -inf where there are none, and the label is then one-hot.
        excess: (s,) their log-sum-exp minus the maximum.
        mean_logit: (s,) the mean logit under q, for the entropy.
        confidence: the prior confidence mu >= 0.
    """
    alone = maximum == -torch.inf
    margin = (own_logit - maximum) - excess  # s_ii - l_i
    p_own, p_others = torch.sigmoid(margin), torch.sigmoid(-margin)  # never 1 - p, which cancels
    q_max = (-excess).exp().masked_fill(alone, 0.0)
    p_max = torch.maximum(p_own, p_others * q_max)
    z = 1 + confidence * p_max + confidence * q_max
    alpha, beta = confidence * p_max / z, confidence * q_max / z
    own, rest = 1 / z + alpha * p_own, alpha * p_others + beta
    q_entropy = ((maximum - mean_logit) + excess).masked_fill(alone, 0.0)
    entropy = rest * q_entropy - torch.xlogy(own, own) - torch.xlogy(rest, rest)
    return Labels(own, rest, alpha, beta, entropy)


def one_hot(positives: Tensor) -> Labels:
    """The labels at confidence 0: all weight on the positive."""
    ones = positives.new_ones(len(positives))
    zeros = torch.zeros_like(ones)
    return Labels(ones, zeros, zeros, zeros, zeros)
