"""Adds SANE to solo-learn: ``method: "sane"`` in a configuration of an unmodified clone.

A configuration that names the callback :class:`RegisterSANE` needs nothing else, and those in ``configs`` do:

    python main_pretrain.py --config-path pkg://slr_plugin.adapters.solo_learn.configs --config-name sane-cifar10

Scripts without Hydra, such as main_knn.py, run by ``python -m slr_plugin.adapters.solo_learn SCRIPT.py ...``. Importing
this module does not need solo-learn, which is a clone of scripts and no package; using :class:`SANE` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slr_plugin.adapters._require import require

require("solo", "hydra", "lightning", "torchvision")

from slr_plugin.adapters.solo_learn.registry import RegisterSANE as RegisterSANE  # noqa: E402
from slr_plugin.adapters.solo_learn.registry import register as register  # noqa: E402
from slr_plugin.adapters.solo_learn.registry import require_solo_learn as _require_solo_learn  # noqa: E402

if TYPE_CHECKING:
    from slr_plugin.adapters.solo_learn.method import SANE as SANE

__all__ = ["SANE", "RegisterSANE", "register"]


def __getattr__(name: str) -> Any:
    if name == "SANE":
        _require_solo_learn()
        from slr_plugin.adapters.solo_learn.method import SANE

        return SANE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
