r"""Labels from known groups: the mean of the keys that share a row's group, the target of a uniform label over them.

Row i sees the keys :math:`K_i`, its positive is key :math:`o(i)`, and :math:`G_i` is :math:`o(i)` with all keys of
:math:`K_i` in the row's group. In the place of the one-hot label stands

.. math::
    y^0_{ik} = 1 / |G_i| \text{ for } k \in G_i, \qquad
    t^0_i = \sum_k y^0_{ik} \bar b_k = \frac{1}{|G_i|} \sum_{k \in G_i} \bar b_k .

With both views as rows and no refinement that is SupCon's label (Khosla et al., 2020). No matrix of pairs is needed:
the rows' ids are sorted, every key looks its id up in them and is added to the sum that it finds.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from slr_plugin.key_sets import KeySet


class GroupLabels(NamedTuple):
    """The labels y0 that are known."""

    targets: Tensor  #: (r, d), the means over the keys of each row's group
    positive_share: Tensor | float  #: (r,), the weight of the positive


def group_labels(key_set: KeySet) -> GroupLabels:
    """The known labels of a key set's rows.

    Rows without a group, and all rows where other keys of the group are no positives, have their positive alone.
    """
    rows, positives, groups, key_groups = key_set.rows, key_set.positives, key_set.groups, key_set.key_groups
    if groups is None or key_groups is None or key_set.ignores_group:
        return GroupLabels(positives, 1.0)
    ids, size = groups.sort().values, len(groups)

    def places(of: Tensor) -> Tensor:
        """Where ids stand among the rows' ids; others go to many spare places, as additions to one would queue up."""
        place = torch.searchsorted(ids, of).clamp(max=size - 1)
        spare = size + torch.arange(len(of), device=of.device) % size
        return place.where((ids[place] == of) & (of >= 0), spare)

    sums, counts = rows.new_zeros(2 * size, rows.shape[1]), rows.new_zeros(2 * size)
    queue = key_set.keys[:0] if key_set.queue is None else key_set.queue
    for keys, of in zip((key_set.keys, queue), torch.split(key_groups, [len(key_set.keys), len(queue)]), strict=True):
        place = places(of)
        sums = sums.index_add(0, place, keys.to(rows))
        counts = counts.index_add(0, place, counts.new_ones(1).expand(len(of)))
    place = places(groups)
    sums, counts = sums[place], counts[place]
    if key_set.sees_both_views():  # among the keys are the rows themselves
        sums, counts = sums - rows, counts - 1
    if key_set.positive_index is None:
        sums, counts = sums + positives, counts + 1
    counts = counts.clamp(min=1.0).where(groups >= 0, 1.0)
    means = torch.where(groups[:, None] >= 0, sums / counts[:, None], positives)
    return GroupLabels(means, 1 / counts)
