"""The method as the paper prints it: every logit and every label in one dense matrix; and what the tests share.

Written from the paper's equations alone, and from our definitions of groups, estimators and labels of both views.
Labels are constants; the keys inside the logits may carry gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from _intra_op import intra_op_threads
from torch import Tensor

from slr_plugin import Mix, SLRLoss

INPUTS = ("out0", "out1", "mixed", "negatives")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """On matrices this small threads only wait for each other, tenfold where the machine is busy."""
    with intra_op_threads(1):
        yield


# ------------------------------------------------------------------------------------------------------ the mathematics


class KeySet(NamedTuple):
    """Rows and the keys they meet: ``allowed[i, k]`` says whether key k is one of row i's."""

    queries: Tensor  # (rows, d) f(x_i)
    keys: Tensor  # (K, d)
    own: Tensor  # (rows,) the index of row i's positive among the keys
    allowed: Tensor  # (rows, K) bool
    scores: Tensor  # (rows, K) the cosines that make p and q: of row i's estimator with key k, both as the estimator's


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


def shared_keys(out0: Tensor, out1: Tensor, further: Tensor, estimator: Tensor, estimator_further: Tensor) -> KeySet:
    """The paper's key set: the positives of the minibatch, then ``further`` keys, for every row."""
    keys, s = torch.cat([out1, further]), len(out0)
    scores = estimator @ torch.cat([estimator, estimator_further]).T
    return KeySet(out0, keys, torch.arange(s), torch.ones(s, len(keys), dtype=torch.bool), scores)


def own_positive_keys(*args: Tensor) -> KeySet:
    """MoCo's key set: row i meets its own positive and the further keys."""
    shared = shared_keys(*args)
    s = len(shared.queries)
    allowed = shared.allowed.clone()
    allowed[:, :s] = torch.eye(s, dtype=torch.bool)
    return shared._replace(allowed=allowed)


def symmetric_keys(out0: Tensor, out1: Tensor, negatives: Tensor, estimator: Tensor | None) -> KeySet:
    """SimCLR's: both views are rows and keys; a row meets all but itself, its other view estimates its label.

    Further negatives are keys of every row. Features that estimate in the views' place are the same for both.
    """
    s = len(out0)
    views = torch.cat([out0, out1])
    own = (torch.arange(2 * s) + s) % (2 * s)
    keys = torch.cat([views, negatives])
    others = torch.cat([~torch.eye(2 * s, dtype=torch.bool), torch.ones(2 * s, len(negatives), dtype=torch.bool)], 1)
    if estimator is None:
        return KeySet(views, keys, own, others, views[own] @ keys.T)
    estimators = torch.cat([estimator, estimator])
    return KeySet(views, keys, own, others, estimators @ estimators.T)


def softmax_over(scores: Tensor, allowed: Tensor) -> Tensor:
    """Row by row the softmax over the allowed keys; 0 elsewhere, and all 0 where none is allowed."""
    out = torch.zeros_like(scores)
    for i in range(len(scores)):
        if allowed[i].any():
            out[i, allowed[i]] = torch.softmax(scores[i, allowed[i]], dim=0)
    return out


def group_labels(key_set: KeySet, rows: Tensor, columns: Tensor, same_group: str) -> tuple[KeySet, Tensor]:
    """The key set that rows of known groups see, and their labels y0; ids of rows and of columns, negative for none."""
    onehot = F.one_hot(key_set.own, len(key_set.keys)).bool()
    same = (rows[:, None] == columns) & (rows[:, None] >= 0) & key_set.allowed & ~onehot
    if same_group == "ignored":
        return key_set._replace(allowed=key_set.allowed & ~same), onehot.to(key_set.keys)
    together = (same | onehot).to(key_set.keys)
    return key_set, together / together.sum(1, keepdim=True)


