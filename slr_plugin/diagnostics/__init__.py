"""How good refined labels are, told by classes that training never sees: measure them, follow them, say it in words.

``quality.py`` compares labels with classes, ``monitor.py`` follows a loss.
"""

from slr_plugin.diagnostics.monitor import LabelMonitor as LabelMonitor
from slr_plugin.diagnostics.quality import LabelQuality as LabelQuality
from slr_plugin.diagnostics.quality import label_quality as label_quality
from slr_plugin.diagnostics.quality import summary as summary

__all__ = ["LabelMonitor", "LabelQuality", "label_quality", "summary"]
