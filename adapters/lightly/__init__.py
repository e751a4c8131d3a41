"""SANE in lightly's pipelines: a LightningModule, its views, and an entry for the METHODS of lightly's benchmarks.

``python -m slr_plugin.adapters.lightly PATH/main.py --methods sane ...`` runs lightly's own benchmark script with it.
"""

from __future__ import annotations

from slr_plugin.adapters._require import require

require("lightly", "lightly", "pytorch_lightning", "torchvision")

from slr_plugin.adapters.lightly.methods import VARIANTS as VARIANTS  # noqa: E402
from slr_plugin.adapters.lightly.methods import register as register  # noqa: E402
from slr_plugin.adapters.lightly.module import SANE as SANE  # noqa: E402
from slr_plugin.adapters.lightly.networks import cifar_stem as cifar_stem  # noqa: E402
from slr_plugin.adapters.lightly.transforms import MULTI as MULTI  # noqa: E402
from slr_plugin.adapters.lightly.transforms import SINGLE as SINGLE  # noqa: E402
from slr_plugin.adapters.lightly.transforms import SANETransform as SANETransform  # noqa: E402
from slr_plugin.adapters.lightly.transforms import transform as transform  # noqa: E402

__all__ = ["MULTI", "SANE", "SINGLE", "VARIANTS", "SANETransform", "cifar_stem", "register", "transform"]
