"""The streaming pass: softmax statistics of rows over their keys, without a matrix of logits.

``stats.py`` says what is computed, ``op.py`` makes it an operator with a gradient, ``tiled.py`` and ``triton.py``
compute it: tile by tile with torch's own operations, or with GPU kernels.
"""

from slr_plugin.streaming.op import softmax_stats as softmax_stats
from slr_plugin.streaming.stats import SoftmaxStats as SoftmaxStats

__all__ = ["SoftmaxStats", "softmax_stats"]
