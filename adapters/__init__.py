"""Adapters to frameworks, imported as ``slr_plugin.adapters``."""

if __name__ != "slr_plugin.adapters":
    raise ImportError("this folder is the package slr_plugin.adapters: install slr-plugin and import that")
