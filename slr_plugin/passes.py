"""Which pass compares what with the keys: rows, mixed queries, and what estimates the labels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from slr_plugin.key_sets import KeySet
from slr_plugin.settings import Settings
from slr_plugin.streaming import Pass, keys_gradient, softmax_stats


class Passes(NamedTuple):
    """The passes of a call; the same one for several purposes where it can."""

    rows: Comparison
    mixed: Comparison
    estimators: Comparison
    block: str  # of the estimators in their pass
    one_hot_pairs: bool  # whether rows are the keys, and labels not refined: the gradient then takes one pass


def compare(key_set: KeySet, label_keys: KeySet, apart: bool, mixed: Tensor | None, settings: Settings) -> Passes:
    """Compare rows, mixed queries and estimators of the labels with their keys, in as few passes as these allow.

    =================================  ================================================================================
    keys, queries                      passes
    =================================  ================================================================================
    one direction                      rows, positives as estimators, and mixed queries in one
    both views, nothing mixed          rows, which are the positives, as estimators; once more if sharpening is not 1
    both views, mixed queries          rows; second views as estimators, and mixed queries, which see these alone
    =================================  ================================================================================

    Features that estimate in the positives' place take a pass of their own over their own keys; what it averages are
    the keys that labels spread over. Labels that are not refined need no estimators.

    Args:
        key_set: the rows and their keys.
        label_keys: the keys that labels spread over, which mixed queries see.
        apart: whether that is another key set: mixed queries see the second views alone.
        mixed: (n, d) unit features of mixed queries, or None.
        settings: the numbers.
    """
    temperature, sharpening, estimator = settings.temperature, settings.sharpening, label_keys.estimator
    positives_join = settings.refines and estimator is None and not label_keys.sees_both_views()
    joining = {}
    if positives_join:  # divided by tau', they have the logits of tau tau' at the temperature tau
        joining["estimators"] = label_keys.positives if sharpening == 1 else label_keys.positives / sharpening
    if mixed is not None:
        joining["mixed"] = mixed
    longest = 1 / sharpening if positives_join else 1.0
    one_hot_pairs = key_set.rows_are_keys() and mixed is None and not settings.refines
    if apart:
        of_rows = Comparison(key_set, {"rows": key_set.rows}, temperature, settings)
        of_mixed = Comparison(label_keys, joining, temperature, settings, longest)
    else:
        blocks = {"rows": key_set.rows, **joining}
        of_rows = of_mixed = Comparison(key_set, blocks, temperature, settings, longest, means=not one_hot_pairs)
    if positives_join:
        return Passes(of_rows, of_mixed, of_mixed, "estimators", one_hot_pairs)
    of_estimators = of_rows
    if settings.refines and (estimator is not None or sharpening != 1):
        keys, averaged = (label_keys, None) if estimator is None else (estimator, label_keys)
        of_estimators = Comparison(keys, {"rows": keys.rows}, temperature * sharpening, settings, averaged=averaged)
    return Passes(of_rows, of_mixed, of_estimators, "rows", one_hot_pairs)


class Comparison:
    """Blocks of rows, compared with the keys of a key set in one pass."""

    def __init__(
        self,
        key_set: KeySet,
        blocks: Mapping[str, Tensor],
        temperature: float | Tensor,
        settings: Settings,
        longest: float = 1.0,
        averaged: KeySet | None = None,
        means: bool = True,
    ) -> None:
        """Compute the statistics.

        Args:
            key_set: the keys.
            blocks: (n, d) each. Mixed queries, the last ones, see all keys; other blocks belong to the key set's rows
                one to one, and see what those see.
            temperature: of the logits.
            settings: the numbers.
            longest: the length that no row exceeds.
            averaged: the keys of this key set are averaged in the place of the others.
            means: whether means of the keys are needed.
        """
        self.sizes = {name: len(block) for name, block in blocks.items()}
        rows = torch.cat(list(blocks.values())) if len(blocks) > 1 else next(iter(blocks.values()))
        scale, bound = 1.0, math.inf
        if isinstance(temperature, Tensor):
            rows = rows / temperature
        else:
            scale, bound = 1 / temperature, longest / abs(temperature)
        groups = key_set.groups if key_set.ignores_group else None
        self.given = Pass(
            rows,
            key_set.keys,
            key_set.queue,
            values=averaged.keys if averaged is not None else None if means else key_set.keys[:, :0],
            queue_values=None if averaged is None else averaged.queue,
            hidden=self._by_block(key_set.hidden()),
            row_groups=self._by_block(groups),
            key_groups=None if groups is None else key_set.key_groups,
            scale=scale,
            bound=bound,
            # The keys are the rows: half of the logits are then enough.
            symmetric=key_set.queue is None and len(blocks) == 1 and blocks.get("rows") is key_set.keys,
            cross=key_set.cross,
            chunk=settings.chunk_size or 0,
        )
        self.stats = softmax_stats(self.given)
        self.by_block = dict(zip(blocks, self.stats.split(list(self.sizes.values())), strict=True))
        self.row_values: dict[str, Tensor] = {}

    def _by_block(self, mask: Tensor | None) -> Tensor | None:
        """What the key set's rows do not see, for the blocks before the mixed queries."""
        masks = [mask for name in self.sizes if name != "mixed" and mask is not None]
        return torch.cat(masks) if len(masks) > 1 else masks[0] if masks else None

    def send(self, block: str, values: Tensor) -> None:
        """Let the gradient of the keys be the sum of these (n, d), by the softmax of the block's rows; changes them."""
        self.row_values[block] = self.row_values[block].add_(values) if block in self.row_values else values

    def keys_gradient(self) -> Tensor:
        """The gradient (b, d) of the keys, or of those averaged in their place, by what was sent."""
        zero = torch.zeros_like(next(iter(self.row_values.values()))[:1])
        parts = [self.row_values.get(name, zero).expand(size, -1) for name, size in self.sizes.items()]
        return keys_gradient(self.given, self.stats, torch.cat(parts) if len(parts) > 1 else parts[0])
