"""The method as the paper prints it: every logit and every label in one dense matrix; and what the tests share.

Written from the paper's equations alone. Labels are constants; the keys inside the logits may carry gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from slr_plugin import Mix, SLRLoss

INPUTS = ("out0", "out1", "mixed")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """On matrices this small threads only wait for each other, tenfold where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------------ the mathematics


class KeySet(NamedTuple):
    """Rows and the keys they meet: ``allowed[i, k]`` says whether key k is one of row i's."""

    queries: Tensor  # (rows, d) f(x_i)
    estimators: Tensor  # (rows, d) g(x~_i), which estimates the label of row i
    keys: Tensor  # (K, d)
    own: Tensor  # (rows,) the index of row i's positive among the keys
    allowed: Tensor  # (rows, K) bool


class Labels(NamedTuple):
    """Equation (5): the refined labels and the weights that made them."""

    ybar: Tensor  # (rows, K)
    alpha: Tensor  # (rows,)
    beta: Tensor  # (rows,)


class Answer(NamedTuple):
    loss: Tensor
    labels: Labels
    key_set: KeySet  # of the labels

    def stats(self, mu: float) -> dict[str, float]:
        """Means over the rows, by the names of ``SLRLoss.stats``."""
        ybar, alpha, beta = self.labels
        rows = torch.arange(len(ybar))
        entropy = torch.stack([sum((-y * y.log() for y in row if y > 0), torch.zeros(())) for row in ybar])
        return {
            "positive_weight": ybar[rows, self.key_set.own].mean().item(),
            "alpha": alpha.mean().item(),
            "beta": beta.mean().item(),
            "mu": mu,
            "label_entropy": entropy.mean().item(),
        }


def shared_keys(out0: Tensor, out1: Tensor, bank: Tensor) -> KeySet:
    """The paper's key set: the positives of the minibatch, then the queue, for every row."""
    keys = torch.cat([out1, bank])
    s = len(out0)
    return KeySet(out0, out1, keys, torch.arange(s), torch.ones(s, len(keys), dtype=torch.bool))


def own_positive_keys(out0: Tensor, out1: Tensor, bank: Tensor) -> KeySet:
    """MoCo's key set: row i meets its own positive and the queue."""
    shared = shared_keys(out0, out1, bank)
    s = len(out0)
    allowed = shared.allowed.clone()
    allowed[:, :s] = torch.eye(s, dtype=torch.bool)
    return shared._replace(allowed=allowed)


def symmetric_keys(out0: Tensor, out1: Tensor) -> KeySet:
    """SimCLR's: both views are rows and keys; a row meets all but itself, its other view estimates its label."""
    s = len(out0)
    views = torch.cat([out0, out1])
    own = (torch.arange(2 * s) + s) % (2 * s)
    return KeySet(views, views[own], views, own, ~torch.eye(2 * s, dtype=torch.bool))


def softmax_over(scores: Tensor, allowed: Tensor) -> Tensor:
    """Row by row the softmax over the allowed keys; 0 elsewhere, and all 0 where none is allowed."""
    out = torch.zeros_like(scores)
    for i in range(len(scores)):
        if allowed[i].any():
            out[i, allowed[i]] = torch.softmax(scores[i, allowed[i]], dim=0)
    return out


@torch.no_grad()
def refine(key_set: KeySet, tau: float, sharpening: float, mu: float) -> Labels:
    """Equation (5) and the lines that define p, q, alpha, beta and z."""
    _, estimators, keys, own, allowed = key_set
    scores = estimators @ keys.T / (tau * sharpening)
    onehot = F.one_hot(own, len(keys)).to(scores)
    p = softmax_over(scores, allowed)
    q = softmax_over(scores, allowed & ~onehot.bool())
    z = 1 + mu * p.amax(1) + mu * q.amax(1)
    alpha = mu * p.amax(1) / z
    beta = mu * q.amax(1) / z
    ybar = (1 - alpha - beta)[:, None] * onehot + alpha[:, None] * p + beta[:, None] * q
    return Labels(ybar, alpha, beta)


def cross_entropy(queries: Tensor, key_set: KeySet, labels: Tensor, tau: float) -> Tensor:
    """Equation (4): L_c(x, y) = -1/s sum_i sum_k y_ik log softmax_k(<f(x_i), b_k> / tau)."""
    logits = (queries @ key_set.keys.T / tau).masked_fill(~key_set.allowed, -torch.inf)
    log_softmax = logits.log_softmax(1).masked_fill(~key_set.allowed, 0)
    return -(labels * log_softmax).sum(1).mean()


def one_hot_loss(key_set: KeySet, tau: float) -> Tensor:
    return cross_entropy(key_set.queries, key_set, F.one_hot(key_set.own, len(key_set.keys)), tau)


