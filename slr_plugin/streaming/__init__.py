"""The streaming pass: softmax statistics of rows over their keys, without a matrix of logits.

``stats.py`` says what is computed, ``tiled.py`` computes it tile by tile, and ``op.py`` makes operators of that for
``torch.compile``.
"""

from slr_plugin.streaming.op import keys_gradient as keys_gradient
from slr_plugin.streaming.op import softmax_stats as softmax_stats
from slr_plugin.streaming.op import symmetric_gradient as symmetric_gradient
from slr_plugin.streaming.stats import Pass as Pass
from slr_plugin.streaming.stats import SoftmaxStats as SoftmaxStats

__all__ = ["Pass", "SoftmaxStats", "keys_gradient", "softmax_stats", "symmetric_gradient"]
