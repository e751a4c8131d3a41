"""Adds SANE to solo-learn: ``method: "sane"`` in a configuration of an unmodified clone.

A configuration that names the callback :class:`RegisterSANE` needs nothing else, and those in ``configs`` do:

    python main_pretrain.py --config-path pkg://slr_plugin.adapters.solo_learn.configs --config-name sane-cifar10

Scripts without Hydra, such as main_knn.py, run by ``python -m slr_plugin.adapters.solo_learn SCRIPT.py ...``. Importing
this module does not need solo-learn, which is a clone of scripts and no package; using :class:`SANE` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slr_plugin.adapters._require import install, require

require("solo", "hydra", "lightning", "torchvision")

from hydra.experimental.callback import Callback  # noqa: E402

if TYPE_CHECKING:
    from slr_plugin.adapters.solo_learn.method import SANE as SANE

__all__ = ["SANE", "RegisterSANE", "register"]
CLONE = "git clone https://github.com/vturrisi/solo-learn"


def __getattr__(name: str) -> Any:
    if name != "SANE":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from slr_plugin.adapters.solo_learn.method import SANE
    except ImportError as error:
        raise ImportError(
            f"solo-learn is not importable ({error}): get it with {CLONE}, then run its scripts, or add the clone to "
            "PYTHONPATH. PyPI's release of 2021 is too old: pip uninstall solo-learn. What it needs: "
            + install("solo"),
            name="solo",
        ) from error
    return SANE


def register() -> None:
    """Add ``sane`` to ``solo.methods.METHODS``; calling it again changes nothing.

    Raises:
        ImportError: there is no solo-learn, or it is PyPI's release of 2021.
    """
    method = __getattr__("SANE")
    from solo.methods import METHODS

    METHODS["sane"] = method


class RegisterSANE(Callback):
    """Registers the method before solo-learn's script looks for it: ``hydra.callbacks.slr._target_`` names it."""

    def on_job_start(self, config: Any, **kwargs: Any) -> None:
        """Called by Hydra before the script's main function."""
        register()
