r"""The loss, equation (9), as a module that takes NTXentLoss's place: settings, queue, schedule and statistics."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from slr_plugin import dense
from slr_plugin._inputs import Features, checked_features, no_autocast
from slr_plugin.distributed import broadcast, check_alike, gather, rank, world_size
from slr_plugin.key_sets import KeySet, build_key_set, warn_if_alone
from slr_plugin.mixup import Mix
from slr_plugin.objective import slr_objective
from slr_plugin.queue import KeyQueue
from slr_plugin.refinery import Labels
from slr_plugin.settings import SETTINGS, Confidence
from slr_plugin.state import HasState


class SLRLoss(HasState):
    r"""Contrastive loss whose labels are refined during training; takes the place of lightly's NTXentLoss.

    It weighs two cross-entropies over the keys, which are the minibatch's positives and the queue::

        loss = (1 - λ) · CE(queries, one-hot labels) + λ · CE(mixed queries, mixed labels)
        CE(f, y) = mean over i of  -Σ_k y[i, k] · log softmax_k(<f[i], key[k]> / τ)

    with λ ``refined_weight`` and τ ``temperature``. Without mixed queries the second term is CE(queries, refined
    labels). A refined label moves weight from the query's own positive to the keys that the positive itself resembles
    (``slr_plugin.refinery``), the more the larger ``confidence`` is. Without a queue the loss is symmetric in its
    two views, both of which may be trained. Labels carry no gradient. Neither logits nor labels are ever stored.

    All settings but the queue's may be assigned later and are checked then, as here. Keep the loss out of a model whose
    buffers are averaged (``AveragedModel(use_buffers=True)``, timm's ``ModelEmaV3``): average the encoder alone.

    Args:
        temperature: τ, at least 1e-8 in magnitude. A tensor with one value, such as a parameter, gets its
            gradient; the labels take it as a constant.
        memory_bank_size: ``(n, d)``, the queue's length and dimension; 0 for none. A bare int n warns and takes d from
            the first batch.
        gather_distributed: gather the keys of all processes: the loss and DDP's gradient are those of one process with
            the whole batch, and all queues are equal. Without it every process has its own queue, which DDP's
            ``broadcast_buffers=True`` overwrites with that of process 0.
        sharpening: τ' in (0, 1]; below 1 the refined labels favour the most similar keys more.
        confidence: μ >= 0, a number or a schedule ``step -> mu``. A label mixes the one-hot one, with weight 1, and its
            two estimates p (over all keys) and q (over all but the own), with weight μ max(p) and μ max(q); the
            weights are then normalised. 0 means one-hot labels.
            A :class:`slr_plugin.CosineConfidence` is evaluated on the device; another callable gets a Python int.
        refined_weight: λ in [0, 1], the weight of the refined term.
        in_batch_keys: True for the paper's key set, batch and queue. False for MoCo's, own positive and queue;
            with ``confidence=0`` the loss then equals NTXentLoss's, and mixed queries raise. Where both views are
            compared with both, it changes nothing else.
        symmetric: both views against both (only without a queue, and then the default), or False for one direction:
            rows are ``out0``, keys are ``out1``.
        estimator_dim: e, if calls bring features ``estimator`` (s, e) and there is a queue: a second queue holds them.
        same_group: what other keys of a row's group are, where calls bring ``groups``: ``"positive"``, the known label
            is uniform over them and the own positive, or ``"ignored"``, the row does not see them.

    Attributes:
        memory_bank: the queue; ``memory_bank.bank`` is its (n, d) buffer of unit rows.
        step: int64 buffer, the number of calls that advanced the queue and the schedule.
        stats: detached scalar tensors of the last call: ``positive_weight`` (the mean label weight left on the
            positive), ``alpha``, ``beta``, ``mu``, ``label_entropy`` (nats; not a number with an estimator, or where
            labels of groups are refined).
        chunk_size: keys per tile of the streaming pass; None chooses by device. A number trades memory for launches.

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

    _labels: Labels | None  # of the last call

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
        *,
        sharpening: float = 1.0,
        confidence: Confidence = 1.0,
        refined_weight: float = 0.5,
        in_batch_keys: bool = True,
        symmetric: bool | None = None,
        estimator_dim: int | None = None,
        same_group: str = "positive",
    ) -> None:
        super().__init__(KeyQueue(memory_bank_size, estimator_dim))
        self.temperature = temperature
        self.gather_distributed = gather_distributed
        if gather_distributed and not dist.is_available():
            raise ValueError("gather_distributed=True needs a torch with torch.distributed")
        self.sharpening = sharpening
        self.confidence = confidence
        self.refined_weight = refined_weight
        self.in_batch_keys = in_batch_keys
        self.symmetric = not len(self.memory_bank) if symmetric is None else symmetric
        self.same_group = same_group
        self.chunk_size = None
        self._labels = None
        self._compared = False  # whether the processes were asked if they bring the same arguments

    def forward(
        self,
        out0: Tensor,
        out1: Tensor,
        mixed: Tensor | Sequence[Tensor] | None = None,
        mix: Mix | Sequence[Mix] | None = None,
        *,
        negatives: Tensor | None = None,
        estimator: Tensor | None = None,
        groups: Tensor | None = None,
        update: bool | None = None,
    ) -> Tensor:
        """Compute the loss, a scalar; afterwards the positives enter the queue.

        Args:
            out0: (s, d) queries: outputs of the trained network. Any float dtype, any length: they are normalised here.
                Half precision is computed in float32, float64 stays float64.
            out1: (s, d) positives (keys): outputs of the momentum network, or without a queue of the trained one.
            mixed: (s, d) outputs of the trained network for mixed queries, or a list for several crops.
            mix: what :class:`slr_plugin.MomentumMixup` returned with them; one per crop.
            negatives: (m, d) further keys that are nobody's positive, such as mined ones. They may be trained, and do
                not enter the queue. With ``gather_distributed`` all processes bring equally many. Not beside
                ``estimator``.
            estimator: (s, e) other features of the samples, which estimate the labels in the positives' place.
            groups: (s,) int64, ids of groups of samples that are known to belong together, negative for none. They
                enter the queue with the keys.
            update: whether the queue and the schedule advance. None: if a gradient is recorded for ``out0``.

        Raises:
            ValueError: shapes, devices, list lengths or mixing indices do not fit; nothing has changed then.
            TypeError: an argument is not a tensor, or not of a float dtype.
            RuntimeError: ``create_graph=True``, or activation checkpointing makes the call again after the queue or the
                schedule moved on.
        """
        features = checked_features(out0, out1, mixed, mix, negatives, estimator, groups)
        updates = self._decide_update(out0, update)
        with no_autocast(out0.device):
            key_set = self._key_set(features)
            settings = self.settings_at(self.step, key_set.rows.dtype)
            loss, self._labels = slr_objective(key_set, features.crops, features.mixes, settings)
        warn_if_alone(key_set, loss, stacklevel=5)  # the caller of the module
        if updates:
            self._advance(key_set)
        return loss

    @property
    def stats(self) -> dict[str, Tensor]:
        """Detached scalars of the last call, see above; empty before the first."""
        return {} if self._labels is None else self._labels.averages()

    def labels(
        self,
        out0: Tensor,
        out1: Tensor,
        *,
        negatives: Tensor | None = None,
        estimator: Tensor | None = None,
        groups: Tensor | None = None,
    ) -> Tensor:
        r"""Compute the refined labels :math:`\bar y` over the current keys, dense, for looking at. Nothing advances.

        Arguments are those of :meth:`forward`. With ``gather_distributed`` all processes must call it, since it gathers
        the keys. Mixed queries without a queue see the second views alone, and so do their labels, which are those in
        one direction.

        Returns:
            Rows that sum to 1. With a queue they have shape (s, K), over the minibatch's keys (the own positive alone
            with ``in_batch_keys=False``), then ``negatives``, then the queue. Without, (2s, 2s + m): rows and keys are
            ``out0`` then ``out1``, and a row's own view has label 0; in one direction (s, s + m). With
            ``gather_distributed`` the columns are those of all processes.
        """
        return self.labelled_keys(out0, out1, negatives=negatives, estimator=estimator, groups=groups)[1]

    @torch.no_grad()
    def labelled_keys(
        self, out0: Tensor, out1: Tensor, *args: Any, update: bool | None = None, **kwargs: Any
    ) -> tuple[KeySet, Tensor]:
        """The keys that the labels of a call spread over, and the labels, dense; arguments as in :meth:`forward`."""
        features = checked_features(out0, out1, *args, **kwargs)
        with no_autocast(out0.device):
            key_set = self._key_set(features).for_mixed() if features.mixes else self._key_set(features)
            return key_set, dense.labels(key_set, self.settings_at(self.step, key_set.rows.dtype))

    def extra_repr(self) -> str:
        """The settings, for print(criterion)."""
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in SETTINGS if name != "chunk_size")

    def _key_set(self, features: Features) -> KeySet:
        """The keys of a call. Gathering may raise, and comes before the queue changes."""
        bank, size = self.memory_bank, len(features.queries)
        bank.check(features.positives, features.estimator)
        if features.queries.is_meta is not (self.step.is_meta or (bank.bank.is_meta and len(bank) > 0)):
            raise RuntimeError(
                "the loss or the features are on the meta device, which holds no values: call "
                "criterion.to_empty(device=...), or criterion.to('meta') for features without values"
            )
        gathers = self.gather_distributed and world_size() > 1
        device = features.queries.device
        if gathers and not torch.compiler.is_compiling() and (device.type == "cpu" or not self._compared):
            self._compared = True  # once on an accelerator, since the check waits for it
            optional = {name: getattr(features, name) for name in ("negatives", "estimator", "groups")}
            check_alike(device, out0=features.queries, **optional)
        build = functools.partial(
            build_key_set,
            in_batch_keys=self.in_batch_keys,
            symmetric=self.symmetric,
            gather=gather if gathers else None,
            offset=rank() * size if gathers else 0,
            queue_groups=bank.groups if len(bank) and features.groups is not None else None,
            ignores_group=self.same_group == "ignored",
        )
        if not len(bank):
            return build(features)
        key_set = build(features, bank.bank, bank.estimator_bank)
        if not bank.dim:
            bank.set_dim(features.queries.shape[1])
            key_set = key_set._replace(queue=bank.bank)
        if gathers and bank.share(
            functools.partial(broadcast, device=device)
        ):  # in place: the key set holds the buffers
            broadcast(self.step, device)
        return key_set
