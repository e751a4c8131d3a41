"""``method_kwargs`` of solo-learn's configuration: defaults and checks."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import MutableMapping, Sequence
from typing import Any

from slr_plugin import MomentumMixup, SLRLoss
from slr_plugin.checks import check_flag, check_integer, check_number
from slr_plugin.presets import CIFAR10, IMAGENET

# Names of the adapter for lightly, and what is meant here.
_ELSEWHERE = {
    "mixup": "kappa: null is without mixup",
    "share_mix": "every crop draws its own theta and partners",
    "ema_momentum": "it is momentum.base_tau and momentum.final_tau, beside method_kwargs",
    "label_quality": "it is method_kwargs.label_quality_every",
}

LOSS_SETTINGS = ("temperature", "sharpening", "refined_weight", "in_batch_keys")  # what SLRLoss takes as it is
_BY_DATA = ("queue_size", "sharpening", "confidence", "kappa")  # in which the paper's two presets differ
_OPTIONAL = ("kappa", "label_quality_every")  # off if null, which solo-learn also writes "None", or false


def add_defaults(settings: MutableMapping[str, Any], dataset: str) -> None:
    """Add what is not set, in place: the paper's values, for CIFAR or for ImageNet, and mocov2plus's projector.

    Warns of every other name, which does nothing, and of the paper's values for ImageNet where the data are others.

    Raises:
        ValueError: a name that is nearly one of ours, or what another adapter calls it.
        TypeError: ``settings`` holds no names.
    """
    if not isinstance(settings, MutableMapping):
        raise TypeError(f"method_kwargs must hold names and values, such as kappa: 2.0, got {settings}")
    preset = CIFAR10 if dataset in ("cifar10", "cifar100") else IMAGENET
    defaults = {
        "proj_hidden_dim": 2048,
        "proj_output_dim": 256,
        "temperature": preset.temperature,
        "queue_size": preset.queue_size,
        "sharpening": preset.sharpening,
        "confidence": list(preset.confidence),
        "refined_weight": preset.refined_weight,
        "kappa": preset.kappa,
        "strong_crops": False,
        "in_batch_keys": True,
        "label_quality_every": None,
    }
    for name in settings:
        if name in _ELSEWHERE:
            raise ValueError(f"method_kwargs.{name} is unknown to solo-learn's sane: {_ELSEWHERE[name]}")
        # Closer than pred_hidden_dim, which other methods have, is to proj_hidden_dim; or a name cut short.
        meant = difflib.get_close_matches(str(name), defaults, n=1, cutoff=0.87)
        meant += [known for known in defaults if len(str(name)) > 3 and known.startswith(str(name))]
        if name not in defaults and meant:
            raise ValueError(f"method_kwargs.{name} is unknown; did you mean method_kwargs.{meant[0]}?")
    if unknown := [str(name) for name in settings if name not in defaults]:
        warnings.warn(
            f"method_kwargs.{', method_kwargs.'.join(unknown)}: unknown to sane, which does not use it; it knows "
            f"{', '.join(defaults)}",
            stacklevel=2,
        )
    silent = [name for name in _BY_DATA if name not in settings]
    if silent and dataset not in ("cifar10", "cifar100", "imagenet", "imagenet100"):
        taken = ", ".join(f"{name}={defaults[name]}" for name in silent)
        warnings.warn(
            f"the paper has no settings for data.dataset={dataset}, so method_kwargs takes those for ImageNet: {taken}"
            "; set them yourself (for small images CIFAR's, as in sane-cifar10.yaml)",
            stacklevel=2,
        )
    for name, default in defaults.items():
        if name not in settings:
            settings[name] = default
        elif settings[name] == "None" or (settings[name] is False and name in _OPTIONAL):
            settings[name] = None


def check(settings: MutableMapping[str, Any], num_large_crops: int, num_small_crops: int) -> None:
    """Raise ValueError or TypeError, naming the setting, for what cannot be trained with."""
    for name in ("proj_hidden_dim", "proj_output_dim", "queue_size"):
        check_integer(f"method_kwargs.{name}", settings[name], low=1)
    check_flag("method_kwargs.strong_crops", settings["strong_crops"])
    if settings["label_quality_every"] is not None:
        check_integer("method_kwargs.label_quality_every", settings["label_quality_every"], low=1)
    check_number("method_kwargs.temperature", settings["temperature"], low=0.0)
    try:
        for confidence in start_and_end(settings["confidence"]):
            SLRLoss(confidence=confidence, **{name: settings[name] for name in LOSS_SETTINGS})
        if settings["kappa"] is not None:
            MomentumMixup(settings["kappa"])
    except (TypeError, ValueError) as error:  # its message begins with the argument's name
        raise type(error)(f"method_kwargs.{error}") from None
    if num_large_crops != 2:
        raise ValueError(
            f"sane needs data.num_large_crops=2, got {num_large_crops}: set num_crops: 2 in the first pipeline of "
            "augmentations, and write the crop_size of a further one of its size as a list, crop_size: [224]"
        )
    if settings["strong_crops"] and not num_small_crops:
        raise ValueError(
            "method_kwargs.strong_crops=True needs augmentation pipelines after the first, of another crop_size; "
            "for one of full size write it as a list, crop_size: [224]"
        )
    if num_small_crops == 1:
        raise ValueError("one small crop would serve one of the two directions only: set its pipeline's num_crops to 2")
    if not settings["in_batch_keys"] and (settings["kappa"] is not None or num_small_crops):
        raise ValueError(
            "method_kwargs.in_batch_keys=False leaves mixed queries without keys for their labels: add kappa: null, "
            "and no small crops"
        )


def start_and_end(confidence: Any) -> tuple[Any, Any]:
    """The confidence as (m1, m2), of that or of one number."""
    pair = confidence if isinstance(confidence, Sequence) and not isinstance(confidence, str) else [confidence] * 2
    if len(pair) != 2:
        raise ValueError(f"confidence must be [m1, m2] or a number, got {confidence}")
    return pair[0], pair[1]
