"""SANE as a method of solo-learn: ``method: "sane"`` in a configuration, in the scripts of an unmodified clone.

Two ways in. A configuration that names the callback, as those in ``configs`` do, needs nothing else:

    python main_pretrain.py --config-path pkg://slr_plugin.adapters.solo_learn.configs --config-name sane-cifar10

and ``python -m slr_plugin.adapters.solo_learn SCRIPT.py ...`` runs any script with the method in it. To import this,
solo-learn itself is not needed, which is a clone of scripts, no package to install; to use :class:`SANE` it is.
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
    if name != "SANE":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _require_solo_learn()
    from slr_plugin.adapters.solo_learn.method import SANE

    return SANE
