"""Adds the method to solo-learn's METHODS, and says what to do where there is no solo-learn."""

from __future__ import annotations

import importlib
from typing import Any

from hydra.experimental.callback import Callback

from slr_plugin.adapters._require import install

CLONE = "git clone https://github.com/vturrisi/solo-learn"


class SoloLearnMissingError(ImportError):
    """solo-learn's main branch cannot be imported; the message says what to do."""


def require_solo_learn() -> None:
    """Raise SoloLearnMissingError unless solo-learn's main branch can be imported."""
    try:
        importlib.import_module("solo.methods")
        importlib.import_module("solo.utils.misc").omegaconf_select  # noqa: B018  # PyPI's release has no such function
    except (ImportError, AttributeError) as error:
        raise SoloLearnMissingError(
            f"solo-learn is not importable ({error}): get it with {CLONE}, then run its scripts, or add the clone to "
            "PYTHONPATH. PyPI's release of 2021 is too old: pip uninstall solo-learn. What it needs: "
            + install("solo"),
            name="solo",
        ) from error


def register() -> None:
    """Add ``sane`` to ``solo.methods.METHODS``; calling it again changes nothing.

    Raises:
        ImportError: there is no solo-learn, or it is PyPI's release of 2021.
    """
    require_solo_learn()
    from solo.methods import METHODS

    from slr_plugin.adapters.solo_learn.method import SANE

    METHODS["sane"] = SANE


class RegisterSANE(Callback):
    """Registers the method before solo-learn's script looks for it, in the processes that DDP starts too.

    In a configuration::

        hydra:
          callbacks:
            slr:
              _target_: slr_plugin.adapters.solo_learn.RegisterSANE
    """

    def on_job_start(self, config: Any, **kwargs: Any) -> None:
        """Called by Hydra before the script's main function."""
        register()