@torch.no_grad()
def refine(key_set: KeySet, tau: float, sharpening: float, mu: float, known: Tensor | None = None) -> Labels:
    """Equation (5) and the lines that define p, q, alpha, beta and z; known labels stand in the one-hot ones' place."""
    _, keys, own, allowed, cosines = key_set
    scores = cosines / (tau * sharpening)
    onehot = F.one_hot(own, len(keys)).to(scores)
    p = softmax_over(scores, allowed)
    q = softmax_over(scores, allowed & ~onehot.bool())
    z = 1 + mu * p.amax(1) + mu * q.amax(1)
    alpha = mu * p.amax(1) / z
    beta = mu * q.amax(1) / z
    known = onehot if known is None else known
    ybar = (1 - alpha - beta)[:, None] * known + alpha[:, None] * p + beta[:, None] * q
    return Labels(ybar, alpha, beta)


def cross_entropy(queries: Tensor, key_set: KeySet, labels: Tensor, tau: float) -> Tensor:
    """Equation (4): L_c(x, y) = -1/s sum_i sum_k y_ik log softmax_k(<f(x_i), b_k> / tau)."""
    logits = (queries @ key_set.keys.T / tau).masked_fill(~key_set.allowed, -torch.inf)
    log_softmax = logits.log_softmax(1).masked_fill(~key_set.allowed, 0)
    return -(labels * log_softmax).sum(1).mean()


def slr(
    out0: Tensor,
    out1: Tensor,
    mixed: list[Tensor] | None = None,
    mix: list[Mix] | None = None,
    *,
    bank: Tensor | None = None,
    negatives: Tensor | None = None,
    estimator: Tensor | None = None,
    estimator_bank: Tensor | None = None,
    temperature: float = 0.5,
    sharpening: float = 1.0,
    confidence: float = 1.0,
    refined_weight: float = 0.5,
    in_batch_keys: bool = True,
    symmetric: bool | None = None,
    groups: Tensor | None = None,
    queue_groups: Tensor | None = None,
    same_group: str = "positive",
) -> Answer:
    """Equation (9), in the dtype of its inputs (the tests give float64).

    ``negatives`` stand behind the batch's keys and before the queue. ``estimator`` (s, e) and ``estimator_bank`` (n, e)
    stand in for the positives and the queue wherever p and q are made. ``groups`` (s,) and ``queue_groups`` (n,) are
    ids of known groups.
    """
    out0, out1 = F.normalize(out0, dim=1), F.normalize(out1, dim=1)
    negatives = out1[:0] if negatives is None else F.normalize(negatives, dim=1)
    further = negatives if bank is None else torch.cat([negatives, bank.to(out0)])
    features = None if estimator is None else F.normalize(estimator, dim=1)
    if features is None:
        one_direction = (out0, out1, further, out1, further)
    else:  # which come without negatives
        queue = features[:0] if bank is None else estimator_bank.to(out0)
        one_direction = (out0, out1, further, features, queue)
    if symmetric or (symmetric is None and bank is None):
        plain = symmetric_keys(out0, out1, negatives, features)
    else:
        plain = (shared_keys if in_batch_keys else own_positive_keys)(*one_direction)
    ids = torch.full((len(out0),), -1) if groups is None else groups
    further_ids = torch.full((len(further),), -1)
    if queue_groups is not None:
        further_ids[len(negatives) :] = queue_groups
    views = len(plain.queries) // len(out0)
    plain, known = group_labels(plain, ids.repeat(views), torch.cat([*[ids] * views, further_ids]), same_group)
    first = cross_entropy(plain.queries, plain, known, temperature)
    if not mixed:
        labels = refine(plain, temperature, sharpening, confidence, known)
        second = cross_entropy(plain.queries, plain, labels.ybar, temperature)
        refined = plain
    else:
        refined = shared_keys(*one_direction)
        seen, known = group_labels(refined, ids, torch.cat([ids, further_ids]), same_group)
        labels = refine(seen, temperature, sharpening, confidence, known)
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
    """One minibatch; what it does not have is None, or empty for ``mixed`` and ``mix``."""

    out0: Tensor
    out1: Tensor
    mixed: list[Tensor]
    mix: list[Mix]
    bank: Tensor | None
    negatives: Tensor | None = None
    estimator: Tensor | None = None
    estimator_bank: Tensor | None = None
    groups: Tensor | None = None
    queue_groups: Tensor | None = None

    def leaves(self, names: tuple[str, ...] = INPUTS, dtype: torch.dtype | None = None) -> Batch:
        """A copy whose features named in ``names`` are fresh leaves that require grad."""

        def leaf(name: str, value: Tensor) -> Tensor:
            return value.detach().to(dtype or value.dtype, copy=True).requires_grad_(name in names)

        return self._replace(
            out0=leaf("out0", self.out0),
            out1=leaf("out1", self.out1),
            mixed=[leaf("mixed", crop) for crop in self.mixed],
            negatives=None if self.negatives is None else leaf("negatives", self.negatives),
            estimator=None if self.estimator is None else leaf("estimator", self.estimator),
        )

    def features(self) -> list[Tensor]:
        """What may be trained."""
        return [self.out0, self.out1, *self.mixed, *([] if self.negatives is None else [self.negatives])]

    def with_queue_of(self, criterion: SLRLoss) -> Batch:
        """The batch with the queue that the criterion has now."""
        if self.bank is None:
            return self
        memory = criterion.memory_bank
        second = None if self.estimator_bank is None else memory.estimator_bank.clone()
        return self._replace(bank=memory.bank.clone(), estimator_bank=second)


