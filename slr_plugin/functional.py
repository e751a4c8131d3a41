"""The losses as pure functions: no module, no state, nothing advances."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slr_plugin._inputs import checked_features, checked_groups, no_autocast
from slr_plugin.checks import check_flag, check_float_tensor
from slr_plugin.key_sets import build_cross_key_set, build_key_set, warn_if_alone
from slr_plugin.mixup import Mix
from slr_plugin.objective import slr_objective
from slr_plugin.settings import Settings, as_scalar, check_setting


def slr_loss(
    queries: Tensor,
    positives: Tensor,
    queue: Tensor | None = None,
    mixed: Tensor | Sequence[Tensor] | None = None,
    mix: Mix | Sequence[Mix] | None = None,
    *,
    negatives: Tensor | None = None,
    temperature: float | Tensor = 0.5,
    sharpening: float = 1.0,
    confidence: float = 1.0,
    refined_weight: float = 0.5,
    in_batch_keys: bool = True,
    symmetric: bool | None = None,
    groups: Tensor | None = None,
    queue_groups: Tensor | None = None,
    same_group: str = "positive",
) -> Tensor:
    r"""Compute equation (9): contrastive loss with refined labels.

    ::

        loss = (1 - λ) · CE(queries, one-hot labels) + λ · CE(mixed queries, mixed labels)
        CE(f, y) = mean over i of  -Σ_k y[i, k] · log softmax_k(<f[i], key[k]> / τ)

    Without mixed queries the second term is CE(queries, refined labels). :class:`slr_plugin.SLRLoss` adds what has
    state: a queue that advances, a schedule of the confidence, keys gathered over processes.

    Equals :func:`slr_plugin.dense.slr_loss`, or where both views are compared with both
    :func:`slr_plugin.dense.symmetric_slr_loss`, with the same arguments, without storing logits or labels. Labels are
    estimated from the positives; other features for that are SLRLoss's ``estimator``.

    Args:
        queries: (s, d) trained features; normalised here, as are all others but the queue.
        positives: (s, d) keys, one per query.
        queue: (n, d) further keys of unit length, without gradient; None for none.
        mixed: (s, d) trained features of mixed queries, or a list for several crops.
        mix: what :class:`slr_plugin.MomentumMixup` returned with them; one per crop.
        negatives: (m, d) further keys that are nobody's positive; they may be trained.
        temperature: τ, a number or a tensor with one value, which gets its gradient.
        sharpening: τ' in (0, 1].
        confidence: μ >= 0.
        refined_weight: λ in [0, 1].
        in_batch_keys: whether a query sees the other queries' positives.
        symmetric: True: both views are compared with both, which needs no queue. False: rows are the queries, keys the
            positives. None: True if ``queue`` is None.
        groups: (s,) int64, the ids of the samples' groups, negative for none; see :mod:`slr_plugin.groups`.
        queue_groups: (n,) int64, those of the queue's keys; None where they are unknown.
        same_group: ``"positive"`` spreads a row's known label over all keys of its group; ``"ignored"`` leaves the
            other keys of the group out.

    Returns:
        A scalar, float64 if queries or positives are, else float32.

    Raises:
        ValueError: shapes, devices or numbers do not fit.
        TypeError: an argument has the wrong type.

    >>> queries, positives = torch.eye(2), torch.eye(2)
    >>> round(slr_loss(queries, positives, temperature=1.0, confidence=0.0, symmetric=False).item(), 4)  # log(1 + 1/e)
    0.3133
    """
    names = ("queries", "positives")
    features = checked_features(queries, positives, mixed, mix, negatives, groups=groups, names=names)
    if queue is not None:
        check_float_tensor("queue", queue)
        if queue.ndim != 2 or queue.shape[1] != queries.shape[1]:
            raise ValueError(f"queue must have shape (n, {queries.shape[1]}), got {tuple(queue.shape)}")
        if queue.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere reading would wait
            lengths = torch.linalg.vector_norm(queue.detach(), dim=1)
            if not bool(((lengths - 1).abs() < 1e-2).all()):
                raise ValueError(
                    "queue must have rows of unit length: pass torch.nn.functional.normalize(queue, dim=1)"
                )
        if queue_groups is not None:
            queue_groups = checked_groups("queue_groups", queue_groups, len(queue), queries.device)
    if queue_groups is not None and (groups is None or queue is None):
        raise ValueError("queue_groups came without groups or without a queue: pass all three")
    if symmetric is not None:
        check_flag("symmetric", symmetric)
    if symmetric and queue is not None:
        raise ValueError("symmetric=True compares both views with both and takes no queue: pass queue=None")
    symmetric = queue is None if symmetric is None else symmetric
    if callable(confidence):
        raise TypeError("confidence must be a number here, since a function counts no steps: pass schedule(step)")
    confidence = check_setting("confidence", confidence)
    settings = Settings(
        as_scalar(check_setting("temperature", temperature), features.positives.dtype),
        check_setting("sharpening", sharpening),
        check_setting("refined_weight", refined_weight),
        confidence,
        refines=confidence > 0,
    )
    with no_autocast(queries.device):
        key_set = build_key_set(
            features,
            None if queue is None else queue.detach(),
            in_batch_keys=check_setting("in_batch_keys", in_batch_keys),
            symmetric=symmetric,
            queue_groups=queue_groups,
            ignores_group=check_setting("same_group", same_group) == "ignored",
        )
        loss = slr_objective(key_set, features.crops, features.mixes, settings)[0]
    warn_if_alone(key_set, loss, stacklevel=3)
    return loss


def clip_loss(
    images: Tensor, texts: Tensor, *, temperature: float | Tensor = 0.07, groups: Tensor | None = None
) -> Tensor:
    """Compute CLIP's loss, without the matrix of pairs.

    ::

        loss = (CE(images against texts) + CE(texts against images)) / 2

    Both directions share their logits: one pass for the value, one for the gradient.

    Args:
        images: (s, d) trained features; normalised here, as the texts are.
        texts: (s, d), row i belongs to image i.
        temperature: τ, a number or a tensor with one value, which gets its gradient; one over CLIP's scale.
        groups: (s,) int64, which pairs belong together, such as the number of the image of which there are several
            captions; negative: alone. A label is uniform over the texts, or images, of the group.

    Returns:
        A scalar, float64 if images or texts are, else float32.

    Raises:
        ValueError: shapes, devices or numbers do not fit.
        TypeError: an argument has the wrong type.

    >>> round(clip_loss(torch.eye(2), torch.eye(2), temperature=1.0).item(), 4)  # log(1 + 1/e)
    0.3133
    """
    names = ("images", "texts")
    features = checked_features(images, texts, groups=groups, names=names)
    temperature = as_scalar(check_setting("temperature", temperature), features.queries.dtype)
    with no_autocast(images.device):
        settings = Settings(temperature, sharpening=1.0, refined_weight=1.0, confidence=0.0, refines=False)
        key_set = build_cross_key_set(features)
        loss = slr_objective(key_set, [], [], settings)[0]
    warn_if_alone(key_set, loss, stacklevel=3)
    return loss
