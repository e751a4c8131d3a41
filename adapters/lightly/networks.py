"""Backbone and head that SANE trains: checked to fit each other, with a stem for small images."""

from __future__ import annotations

import copy
from typing import Any

import torch
from lightly.models.modules import MoCoProjectionHead
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torchvision.models import ResNet, resnet50

from slr_plugin.checks import check_integer


def complete(
    backbone: nn.Module | None, head: nn.Module | None, feature_dim: int | None
) -> tuple[nn.Module, nn.Module, int, int]:
    """Backbone without ``fc``, head, and the widths of features and projections; ValueError where they do not fit."""
    backbone, feature_dim = _without_classifier(resnet50() if backbone is None else backbone, feature_dim)
    if head is None:
        head = MoCoProjectionHead(feature_dim, feature_dim, num_layers=3)
    if any(is_lazy(parameter) for parameter in (*backbone.parameters(), *head.parameters())):
        raise ValueError("backbone or projection_head has lazy layers: call it on a batch before it is copied")
    try:
        return backbone, head, feature_dim, _width(copy.deepcopy(head), 2, feature_dim)
    except Exception as error:
        raise ValueError(
            f"projection_head, a {type(head).__name__}, fails on features (2, feature_dim={feature_dim}): {error}"
        ) from error


def checked_features(features: Any, feature_dim: int, head: nn.Module) -> Tensor:
    """Features (s, feature_dim) for the head, or a ValueError: what could not be measured is believed until here."""
    if not isinstance(features, Tensor):
        raise ValueError(f"the backbone must put out a tensor of features, got {type(features).__name__}")
    flat: Tensor = features.flatten(start_dim=1)
    if flat.shape[1] != feature_dim:
        raise ValueError(f"the backbone puts out {flat.shape[1]} features: pass feature_dim={flat.shape[1]}")
    dtype = next((parameter.dtype for parameter in head.parameters()), flat.dtype)
    if flat.dtype != dtype and not torch.is_autocast_enabled(flat.device.type):
        raise ValueError(f"the backbone puts out {flat.dtype}, but projection_head is {dtype}: give both one dtype")
    return flat


def cifar_stem(resnet: ResNet) -> ResNet:
    """A torchvision ResNet for 32 x 32 images, changed in place: first convolution 3 x 3, stride 1, no pooling."""
    resnet.conv1 = nn.Conv2d(3, resnet.conv1.out_channels, kernel_size=3, padding=1, bias=False)
    nn.init.kaiming_normal_(resnet.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision
    resnet.maxpool = nn.Identity()
    return resnet


def _without_classifier(backbone: nn.Module, feature_dim: int | None) -> tuple[nn.Module, int]:
    known = getattr(backbone, "num_features", None)  # timm's, not always what comes out
    if isinstance(classifier := getattr(backbone, "fc", None), nn.Linear):
        known, backbone.fc = classifier.in_features, nn.Identity()
    name, measured = type(backbone).__name__, _feature_width(backbone)
    if feature_dim is None:
        ends_in_classifier = isinstance([*backbone.modules()][-1], nn.Linear)
        feature_dim = known if measured is None or ends_in_classifier else measured
    if feature_dim is None:
        raise ValueError(
            f"the features of this backbone, a {name}, cannot be counted: take off its classifier and pass feature_dim"
        )
    check_integer("feature_dim", feature_dim, low=1)
    if measured not in (None, feature_dim):
        raise ValueError(
            f"the backbone, a {name}, puts out {measured} features, not {feature_dim}: pass feature_dim={measured}, or "
            "take off its classifier"
        )
    return backbone, feature_dim


def _feature_width(backbone: nn.Module) -> int | None:
    """The width of the features of images of usual sizes, on a copy without data; None if none fits, or it varies."""
    probe = copy.deepcopy(backbone).to("meta")
    channels = next((layer.in_channels for layer in backbone.modules() if isinstance(layer, nn.Conv2d)), 3)
    widths = set()
    for side in (32, 64, 224, 256):
        try:
            widths.add(_width(probe, 2, channels, side, side))
        except Exception:  # wants another size, or more than shapes
            continue
    return widths.pop() if len(widths) == 1 else None


@torch.no_grad()
def _width(network: nn.Module, *shape: int) -> int:
    """The width of what comes out for zeros of the network's dtype, in evaluation mode."""
    like = next(network.parameters(), torch.empty(0))
    return int(network.eval()(like.new_zeros(shape)).flatten(start_dim=1).shape[1])
