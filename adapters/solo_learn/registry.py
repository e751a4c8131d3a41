"""Adds the method to solo-learn's METHODS, and says what to do where there is no solo-learn."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback

from slr_plugin.adapters._require import has_gpu, install

CLONE = "git clone https://github.com/vturrisi/solo-learn"
CPU = "accelerator=cpu \"devices='1'\" strategy=auto sync_batchnorm=False precision=32"


class SoloLearnMissingError(ImportError):
    """solo-learn's main branch cannot be imported; the message says what to do."""


def require_solo_learn() -> None:
    """Raise SoloLearnMissingError unless solo-learn's main branch can be imported."""
    spec = find_spec("solo")
    if spec is None:
        raise SoloLearnMissingError(
            f"solo-learn is not importable: get it with {CLONE}, then run its scripts, or add the clone to PYTHONPATH",
            name="solo",
        )
    try:
        importlib.import_module("solo.methods")
        importlib.import_module("solo.utils.misc").omegaconf_select  # noqa: B018  # PyPI's release has no such function
    except (ImportError, AttributeError) as error:
        beside = (
            Path(place).with_name("solo_learn-1.0.2.dist-info") for place in spec.submodule_search_locations or ()
        )
        if any(metadata.exists() for metadata in beside):  # PyPI's one release, as pip installed it
            raise SoloLearnMissingError(
                "the solo-learn installed here is PyPI's release of 2021, which today's Lightning cannot load: "
                f"pip uninstall solo-learn, then {CLONE} and run its scripts",
                name="solo",
            ) from error
        missing = getattr(error, "name", None)
        if missing and find_spec(missing.partition(".")[0]) is None:
            raise SoloLearnMissingError(
                f"solo-learn needs {missing}, which is not installed: {install('solo')}", name=missing
            ) from error
        raise


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
        if said := _wrong_device(config.get("accelerator"), config.get("devices")):
            raise SystemExit(said)  # Hydra would make a warning of an Exception
        register()


def _wrong_device(accelerator: Any, devices: Any) -> str | None:
    """What Lightning and solo-learn would end with, said with the options that help."""
    if accelerator in ("gpu", "cuda") and not has_gpu(accelerator):
        return f"accelerator={accelerator}, but torch finds no GPU here; on a CPU add: {CPU}"
    if accelerator == "cpu" and not isinstance(devices, str):
        return f"on a CPU solo-learn takes the number of processes as text, not devices={devices}; add: {CPU}"
    return None
