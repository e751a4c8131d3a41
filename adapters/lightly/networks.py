"""A stem for small images, and the widths of networks."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torchvision.models import ResNet


def cifar_stem(resnet: ResNet) -> ResNet:
    """A torchvision ResNet for 32 x 32 images, changed in place: first convolution 3 x 3, stride 1, no pooling."""
    resnet.conv1 = nn.Conv2d(3, resnet.conv1.out_channels, kernel_size=3, padding=1, bias=False)
    nn.init.kaiming_normal_(resnet.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision
    resnet.maxpool = nn.Identity()
    return resnet


@torch.no_grad()
def width(network: nn.Module, *shape: int) -> int:
    """The width of what a network makes of inputs of a shape, measured on a copy without data."""
    network = copy.deepcopy(network).to("meta").eval()
    like = next(network.parameters(), torch.empty(0, device="meta"))
    return int(network(like.new_empty(shape)).flatten(start_dim=1).shape[1])