def make_batch(
    s: int,
    d: int,
    n: int = 0,
    crops: int = 0,
    *,
    negatives: int = 0,
    estimator_dim: int = 0,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Batch:
    """Random features of lengths 0.5 to 3.5; positives and ``crops`` mixtures lean to their query; any partners."""
    rng = torch.Generator().manual_seed(seed + 1000 * s + 100 * d + 10 * n + crops)

    def directions(count: int, lean: Tensor | float = 0.0, width: int = d) -> Tensor:
        return F.normalize(torch.randn(count, width, generator=rng, dtype=torch.float64) + lean, dim=1)

    def features(lean: Tensor | float = 0.0, count: int = s, width: int = d) -> Tensor:
        return directions(count, lean, width) * (0.5 + 3 * torch.rand(count, 1, generator=rng, dtype=torch.float64))

    out0 = features()
    toward = F.normalize(out0, dim=1)
    out1 = features(toward).to(dtype)
    mixed = [features(toward).to(dtype) for _ in range(crops)]
    mix = [
        Mix(torch.rand(s, generator=rng, dtype=torch.float64), torch.randint(s, (s,), generator=rng))
        for _ in range(crops)
    ]
    bank = directions(n).float() if n else None
    return Batch(
        out0.to(dtype),
        out1,
        mixed,
        mix,
        bank,
        features(count=negatives).to(dtype) if negatives else None,
        features(width=estimator_dim).to(dtype) if estimator_dim else None,
        directions(n, width=estimator_dim).float() if n and estimator_dim else None,
    )


def make_criterion(batch: Batch, chunk_size: int | None = None, **settings: object) -> SLRLoss:
    """An SLRLoss whose queue is the batch's."""
    size = 0 if batch.bank is None else tuple(batch.bank.shape)
    if batch.estimator_bank is not None:
        settings["estimator_dim"] = batch.estimator_bank.shape[1]
    criterion = SLRLoss(memory_bank_size=size, **settings)
    if batch.bank is not None:
        criterion.memory_bank.bank.copy_(batch.bank)
    if batch.estimator_bank is not None:
        criterion.memory_bank.estimator_bank.copy_(batch.estimator_bank)
    if batch.queue_groups is not None:
        criterion.memory_bank.groups.copy_(batch.queue_groups)
    criterion.chunk_size = chunk_size
    return criterion


def call(criterion: SLRLoss, batch: Batch, update: bool | None = False) -> Tensor:
    """The loss of a batch; the queue stays unless ``update`` says otherwise."""
    crops = (batch.mixed, batch.mix) if batch.mixed else ()
    further = {"negatives": batch.negatives, "estimator": batch.estimator, "groups": batch.groups}
    return criterion(batch.out0, batch.out1, *crops, **further, update=update)


def ask(batch: Batch, **settings: object) -> Answer:
    """The oracle's answer."""
    return slr(**batch._asdict(), **settings)


def gradients(loss: Tensor, batch: Batch) -> list[Tensor]:
    """The loss's gradients with respect to those features that require one."""
    wanted = [value for value in batch.features() if value.requires_grad]
    return list(torch.autograd.grad(loss, wanted)) if wanted else []
