r"""The textbook version: p, q, the refined label and the cross-entropy as the paper prints them.

Every matrix is (rows, K) and stored. For reading, for diagnostics and as the baseline of the benchmarks; training uses
:class:`slr_plugin.SLRLoss`, which computes the same numbers without these matrices.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from slr_plugin.mixup import Mix


class SelfLabels(NamedTuple):
    """Label matrices, (rows, K) each."""

    p: Tensor
    q: Tensor
    refined: Tensor


def self_labels(
    similarity: Tensor,
    own: Tensor,
    hidden: Tensor | None = None,
    *,
    temperature: float,
    sharpening: float = 1.0,
    confidence: float | Tensor = 1.0,
) -> SelfLabels:
    r"""Equation (5).

    .. math::
        p_{ik} = \mathrm{softmax}_k(\langle g_i, \bar b_k \rangle / \tau\tau'), \quad
        q_{ik} = \mathrm{softmax}_{k \ne i}(\langle g_i, \bar b_k \rangle / \tau\tau'), \quad
        \bar y_i = (1 - \alpha_i - \beta_i)\,\mathrm{onehot}_i + \alpha_i p_i + \beta_i q_i

    with :math:`\alpha_i = \mu \max_k p_{ik} / z_i`, :math:`\beta_i = \mu \max_k q_{ik} / z_i` and
    :math:`z_i = 1 + \mu \max_k p_{ik} + \mu \max_k q_{ik}`.

    Args:
        similarity: (rows, K) cosines of each row's estimator with the keys.
        own: (rows,) the column of each row's positive.
        hidden: (rows,) a column that is no key of the row, or None.
        temperature: tau.
        sharpening: tau'.
        confidence: mu.
    """
    logits = similarity / (temperature * sharpening)
    if hidden is not None:
        logits = logits.scatter(1, hidden[:, None], -torch.inf)
    p = logits.softmax(1)
    if logits.shape[1] - (hidden is not None) > 1:
        q = logits.scatter(1, own[:, None], -torch.inf).softmax(1)
    else:  # no other key to resemble
        q = torch.zeros_like(p)
    p_max, q_max = p.amax(1, keepdim=True), q.amax(1, keepdim=True)
    z = 1 + confidence * p_max + confidence * q_max
    alpha, beta = confidence * p_max / z, confidence * q_max / z
    one_hot = torch.zeros_like(p).scatter(1, own[:, None], 1.0)
    return SelfLabels(p, q, (1 - alpha - beta) * one_hot + alpha * p + beta * q)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Equation (4), :math:`-\frac1s \sum_i \sum_k y_{ik} \log \mathrm{softmax}_k(\mathrm{logits}_{ik})`."""
    return -(labels * logits.log_softmax(1)).sum(1).mean()


def slr_loss(
    queries: Tensor,
    positives: Tensor,
    queue: Tensor,
    mixed: Tensor | None = None,
    mix: Mix | None = None,
    *,
    temperature: float = 0.5,
    sharpening: float = 1.0,
    confidence: float = 1.0,
    refined_weight: float = 0.5,
) -> Tensor:
    """Equation (9) over the paper's key set, batch and queue. Arguments as in :class:`slr_plugin.SLRLoss`."""
    queries, positives = F.normalize(queries, dim=1), F.normalize(positives, dim=1)
    keys = torch.cat([positives, queue.to(positives)])
    own = torch.arange(len(queries), device=queries.device)
    with torch.no_grad():
        labels = self_labels(
            positives @ keys.T, own, temperature=temperature, sharpening=sharpening, confidence=confidence
        ).refined
    logits = queries @ keys.T / temperature
    one_hot_term = F.cross_entropy(logits, own)
    if mixed is None or mix is None:
        refined_term = cross_entropy(logits, labels)
    else:
        theta, partner = mix
        mixed_labels = theta[:, None] * labels + (1 - theta[:, None]) * labels[partner]
        refined_term = cross_entropy(F.normalize(mixed, dim=1) @ keys.T / temperature, mixed_labels)
    return (1 - refined_weight) * one_hot_term + refined_weight * refined_term


def symmetric_slr_loss(
    view0: Tensor,
    view1: Tensor,
    *,
    temperature: float = 0.5,
    sharpening: float = 1.0,
    confidence: float = 1.0,
    refined_weight: float = 0.5,
) -> Tensor:
    """Refined NT-Xent: the batch's two views as rows and as keys, no queue, no mixed queries."""
    views = F.normalize(torch.cat([view0, view1]), dim=1)
    size = len(view0)
    itself = torch.arange(2 * size, device=views.device)
    own = itself.roll(size)
    similarity = views @ views.T
    with torch.no_grad():
        labels = self_labels(
            similarity[own], own, itself, temperature=temperature, sharpening=sharpening, confidence=confidence
        ).refined
    # A finite stand-in for minus infinity: labels are 0 there, and 0 * inf is not.
    logits = similarity / temperature
    logits = logits.scatter(1, itself[:, None], torch.finfo(logits.dtype).min)
    one_hot_term = F.cross_entropy(logits, own)
    return (1 - refined_weight) * one_hot_term + refined_weight * cross_entropy(logits, labels)
