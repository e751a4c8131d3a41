"""How good refined labels are, told by classes that training never sees: measure, print, plot, put into words.

``quality.py`` compares labels with classes, ``monitor.py`` follows a loss, ``report.py`` draws and puts into words.
"""

from slr_plugin.diagnostics.monitor import LabelMonitor as LabelMonitor
from slr_plugin.diagnostics.quality import LabelQuality as LabelQuality
from slr_plugin.diagnostics.quality import label_quality as label_quality
from slr_plugin.diagnostics.report import plot as plot
from slr_plugin.diagnostics.report import summary as summary

__all__ = ["LabelMonitor", "LabelQuality", "label_quality", "plot", "summary"]
