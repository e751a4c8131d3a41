"""SANE in lightly's pipelines: a LightningModule, its views, and an entry for the METHODS of lightly's benchmarks.

``python -m slr_plugin.adapters.lightly PATH/main.py --methods sane ...`` runs lightly's own benchmark script with it.
"""

from slr_plugin.adapters._require import require

require("lightly", "lightly", "pytorch_lightning", "torchvision")

from slr_plugin.adapters.knowledge import Indexed  # noqa: E402
from slr_plugin.adapters.lightly.methods import VARIANTS, register  # noqa: E402
from slr_plugin.adapters.lightly.module import SANE, cifar_stem  # noqa: E402
from slr_plugin.adapters.lightly.transforms import MULTI, SINGLE, SANETransform, transform  # noqa: E402

__all__ = ["MULTI", "SANE", "SINGLE", "VARIANTS", "Indexed", "SANETransform", "cifar_stem", "register", "transform"]
