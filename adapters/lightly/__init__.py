"""SANE in lightly's pipelines: a LightningModule, its views, and an entry for the METHODS of lightly's benchmarks.

``python -m slr_plugin.adapters.lightly PATH/main.py --methods sane ...`` runs lightly's own benchmark script with it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from slr_plugin.adapters._require import require

require("lightly", "lightly", "pytorch_lightning", "torchvision")

if TYPE_CHECKING:
    from slr_plugin.adapters.knowledge import Indexed as Indexed
    from slr_plugin.adapters.lightly.methods import VARIANTS as VARIANTS
    from slr_plugin.adapters.lightly.methods import register as register
    from slr_plugin.adapters.lightly.module import SANE as SANE
    from slr_plugin.adapters.lightly.networks import cifar_stem as cifar_stem
    from slr_plugin.adapters.lightly.transforms import MULTI as MULTI
    from slr_plugin.adapters.lightly.transforms import SINGLE as SINGLE
    from slr_plugin.adapters.lightly.transforms import SANETransform as SANETransform
    from slr_plugin.adapters.lightly.transforms import transform as transform

__all__ = ["MULTI", "SANE", "SINGLE", "VARIANTS", "Indexed", "SANETransform", "cifar_stem", "register", "transform"]


def __getattr__(name: str) -> Any:
    """Import a name where it is asked for: the frameworks take seconds, for which ``--help`` need not wait."""
    if name in __all__:
        for module in ("knowledge", "lightly.transforms", "lightly.networks", "lightly.module", "lightly.methods"):
            found = import_module(f"slr_plugin.adapters.{module}")
            if hasattr(found, name):
                return getattr(found, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
