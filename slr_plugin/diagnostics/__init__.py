"""How good refined labels are, told by classes that training never sees: measure them, follow them.

``quality.py`` compares labels with classes, ``monitor.py`` follows a loss.
"""

from slr_plugin.diagnostics.monitor import LabelMonitor as LabelMonitor
from slr_plugin.diagnostics.quality import LabelQuality as LabelQuality
from slr_plugin.diagnostics.quality import label_quality as label_quality

__all__ = ["LabelMonitor", "LabelQuality", "label_quality"]
