"""Losses to compare with that no installable package has: small, dense, and as their papers print them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slr_plugin import CosineConfidence, Mix, dense
from slr_plugin._inputs import Features
from slr_plugin.key_sets import KeySet, build_key_set
from slr_plugin.queue import KeyQueue

# (similarity (s, K), the column of each positive (s,), prior confidence ()) -> labels (s, K)
Labeler = Callable[[Tensor, Tensor, Tensor], Tensor]


class SoftLabelLoss(nn.Module):
    """Equation (9) with any labels over the paper's key set, batch and queue; the dense form of ``SLRLoss``.

    Args:
        memory_bank_size: (n, d) of the queue.
        labeler: the labels, from the similarities of the positives with the keys.
        temperature: of the logits.
        confidence: the schedule handed to the labeler.
        refined_weight: lambda.
    """

    in_batch_keys, gather_distributed = True, False
    step: Tensor

    def __init__(
        self,
        memory_bank_size: tuple[int, int],
        labeler: Labeler,
        temperature: float,
        confidence: CosineConfidence,
        refined_weight: float,
    ) -> None:
        super().__init__()
        self.memory_bank = KeyQueue(memory_bank_size)
        self.labeler = labeler
        self.temperature = temperature
        self.confidence = confidence
        self.refined_weight = refined_weight
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def forward(self, out0: Tensor, out1: Tensor, mixed: Tensor | None = None, mix: Mix | None = None) -> Tensor:
        """As :meth:`slr_plugin.SLRLoss.forward`."""
        key_set, labels = self.labelled_keys(out0, out1)
        logits = key_set.similarity(F.normalize(out0, dim=1)) / self.temperature
        one_hot_term = F.cross_entropy(logits, key_set.positive_columns())
        if mixed is not None and mix is not None:
            theta, partner = mix
            labels = theta[:, None] * labels + (1 - theta[:, None]) * labels[partner]
            logits = key_set.similarity(F.normalize(mixed, dim=1)) / self.temperature
        loss = torch.lerp(one_hot_term, dense.cross_entropy(logits, labels), self.refined_weight)
        self.memory_bank.enqueue(key_set.keys_to_enqueue)
        self.step += 1
        return loss

    @torch.no_grad()
    def labelled_keys(self, out0: Tensor, out1: Tensor, mixed: Any = None, mix: Any = None) -> tuple[KeySet, Tensor]:
        """As :meth:`slr_plugin.SLRLoss.labelled_keys`."""
        features = Features(F.normalize(out0, dim=1), F.normalize(out1, dim=1))
        key_set = build_key_set(features, self.memory_bank.bank, in_batch_keys=True, symmetric=False)
        similarity = key_set.similarity(key_set.positives)
        return key_set, self.labeler(similarity, key_set.positive_columns(), self.confidence(self.step.double()))


def one_estimator(which: str, temperature: float) -> Labeler:
    """Equation (5) with p alone or q alone: the other's share is 0, also in z."""

    def labeler(similarity: Tensor, own: Tensor, confidence: Tensor) -> Tensor:
        labels = dense.self_labels(similarity, own, temperature=temperature, confidence=0.0)
        estimate = getattr(labels, which)
        weight = confidence * estimate.amax(1, keepdim=True)
        return (labels.refined + weight * estimate) / (1 + weight)

    return labeler


def sce(temperature: float = 0.05, own_weight: float = 0.5) -> Labeler:
    """Similarity contrastive estimation (Denize et al., WACV 2023): half one-hot, half similarities of the key."""

    def labeler(similarity: Tensor, own: Tensor, confidence: Tensor) -> Tensor:
        labels = dense.self_labels(similarity, own, temperature=temperature, confidence=0.0)
        return own_weight * labels.refined + (1 - own_weight) * labels.q

    return labeler


class DecoupledLoss(nn.Module):
    """lightly's ``DCLLoss`` by masks in place of boolean indices, whose count a CUDA graph cannot wait for."""

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """The loss of two views, (s, d) each."""
        views = F.normalize(torch.cat([out0, out1]), dim=1)
        logits = views @ views.T / self.temperature
        numbers = torch.arange(len(views), device=views.device)
        own = numbers.roll(len(out0))[:, None]  # the image's other view
        negatives = logits.masked_fill((numbers == own) | (numbers == numbers[:, None]), -torch.inf)
        return (negatives.logsumexp(1) - logits.gather(1, own)[:, 0]).mean()


