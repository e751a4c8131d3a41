"""``method_kwargs`` of solo-learn's configuration: defaults and checks."""

from __future__ import annotations

import warnings
from collections.abc import MutableMapping, Sequence
from typing import Any

from slr_plugin import MomentumMixup, SLRLoss
from slr_plugin.checks import check_flag, check_integer, check_number
from slr_plugin.presets import CIFAR10, IMAGENET

LOSS_SETTINGS = ("temperature", "sharpening", "refined_weight", "in_batch_keys", "same_group")  # as SLRLoss takes them
_BY_DATA = ("queue_size", "sharpening", "confidence", "kappa")  # in which the paper's two presets differ
FILES = ("groups", "estimator")  # of what is known
_OPTIONAL = ("kappa", "label_quality_every", *FILES)  # off if null, which solo-learn also writes "None", or false


def add_defaults(settings: MutableMapping[str, Any], dataset: str) -> None:
    """Add what is not set, in place: the paper's values, for CIFAR or for ImageNet, and mocov2plus's projector.

    Warns where the paper's values for ImageNet are taken for other data.

    Raises:
        ValueError: an unknown name.
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
        "groups": None,
        "estimator": None,
        "same_group": "positive",
        "label_quality_every": None,
    }
    if unknown := [str(name) for name in settings if name not in defaults]:
        raise ValueError(
            f"method_kwargs.{', method_kwargs.'.join(unknown)}: unknown to sane; it takes {', '.join(defaults)}"
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
    try:
        for name in ("proj_hidden_dim", "proj_output_dim", "queue_size"):
            check_integer(name, settings[name], low=1)
        check_flag("strong_crops", settings["strong_crops"])
        check_number("temperature", settings["temperature"], low=0.0)
        if settings["label_quality_every"] is not None:
            check_integer("label_quality_every", settings["label_quality_every"], low=1)
        for confidence in start_and_end(settings["confidence"]):
            SLRLoss(confidence=confidence, **{name: settings[name] for name in LOSS_SETTINGS})
        if settings["kappa"] is not None:
            MomentumMixup(settings["kappa"])
        for name in FILES:
            if not isinstance(settings[name], str | None):
                raise TypeError(f"{name} must be the path of a file, got {settings[name]}")
    except (TypeError, ValueError) as error:  # its message begins with the argument's name
        raise type(error)(f"method_kwargs.{error}") from None
    small = "pipelines after the first, with another crop_size, or one written as a list, crop_size: [224]"
    if num_large_crops != 2 or num_small_crops == 1:
        raise ValueError(
            f"sane needs two large crops, and no small one or several, got {num_large_crops} and {num_small_crops}: "
            f"set num_crops: 2 in the first pipeline of augmentations; small crops are those of {small}"
        )
    if settings["strong_crops"] and not num_small_crops:
        raise ValueError(f"method_kwargs.strong_crops=True needs small crops: those of {small}")
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
