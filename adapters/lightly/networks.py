"""Backbone and head that SANE trains, their widths, and a stem for small images."""

from __future__ import annotations

import contextlib
import copy

import torch
from lightly.models.modules import MoCoProjectionHead
from torch import nn
from torchvision.models import ResNet, resnet50

from slr_plugin.checks import check_integer


def complete(
    backbone: nn.Module | None, head: nn.Module | None, feature_dim: int | None
) -> tuple[nn.Module, nn.Module, int, int]:
    """Backbone without ``fc``, head, and the widths of features and projections."""
    backbone = resnet50() if backbone is None else backbone
    if isinstance(getattr(backbone, "fc", None), nn.Linear):
        backbone.fc = nn.Identity()
    feature_dim = _feature_width(backbone) if feature_dim is None else feature_dim
    check_integer("feature_dim", feature_dim, low=1)
    head = MoCoProjectionHead(feature_dim, feature_dim, num_layers=3) if head is None else head
    return backbone, head, feature_dim, _width(copy.deepcopy(head), 2, feature_dim)


def cifar_stem(resnet: ResNet) -> ResNet:
    """A torchvision ResNet for 32 x 32 images, changed in place: first convolution 3 x 3, stride 1, no pooling."""
    resnet.conv1 = nn.Conv2d(3, resnet.conv1.out_channels, kernel_size=3, padding=1, bias=False)
    nn.init.kaiming_normal_(resnet.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision
    resnet.maxpool = nn.Identity()
    return resnet


def _feature_width(backbone: nn.Module) -> int:
    """The width of the features of images of ImageNet's size, on a copy without data, or what timm says it is."""
    channels = next((layer.in_channels for layer in backbone.modules() if isinstance(layer, nn.Conv2d)), 3)
    if not isinstance([*backbone.modules()][-1], nn.Linear):  # a classifier's scores are no features
        with contextlib.suppress(Exception):  # it wants another size, or more than shapes
            return _width(copy.deepcopy(backbone).to("meta"), 2, channels, 224, 224)
        if isinstance(width := getattr(backbone, "num_features", None), int):
            return width
    name = type(backbone).__name__
    raise ValueError(f"the features of a {name} cannot be counted: take off its classifier and pass feature_dim")


@torch.no_grad()
def _width(network: nn.Module, *shape: int) -> int:
    """The width of what comes out for zeros of the network's dtype, in evaluation mode."""
    like = next(network.parameters(), torch.empty(0))
    return int(network.eval()(like.new_zeros(shape)).flatten(start_dim=1).shape[1])