class SupConLoss(nn.Module):
    """Supervised contrastive learning (Khosla et al., NeurIPS 2020), the mean over positives outside the logarithm."""

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, out0: Tensor, out1: Tensor, groups: Tensor) -> Tensor:
        """The loss of two views, (s, d) each; all views of a group (s,) are each other's positives."""
        views, groups = F.normalize(torch.cat([out0, out1]), dim=1), groups.repeat(2)
        itself = torch.eye(len(views), dtype=torch.bool, device=views.device)
        logits = (views @ views.T / self.temperature).masked_fill(itself, -torch.inf)
        positive = (groups[:, None] == groups) & ~itself
        log_shares = logits.log_softmax(1).masked_fill(~positive, 0.0)
        return -(log_shares.sum(1) / positive.sum(1)).mean()


class NeighbourLoss(nn.Module):
    """InfoNCE over batch and queue in which keys that are surely alike are no negatives.

    These are the keys more similar to the positive than its own query is, of its nine nearest.

    Args:
        memory_bank_size: (n, d) of the queue.
        temperature: of the logits.
        attracts: they share the label with the positive; otherwise they leave the denominator.
    """

    def __init__(self, memory_bank_size: tuple[int, int], temperature: float, attracts: bool) -> None:
        super().__init__()
        self.memory_bank = KeyQueue(memory_bank_size)
        self.temperature = temperature
        self.attracts = attracts

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """The loss of queries and keys, (s, d) each."""
        queries, positives = F.normalize(out0, dim=1), F.normalize(out1, dim=1)
        keys = torch.cat([positives, self.memory_bank.bank])
        logits = queries @ keys.T / self.temperature
        near = self.near(queries.detach(), positives, keys)
        self.memory_bank.enqueue(positives)
        if self.attracts:
            own = torch.eye(*logits.shape, device=logits.device)
            return F.cross_entropy(logits, F.normalize(own + near, p=1, dim=1))
        return F.cross_entropy(logits.masked_fill(near, -torch.inf), torch.arange(len(logits), device=logits.device))

    @staticmethod
    def near(queries: Tensor, positives: Tensor, keys: Tensor) -> Tensor:
        """(s, K), true for the keys that are surely alike."""
        similarity = positives @ keys.T
        similarity.fill_diagonal_(-1.0)
        tenth = similarity.topk(min(10, len(keys)), dim=1).values[:, -1:]
        return similarity > torch.maximum(tenth, (queries * positives).sum(1, keepdim=True))


class CO2Loss(nn.Module):
    """Consistent contrast (Wei et al., ICLR 2021): InfoNCE, and query and key must resemble the negatives alike.

    The symmetric Kullback-Leibler divergence between the softmax of the query's and of the key's similarities to the
    queue is added with a weight.
    """

    def __init__(
        self,
        memory_bank_size: tuple[int, int],
        temperature: float,
        consistency_temperature: float = 0.04,
        weight: float = 10.0,
    ) -> None:
        super().__init__()
        self.memory_bank = KeyQueue(memory_bank_size)
        self.temperature = temperature
        self.consistency_temperature = consistency_temperature
        self.weight = weight

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """The loss of queries and keys, (s, d) each."""
        queries, keys = F.normalize(out0, dim=1), F.normalize(out1, dim=1)
        bank = self.memory_bank.bank.clone()  # backward needs it after the queue has moved on
        own, others = (queries * keys).sum(1, keepdim=True), queries @ bank.T
        logits = torch.cat([own, others], dim=1) / self.temperature
        contrast = F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.long))
        query_log, key_log = (x.div(self.consistency_temperature).log_softmax(1) for x in (others, keys @ bank.T))
        consistency = ((query_log.exp() - key_log.exp()) * (query_log - key_log)).sum(1).mean() / 2
        self.memory_bank.enqueue(keys)
        return contrast + self.weight * consistency
