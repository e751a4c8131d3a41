"""Contrastive learning with self-labeling refinement (SANE): a loss and a mixup, one line from NTXentLoss."""

from slr_plugin import presets as presets
from slr_plugin.loss import SLRLoss as SLRLoss
from slr_plugin.mixup import Mix as Mix
from slr_plugin.mixup import MomentumMixup as MomentumMixup
from slr_plugin.schedules import CosineConfidence as CosineConfidence

__all__ = ["CosineConfidence", "Mix", "MomentumMixup", "SLRLoss", "presets"]
__version__ = "0.1.0"
