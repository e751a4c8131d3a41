"""Backbone and head that SANE trains: checked to fit each other, with a stem for small images."""

from __future__ import annotations

import contextlib
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
    backbone = resnet50() if backbone is None else backbone
    if isinstance(classifier := getattr(backbone, "fc", None), nn.Linear):
        feature_dim, backbone.fc = classifier.in_features if feature_dim is None else feature_dim, nn.Identity()
    if any(
        is_lazy(parameter) for network in (backbone, head) if network is not None for parameter in network.parameters()
    ):
        raise ValueError("backbone or projection_head has lazy layers: call it on a batch before it is copied")
    feature_dim = _feature_width(backbone) if feature_dim is None else feature_dim
    check_integer("feature_dim", feature_dim, low=1)
    head = MoCoProjectionHead(feature_dim, feature_dim, num_layers=3) if head is None else head
    try:
        return backbone, head, feature_dim, _width(copy.deepcopy(head), 2, feature_dim)
    except Exception as error:
        kind = type(head).__name__
        raise ValueError(
            f"projection_head, a {kind}, fails on features (2, feature_dim={feature_dim}): {error}"
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


def _feature_width(backbone: nn.Module) -> int:
    """The width of the features of images of ImageNet's size, on a copy without data, or what timm says it is."""
    channels = next((layer.in_channels for layer in backbone.modules() if isinstance(layer, nn.Conv2d)), 3)
    ends_in_classifier = isinstance([*backbone.modules()][-1], nn.Linear)
    width = None if ends_in_classifier else getattr(backbone, "num_features", None)  # not always what comes out
    if not ends_in_classifier:
        with contextlib.suppress(Exception):  # it wants another size, or more than shapes
            width = _width(copy.deepcopy(backbone).to("meta"), 2, channels, 224, 224)
    if width is None:
        name = type(backbone).__name__
        raise ValueError(f"the features of a {name} cannot be counted: take off its classifier and pass feature_dim")
    return int(width)


@torch.no_grad()
def _width(network: nn.Module, *shape: int) -> int:
    """The width of what comes out for zeros of the network's dtype, in evaluation mode."""
    like = next(network.parameters(), torch.empty(0))
    return int(network.eval()(like.new_zeros(shape)).flatten(start_dim=1).shape[1])
