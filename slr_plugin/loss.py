r"""The loss, equations (4) and (9), as a module that takes NTXentLoss's place."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist

from slr_plugin import dense
from slr_plugin._inputs import check_views, checked_crops, unit_features
from slr_plugin.checks import check_flag, check_integer, check_number
from slr_plugin.contrast import Hidden, Met, contrast
from slr_plugin.distributed import gather, rank
from slr_plugin.mixup import Mix
from slr_plugin.queue import KeyQueue, are_finite
from slr_plugin.refinery import Labels, one_hot_labels, refine
from slr_plugin.schedules import CosineConfidence

Confidence = float | Callable[[int], float]


class Settings(NamedTuple):
    """What the mathematics of one call needs besides tensors."""

    temperature: float
    sharpening: float
    refined_weight: float
    confidence: float | Tensor
    refines: bool  # False only where the confidence is known to be 0; the estimator's pass is then skipped
    bound: float  # the largest magnitude of a logit, features being of unit length
    chunk_size: int | None


class SLRLoss(nn.Module):
    r"""Contrastive loss whose labels are refined during training; takes the place of lightly's NTXentLoss.

    .. math:: L = (1 - \lambda)\, L_c(x, \mathrm{onehot}) + \lambda\, L_c(x', y'), \qquad
              L_c(x, y) = -\frac1s \sum_i \sum_k y_{ik} \log \mathrm{softmax}_k (\langle f_i, \bar b_k \rangle / \tau)

    The keys :math:`\bar b` are the positives of the minibatch and the queue. Without mixed queries the second term is
    :math:`L_c(x, \bar y)` with the refined labels of :mod:`slr_plugin.refinery`. Without a queue the loss is symmetric
    in its two views, both of which may be trained. Labels carry no gradient. Time is about that of two products of
    all rows with all keys, memory O(s d): neither logits nor labels are ever stored.

    Args:
        temperature: tau, not 0 (:math:`|\tau| \ge 10^{-8}`).
        memory_bank_size: ``(n, d)``, the queue's length and dimension; 0 for none. A bare int n warns and takes d from
            the first batch.
        gather_distributed: gather the keys of all processes: the loss and DDP's gradient are those of one process with
            the whole batch, and all queues are equal. Without it every process has its own queue, which DDP's
            ``broadcast_buffers=True`` overwrites with that of process 0.
        sharpening: tau' in (0, 1], sharpens the estimator.
        confidence: the prior confidence mu >= 0: a number, or a schedule ``step -> mu``. 0 means one-hot labels.
            A :class:`slr_plugin.CosineConfidence` is evaluated on the device; another callable gets a Python int.
        refined_weight: lambda in [0, 1], the weight of the refined term.
        in_batch_keys: True for the paper's key set, batch and queue. False for MoCo's, the own positive and the queue;
            with ``confidence=0`` the loss then equals NTXentLoss's, and mixed queries raise.

    Attributes:
        memory_bank: the queue; ``memory_bank.bank`` is its (n, d) buffer of unit rows.
        step: int64 buffer, the number of calls that advanced the queue and the schedule.
        stats: detached scalar tensors of the last call: ``positive_weight`` (the mean label weight left on the
            positive), ``alpha``, ``beta``, ``mu``, ``label_entropy`` (nats).
        chunk_size: keys per tile of the streaming pass; None chooses by device. Set it to trade memory for launches.

    Raises:
        ValueError: an argument is out of range, or ``gather_distributed`` without a torch that has it.
        TypeError: an argument is of the wrong type.

    >>> import torch
    >>> from slr_plugin import SLRLoss
    >>> criterion = SLRLoss(temperature=0.2, memory_bank_size=(4096, 128))
    >>> queries = torch.randn(8, 128, requires_grad=True)
    >>> loss = criterion(queries, torch.randn(8, 128))
    >>> loss.backward()
    """

    step: Tensor

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
        *,
        sharpening: float = 1.0,
        confidence: Confidence = 1.0,
        refined_weight: float = 0.5,
        in_batch_keys: bool = True,
    ) -> None:
        check_number("temperature", temperature)
        if abs(temperature) < 1e-8:
            raise ValueError(f"temperature must be at least 1e-8 in magnitude, got {temperature}")
        check_flag("gather_distributed", gather_distributed)
        if gather_distributed and not dist.is_available():
            raise ValueError(
                "gather_distributed=True needs a torch with torch.distributed; pass gather_distributed=False"
            )
        check_number("sharpening", sharpening)
        if not 0 < sharpening <= 1:
            raise ValueError(f"sharpening must be in (0, 1], got {sharpening}")
        if not callable(confidence):
            check_number("confidence", confidence, low=0.0)
        check_number("refined_weight", refined_weight, low=0.0, high=1.0)
        check_flag("in_batch_keys", in_batch_keys)
        super().__init__()
        self.temperature = float(temperature)
        self.gather_distributed = gather_distributed
        self.sharpening = float(sharpening)
        self.confidence = confidence if callable(confidence) else float(confidence)
        self.refined_weight = float(refined_weight)
        self.in_batch_keys = in_batch_keys
        self.memory_bank = KeyQueue(memory_bank_size)
        self.chunk_size: int | None = None
        self.stats: dict[str, Tensor] = {}
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def forward(
        self,
        out0: Tensor,
        out1: Tensor,
        mixed: Tensor | Sequence[Tensor] | None = None,
        mix: Mix | Sequence[Mix] | None = None,
        *,
        update: bool | None = None,
    ) -> Tensor:
        """The loss, a scalar; afterwards the positives enter the queue.

        Args:
            out0: (s, d) queries: outputs of the trained network. Any float dtype, any length: they are normalised here.
                Half precision is computed in float32, float64 stays float64.
            out1: (s, d) positives (keys): outputs of the momentum network, or without a queue of the trained one.
            mixed: (s, d) outputs of the trained network for mixed queries, or a list for several crops.
            mix: what :class:`slr_plugin.MomentumMixup` returned with them; one per crop.
            update: whether the queue and the schedule advance. None: if ``out0`` requires a gradient.

        Raises:
            ValueError: shapes, devices, list lengths or mixing indices do not fit; nothing has changed then.
            TypeError: an argument is not a tensor, or not of a float dtype.
            RuntimeError: a second or a forward-mode derivative is asked for.
        """
        check_views(out0, out1)
        self._check_dim(out0)
        crops, mixes = checked_crops(out0, mixed, mix)
        if mixes and not self.in_batch_keys:
            raise ValueError(
                "mixed queries need labels over the batch's keys: build the loss with in_batch_keys=True, or call it "
                "without mixed and mix"
            )
        if update is not None:
            check_flag("update", update)
        advances = out0.requires_grad if update is None else update
        confidence = self._confidence_now()
        settings = Settings(
            self.temperature,
            self.sharpening,
            self.refined_weight,
            confidence,
            refines=callable(self.confidence) or self.confidence > 0,
            bound=1 / (abs(self.temperature) * self.sharpening),
            chunk_size=self.chunk_size,
        )

        with torch.autocast(out0.device.type, enabled=False):
            trained, positives = unit_features(out0, out1, crops)
            if len(self.memory_bank):
                # Gathered before the queue is touched: it raises where processes bring batches of different sizes.
                entering = positives if self.in_batch_keys else positives.detach()
                if self.in_batch_keys or advances:
                    entering = self._gather(entering)
                self._ensure_queue(out0)
                batch_keys = entering if self.in_batch_keys else entering[:0]
                loss, labels = self._with_queue(trained, positives, batch_keys, mixes, settings)
            else:
                views = self._gather_views(trained[: len(positives)], positives)
                entering = views[len(views) // 2 :]
                loss, labels = self._without_queue(trained, positives, views, mixes, settings)

        self.stats = _stats(labels, confidence)
        if advances:
            self._advance(entering)
        return loss

    @torch.no_grad()
    def labels(self, out0: Tensor, out1: Tensor) -> Tensor:
        r"""The refined labels :math:`\bar y` over the current keys, dense, for looking at. Nothing advances.

        Args:
            out0: (s, d) queries.
            out1: (s, d) positives.

        Returns:
            Rows that sum to 1. With a queue (s, K): the minibatch's keys, then the queue (``in_batch_keys=False``: the
            own positive, then the queue). Without, (2s, 2s): rows and keys are ``out0`` then ``out1``, and a row's own
            view has label 0. With ``gather_distributed`` the columns are those of all processes.
        """
        check_views(out0, out1)
        self._check_dim(out0)
        confidence = self._confidence_now()
        with torch.autocast(out0.device.type, enabled=False):
            queries, positives = unit_features(out0, out1)
            size, offset = len(queries), self._offset(queries)
            rows, hidden = torch.arange(size, device=queries.device), None
            if not len(self.memory_bank):
                # Each row is labelled by its partner, the other view of its image; see _symmetric below.
                estimator = torch.cat([positives, queries])
                keys = self._gather_views(queries, positives)
                own = torch.cat([rows + offset + len(keys) // 2, rows + offset])
                hidden = own.roll(size)
                similarity = estimator @ keys.T
            elif self.in_batch_keys:
                own, keys = rows + offset, self._gather(positives)
                self._ensure_queue(out0)
                similarity = positives @ torch.cat([keys, self.memory_bank.bank.to(keys)]).T
            else:
                own = torch.zeros_like(rows)
                self._ensure_queue(out0)
                similarity = positives @ self.memory_bank.bank.to(positives).T
                similarity = torch.cat([positives.square().sum(1, keepdim=True), similarity], dim=1)
            return dense.self_labels(
                similarity,
                own,
                hidden,
                temperature=self.temperature,
                sharpening=self.sharpening,
                confidence=confidence,
            ).refined

    @torch.no_grad()
    def set_step(self, step: int) -> None:
        """Place the schedule of the confidence at ``step``, for trainers that count steps themselves.

        A call counts one step, which is wrong where several batches make one optimizer step or a run begins anew with
        loaded weights. Call this before every batch with the trainer's own count (Lightning's ``global_step``) and give
        the schedule the trainer's total.

        Raises:
            ValueError: ``step`` is negative.
            TypeError: ``step`` is not an integer.
        """
        check_integer("step", step, low=0)
        self.step.fill_(step)

    def extra_repr(self) -> str:
        """The settings, for print(criterion)."""
        names = ("temperature", "sharpening", "confidence", "refined_weight", "in_batch_keys", "gather_distributed")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Tolerate a checkpoint without step count, NTXentLoss's: its absence matters to schedules only."""
        if prefix + "step" not in state_dict:
            if callable(self.confidence):
                warnings.warn(
                    f"the checkpoint holds no step count ({prefix + 'step'!r}): the confidence schedule stays at step "
                    f"{int(self.step)}",
                    stacklevel=2,
                )
            state_dict = state_dict | {prefix + "step": self.step}
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _with_queue(
        self, trained: Tensor, positives: Tensor, keys: Tensor, mixes: list[Mix], settings: Settings
    ) -> tuple[Tensor, Labels]:
        """Queries, mixed queries and positives against {batch} u queue, or {own positive} u queue."""
        met, labels, targets = _meet(trained, positives, keys, self.memory_bank.bank, self._offset(positives), settings)
        if mixes:
            size = len(positives)
            losses = met.above(_logits(trained, torch.cat([positives, _mixed_targets(targets, mixes)]), settings))
            one_hot_loss, refined_loss = torch.split(losses, [size, len(losses) - size])
            return torch.lerp(one_hot_loss.mean(), refined_loss.mean(), settings.refined_weight), labels
        one_hot_loss = met.above(_logits(trained, positives, settings))
        if not self.in_batch_keys:
            one_hot_loss = _with_own(one_hot_loss)
        return _softened(one_hot_loss, trained, positives, targets, settings), labels

    def _without_queue(
        self, trained: Tensor, positives: Tensor, keys: Tensor, mixes: list[Mix], settings: Settings
    ) -> tuple[Tensor, Labels]:
        """Both views against both; mixed queries against the second views, which estimate their labels."""
        if not mixes:
            return self._symmetric(trained, positives, keys, settings)
        size = len(positives)
        one_hot_loss, _ = self._symmetric(trained[:size], positives, keys, settings._replace(refines=False))
        mixed, second = trained[size:], keys[len(keys) // 2 :]
        met, labels, targets = _meet(mixed, positives, second, None, self._offset(positives), settings)
        refined_loss = met.above(_logits(mixed, _mixed_targets(targets, mixes), settings)).mean()
        return torch.lerp(one_hot_loss, refined_loss, settings.refined_weight), labels

    def _symmetric(self, queries: Tensor, positives: Tensor, keys: Tensor, settings: Settings) -> tuple[Tensor, Labels]:
        """Both views as rows and as keys (SimCLR's key set); one Gram product serves logits and estimator.

        Each row is stacked as ``[view 0; view 1]`` and its partner, the other view of its image, is s rows on. A row
        sees all keys but itself; its peers are the keys that are neither itself nor its partner. The label of a row is
        estimated by its partner, over the same peers.
        """
        size, total, offset = len(queries), len(keys) // 2, self._offset(queries)
        # In one process the rows are the keys: the same tensor twice, by which contrast knows that half the logits do.
        views = keys if len(keys) == 2 * size else torch.cat([queries, positives])
        # Of view 0 and of view 1: the row itself and its partner.
        hidden = [Hidden(row, key + offset, size) for row in (0, size) for key in (0, total)]
        scales = [1 / self.temperature]
        if settings.refines and self.sharpening != 1:
            scales.append(1 / (self.temperature * self.sharpening))
        bound, chunk_size = settings.bound, settings.chunk_size
        met = contrast(views, keys, scales=scales, bound=bound, hidden=hidden, chunk_size=chunk_size)
        peers, sharp_peers = met.at(0), met.at(-1)
        partners = views.roll(size, 0)
        one_hot_loss = _with_own(peers.above(_logits(views, partners, settings)))
        if not settings.refines:
            return one_hot_loss.mean(), one_hot_labels(views)
        labels = _estimate(views, sharp_peers, settings)
        targets = labels.target(views, sharp_peers.mean).roll(size, 0)
        return _softened(one_hot_loss, views, partners, targets, settings), labels

    def _gather(self, local: Tensor) -> Tensor:
        return gather(local) if self.gather_distributed else local

    def _gather_views(self, queries: Tensor, positives: Tensor) -> Tensor:
        """Of all processes, (2S, d), the first views before the second ones; one exchange for both."""
        if not self.gather_distributed:
            return torch.cat([queries, positives])
        return torch.cat(gather(torch.cat([queries, positives], 1)).chunk(2, 1))

    def _offset(self, local: Tensor) -> int:
        """The number of this process's first key among the gathered ones."""
        return rank() * len(local) if self.gather_distributed else 0

    def _confidence_now(self) -> float | Tensor:
        schedule = self.confidence
        if not callable(schedule):
            return schedule
        if isinstance(schedule, CosineConfidence):
            return schedule(self.step)
        confidence = schedule(int(self.step))
        check_number(f"confidence({int(self.step)})", confidence, low=0.0)
        return confidence

    def _check_dim(self, features: Tensor) -> None:
        dim = self.memory_bank.dim
        if len(self.memory_bank) and dim not in (0, features.shape[1]):
            raise ValueError(
                f"out0 and out1 have shape {tuple(features.shape)} but the queue has shape "
                f"{tuple(self.memory_bank.bank.shape)}; set memory_bank_size=({len(self.memory_bank)}, "
                f"{features.shape[1]})"
            )

    def _ensure_queue(self, features: Tensor) -> None:
        if len(self.memory_bank) and not self.memory_bank.dim:
            self.memory_bank.set_dim(features.shape[1])

    @torch.no_grad()
    def _advance(self, keys: Tensor) -> None:
        """Enqueue the keys and count the step; a batch with a non-finite key does neither."""
        accepted = self.memory_bank.enqueue(keys) if len(self.memory_bank) else are_finite(keys)
        accepted = accepted.to(self.step.device)
        if torch.compiler.is_compiling():
            self.step = self.step + accepted  # a compiled backward may recompute the schedule from the old buffer
        else:
            self.step.add_(accepted)  # a CUDA graph writes to the buffer that it has recorded


def _meet(
    trained: Tensor,
    positives: Tensor,
    keys: Tensor,
    queue: Tensor | None,
    offset: int,
    settings: Settings,
) -> tuple[Met, Labels, Tensor]:
    """All rows meet all keys, once: the trained rows for their log-sum-exp, the positives as estimators of the labels.

    Returns:
        What the trained rows met, the labels and their target centroids (s, d).
    """
    size = len(positives)
    rows, hidden = trained, []
    if settings.refines:
        # Divided by tau', so that the common scale 1 / tau makes their logits those of 1 / (tau tau').
        rows = torch.cat([trained, positives.detach() / settings.sharpening])
        hidden = [Hidden(len(trained), offset, size)] if len(keys) else []
    met = contrast(
        rows,
        keys,
        queue,
        scales=[1 / settings.temperature],
        bound=settings.bound,
        hidden=hidden,
        chunk_size=settings.chunk_size,
    ).at(0)
    if not settings.refines:
        return met, one_hot_labels(positives), positives
    met, peers = met.split(len(trained))
    labels = _estimate(positives, peers, settings)
    return met, labels, labels.target(positives, peers.mean)


@torch.no_grad()
def _estimate(estimator: Tensor, peers: Met, settings: Settings) -> Labels:
    """Equation (5) for unit estimators (s, d) and what they met in the keys other than their own."""
    sharp = settings.temperature * settings.sharpening
    margin = -peers.above(_dot(estimator, estimator) / sharp)
    q_entropy = peers.above(_dot(estimator, peers.mean) / sharp)  # E_q[-log q] = l - E_q[logit]
    return refine(margin, peers.peak, q_entropy, settings.confidence)


def _logits(rows: Tensor, targets: Tensor, settings: Settings) -> Tensor:
    """Of each row with its target centroid t = sum_k y_k b_k; the log-sum-exp above it is equation (4) of the row."""
    return _dot(rows, targets) / settings.temperature


def _with_own(others: Tensor) -> Tensor:
    """From the log-sum-exp over the other keys to that over all, both above the own logit."""
    return torch.logaddexp(others, torch.zeros_like(others))


def _softened(one_hot_loss: Tensor, rows: Tensor, positives: Tensor, targets: Tensor, settings: Settings) -> Tensor:
    r"""Equation (9) of rows that are not mixed, from their one-hot loss.

    .. math:: L_c(x, y) = L_c(x, \mathrm{onehot}) + \langle f, g - t \rangle / \tau, \quad\text{so}\quad
              L = L_c(x, \mathrm{onehot}) + \lambda \langle f, g - t \rangle / \tau
    """
    if not settings.refines:
        return one_hot_loss.mean()
    moved = _dot(rows, positives - targets) * (settings.refined_weight / settings.temperature)
    return (one_hot_loss + moved).mean()


def _mixed_targets(targets: Tensor, mixes: Sequence[Mix]) -> Tensor:
    """Equation (8) for labels, crop after crop: mixing labels is mixing their centroids."""
    return torch.cat([targets[partner].lerp(targets, theta.to(targets)[:, None]) for theta, partner in mixes])


def _stats(labels: Labels, confidence: float | Tensor) -> dict[str, Tensor]:
    positive_weight, alpha, beta, entropy = torch.stack([labels.own, labels.alpha, labels.beta, labels.entropy]).mean(1)
    return {
        "positive_weight": positive_weight,
        "alpha": alpha,
        "beta": beta,
        "mu": confidence.to(alpha) if isinstance(confidence, Tensor) else alpha.new_full((), confidence),
        "label_entropy": entropy,
    }


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)