def slr(
    out0: Tensor,
    out1: Tensor,
    mixed: list[Tensor] | None = None,
    mix: list[Mix] | None = None,
    *,
    bank: Tensor | None = None,
    temperature: float = 0.5,
    sharpening: float = 1.0,
    confidence: float = 1.0,
    refined_weight: float = 0.5,
    in_batch_keys: bool = True,
) -> Answer:
    """Equation (9), in the dtype of its inputs (the tests give float64)."""
    out0, out1 = F.normalize(out0, dim=1), F.normalize(out1, dim=1)
    if bank is None:
        plain = symmetric_keys(out0, out1)
    else:
        plain = (shared_keys if in_batch_keys else own_positive_keys)(out0, out1, bank.to(out0))
    first = one_hot_loss(plain, temperature)
    if not mixed:
        labels = refine(plain, temperature, sharpening, confidence)
        second = cross_entropy(plain.queries, plain, labels.ybar, temperature)
        refined = plain
    else:
        refined = shared_keys(out0, out1, out0[:0] if bank is None else bank.to(out0))
        labels = refine(refined, temperature, sharpening, confidence)
        second = torch.zeros((), dtype=out0.dtype)
        for crop, (theta, partner) in zip(mixed, mix, strict=True):
            theta_ = theta.to(out0)[:, None]
            mixed_labels = theta_ * labels.ybar + (1 - theta_) * labels.ybar[partner]
            second = second + cross_entropy(F.normalize(crop, dim=1), refined, mixed_labels, temperature) / len(mixed)
    return Answer((1 - refined_weight) * first + refined_weight * second, labels, refined)


def dense_labels(answer: Answer, in_batch_keys: bool = True) -> Tensor:
    """The labels in the layout of ``SLRLoss.labels``: of MoCo's key set only each row's own keys."""
    ybar = answer.labels.ybar
    if in_batch_keys:
        return ybar
    s = len(ybar)
    return torch.cat([ybar.diagonal()[:, None], ybar[:, s:]], dim=1)


# ---------------------------------------------------------------------------------------- batches, and both sides' runs


class Batch(NamedTuple):
    """One minibatch. ``bank`` is None without a queue; ``mixed`` and ``mix`` are empty without mixed queries."""

    out0: Tensor
    out1: Tensor
    mixed: list[Tensor]
    mix: list[Mix]
    bank: Tensor | None

    def leaves(self, names: tuple[str, ...] = INPUTS, dtype: torch.dtype | None = None) -> Batch:
        """A copy whose features named in ``names`` are fresh leaves that require grad."""

        def leaf(name: str, value: Tensor) -> Tensor:
            return value.detach().to(dtype or value.dtype, copy=True).requires_grad_(name in names)

        mixed = [leaf("mixed", crop) for crop in self.mixed]
        return self._replace(out0=leaf("out0", self.out0), out1=leaf("out1", self.out1), mixed=mixed)

    def features(self) -> list[Tensor]:
        return [self.out0, self.out1, *self.mixed]


def make_batch(
    s: int, d: int, n: int = 0, crops: int = 0, *, dtype: torch.dtype = torch.float64, seed: int = 0
) -> Batch:
    """Random features of lengths 0.5 to 3.5; positives and ``crops`` mixtures lean to their query; any partners."""
    rng = torch.Generator().manual_seed(seed + 1000 * s + 100 * d + 10 * n + crops)

    def directions(count: int, lean: Tensor | float = 0.0) -> Tensor:
        return F.normalize(torch.randn(count, d, generator=rng, dtype=torch.float64) + lean, dim=1)

    def features(lean: Tensor | float = 0.0) -> Tensor:
        return directions(s, lean) * (0.5 + 3 * torch.rand(s, 1, generator=rng, dtype=torch.float64))

    out0 = features()
    toward = F.normalize(out0, dim=1)
    out1 = features(toward).to(dtype)
    mixed = [features(toward).to(dtype) for _ in range(crops)]
    mix = [
        Mix(torch.rand(s, generator=rng, dtype=torch.float64), torch.randint(s, (s,), generator=rng))
        for _ in range(crops)
    ]
    return Batch(out0.to(dtype), out1, mixed, mix, directions(n).float() if n else None)


def make_criterion(batch: Batch, chunk_size: int | None = None, **settings: object) -> SLRLoss:
    """An SLRLoss whose queue is the batch's."""
    size = 0 if batch.bank is None else tuple(batch.bank.shape)
    criterion = SLRLoss(memory_bank_size=size, **settings)
    if batch.bank is not None:
        criterion.memory_bank.bank.copy_(batch.bank)
    criterion.chunk_size = chunk_size
    return criterion


def call(criterion: SLRLoss, batch: Batch, update: bool | None = False) -> Tensor:
    """The loss of a batch; the queue stays unless ``update`` says otherwise."""
    if not batch.mixed:
        return criterion(batch.out0, batch.out1, update=update)
    return criterion(batch.out0, batch.out1, batch.mixed, batch.mix, update=update)


def ask(batch: Batch, **settings: object) -> Answer:
    """The oracle's answer."""
    return slr(batch.out0, batch.out1, batch.mixed, batch.mix, bank=batch.bank, **settings)


def gradients(loss: Tensor, batch: Batch) -> list[Tensor]:
    """The loss's gradients with respect to those features that require one."""
    wanted = [value for value in batch.features() if value.requires_grad]
    return list(torch.autograd.grad(loss, wanted)) if wanted else []
