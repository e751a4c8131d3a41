"""``method_kwargs`` of solo-learn's configuration: defaults, checks, and what is built of them."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

from slr_plugin import MomentumMixup, SLRLoss
from slr_plugin.adapters._run import schedule
from slr_plugin.checks import check_confidence, check_integer
from slr_plugin.presets import CIFAR10, IMAGENET

_LOSS = ("temperature", "sharpening", "refined_weight", "in_batch_keys", "same_group")  # as SLRLoss takes them
_OPTIONAL = ("kappa", "label_quality_every", "groups", "estimator")  # off if null, "None" (solo-learn's null), or false


def add_defaults(settings: MutableMapping[str, Any], dataset: str) -> None:
    """Add what is not set, in place: the paper's values, for CIFAR or for ImageNet, and mocov2plus's projector.

    Raises:
        ValueError: an unknown name.
    """
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
    for name, default in defaults.items():
        if name not in settings:
            settings[name] = default
        elif settings[name] == "None" or (settings[name] is False and name in _OPTIONAL):
            settings[name] = None


def check_crops(settings: MutableMapping[str, Any], num_large_crops: int, num_small_crops: int) -> None:
    """Raise ValueError for crops that cannot be trained with."""
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


def confidence_of(settings: MutableMapping[str, Any]) -> float | tuple[float, float]:
    """The confidence ``(m1, m2)`` over the run, or one number where it does not grow."""
    value = settings["confidence"]
    pair = value if isinstance(value, Sequence) and not isinstance(value, str) else [value] * 2
    if len(pair) != 2:
        raise ValueError(f"confidence must be [m1, m2] or a number, got {value}")
    start, end = (check_confidence("confidence", mu) for mu in pair)
    return start if start == end else (start, end)


def build(
    settings: MutableMapping[str, Any], estimator_dim: int | None = None
) -> tuple[list[SLRLoss], MomentumMixup | None]:
    """The losses of both directions, and the mixup; raises ValueError or TypeError that names the setting."""
    try:
        for name in ("proj_hidden_dim", "proj_output_dim", "queue_size"):
            check_integer(name, settings[name], low=1)
        options = {name: settings[name] for name in _LOSS}
        options["memory_bank_size"] = (settings["queue_size"], settings["proj_output_dim"])
        options["confidence"] = schedule(confidence_of(settings), total_steps=1)  # until the run's length is known
        losses = [SLRLoss(gather_distributed=True, estimator_dim=estimator_dim, **options) for _ in range(2)]
        return losses, None if settings["kappa"] is None else MomentumMixup(settings["kappa"])
    except (TypeError, ValueError) as error:  # its message begins with the argument's name
        raise type(error)(f"method_kwargs.{error}") from None
