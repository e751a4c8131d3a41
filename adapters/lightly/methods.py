"""SANE's entries in a benchmark script's table of methods."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from functools import partialmethod
from typing import Any

from torch import Tensor

from slr_plugin.adapters.lightly.module import SANE
from slr_plugin.adapters.lightly.transforms import MULTI, SINGLE, SANETransform, transform

#: The paper's variants on ImageNet, with the crops in the mixup term, and strong augmentation of the mixed positives.
VARIANTS: dict[str, dict[str, Any]] = {
    "sane": {},
    "sane_single": {"crops": SINGLE},
    "sane_multi": {"crops": MULTI},
    "sane_strong": {"strong": True},
    "sane_single_strong": {"crops": SINGLE, "strong": True},
    "sane_multi_strong": {"crops": MULTI, "strong": True},
}


def register(
    methods: MutableMapping[str, dict[str, Any]], names: Iterable[str] = ("sane",), **knowledge: Tensor | None
) -> None:
    """Add SANE to ``METHODS`` of lightly's ``benchmarks/imagenet/resnet50/main.py``.

    Args:
        methods: changed in place: ``methods[name] = {"model": SANE, "transform": ...}``.
        names: which of ``VARIANTS``: ``sane``, ``sane_single``, ``sane_multi``, and each of them with ``_strong``.
        knowledge: ``groups`` and ``estimator`` of :class:`SANE`.

    Raises:
        ValueError: an unknown name.
        ImportError: a strong variant without timm.

    >>> methods = {}
    >>> register(methods)
    >>> sorted(methods["sane"])
    ['model', 'transform']
    """
    # A class, since the script asks for the names of its arguments.
    model = type("SANE", (SANE,), {"__init__": partialmethod(SANE.__init__, **knowledge)}) if knowledge else SANE
    for name in names:
        if name not in VARIANTS:
            raise ValueError(f"names must be among {', '.join(VARIANTS)}, got {name!r}")
        views = SANETransform(**VARIANTS[name]) if VARIANTS[name] else transform
        methods[name] = {"model": model, "transform": views}
