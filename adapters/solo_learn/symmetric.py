"""Equation (9) in both directions: each of two large crops is the query once and the key once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from slr_plugin import Mix, MomentumMixup, SLRLoss


def mix_views(
    large: Sequence[Tensor], small: Sequence[Tensor], mixup: MomentumMixup | None, strong: bool
) -> list[tuple[Tensor, Mix]]:
    """What the trained network sees besides the two large crops, and how it was mixed, of direction 0, 1, 0, ...

    In direction v the images (s, channels, side, side) of ``large[v]`` are the queries, ``large[1 - v]`` the positives.
    Further crops in ``small``, of any sizes, are mixed in place of the large ones, with a large one resized: as
    positives if ``strong``, else as queries. Without a mixup they stay as they are.
    """
    if mixup is None:
        theta = torch.ones(len(large[0]), device=large[0].device)
        return [(crop, Mix(theta, torch.arange(len(crop), device=crop.device))) for crop in small]
    if not small:
        return [mixup(large[0], large[1]), mixup(large[1], large[0])]
    mixed = []
    for place, crop in enumerate(small):
        whole = large[place % 2] if strong else large[1 - place % 2]
        if whole.shape != crop.shape:
            whole = F.interpolate(whole, crop.shape[-2:], mode="bilinear", antialias=True, align_corners=False)
        mixed.append(mixup(whole, crop) if strong else mixup(crop, whole))
    return mixed


def symmetric_loss(
    criteria: Iterable[SLRLoss],
    queries: Sequence[Tensor],
    positives: Sequence[Tensor],
    mixed: Sequence[Tensor],
    mixes: Sequence[Mix],
    **known: Tensor,
) -> Tensor:
    """The mean of both directions' losses; either queue takes its direction's positives.

    Args:
        criteria: one per direction.
        queries: (s, d) features of the two large crops by the trained network.
        positives: (s, d) features of the two large crops by the momentum network.
        mixed: (s, d) features of what :func:`mix_views` returned, in its order, and ``mixes``.
        mixes: see there.
        known: what is known of the images, as SLRLoss takes it.
    """
    losses = [
        criterion(queries[view], positives[1 - view], mixed[view::2] or None, mixes[view::2] or None, **known)
        for view, criterion in enumerate(criteria)
    ]
    return torch.stack(losses).mean()
