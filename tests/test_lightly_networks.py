"""Backbones and heads of every kind: SANE fits them to each other, or says what does not fit."""

import pytest
import torch
from torch import nn

for package in ("lightly", "pytorch_lightning", "timm"):
    pytest.importorskip(package, reason='pip install "slr-plugin[lightly]"')

import timm
from _lightly import PRESET, WIDTH, Losses, backbone, build, train
from torchvision.models import mobilenet_v3_small, resnet18, vit_b_16

from slr_plugin.adapters.lightly import SANE, cifar_stem

pytestmark = [
    pytest.mark.usefixtures("one_thread", "unseeded"),
    pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning", "ignore::UserWarning:torch"),
    pytest.mark.filterwarnings("ignore:The function `to_tensor:UserWarning"),  # lightly 1.6.0, on tensors
]


def headless_resnet():
    network = resnet18()
    network.fc = nn.Identity()  # as in lightly's tutorials
    return network


@pytest.mark.parametrize(
    ("create", "width"),
    [
        (lambda: cifar_stem(resnet18()), 512),
        (headless_resnet, 512),
        (lambda: timm.create_model("resnet18"), 512),
        (lambda: timm.create_model("resnet18", num_classes=0), 512),
        (lambda: timm.create_model("mobilenetv3_small_050", num_classes=0), 1024),
        (lambda: timm.create_model("vit_tiny_patch16_224", num_classes=0), 192),
    ],
)
def test_the_width_of_the_features_is_found(create, width):
    model = SANE(8, 10, backbone=create(), queue_size=8)
    assert model.online_classifier.feature_dim == width
    assert model.projection_head.layers[0].in_features == width


@pytest.mark.parametrize("create", [mobilenet_v3_small, vit_b_16, lambda: timm.create_model("mobilenetv3_small_050")])
def test_networks_with_a_classifier_are_refused(create):
    with pytest.raises(ValueError, match="end in a classifier: take that off, or pass feature_dim"):
        SANE(8, 10, backbone=create(), queue_size=8)


def test_modes_are_left_as_they_are():
    """A batch norm that was frozen stays frozen, in the trained network and in its copy."""
    network, head = backbone(), nn.Sequential(nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    network[1].eval()
    head[1].eval()
    model = build(backbone=network, projection_head=head)
    before = {name: part.training for name, part in model.named_modules()}
    assert [name for name, training in before.items() if not training] == [
        *("backbone.1", "projection_head.1", "key_backbone.1", "key_projection_head.1")
    ]
    train(model, epochs=1)
    frozen = {name: part.training for name, part in model.named_modules() if isinstance(part, nn.BatchNorm1d)}
    assert set(frozen.values()) == {False}
    assert model.key_projection_head[1].num_batches_tracked == 0


def test_construction_leaves_statistics_and_random_numbers():
    network, head = backbone(), nn.Sequential(nn.Dropout(), nn.Linear(WIDTH, 4), nn.BatchNorm1d(4))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    model = build(backbone=network, projection_head=head)
    for name, value in before.items():
        assert torch.equal(network.state_dict()[name], value), name
    assert head[2].num_batches_tracked == model.key_projection_head[2].num_batches_tracked == 0


@pytest.mark.parametrize(
    ("dtype", "precision"), [(torch.float64, "64-true"), (torch.bfloat16, "bf16-true"), (torch.float16, None)]
)
def test_networks_of_other_dtypes(dtype, precision):
    head = nn.Sequential(nn.Linear(WIDTH, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 4))
    model = build(backbone=backbone().to(dtype), projection_head=head.to(dtype))
    assert model.criterion.memory_bank.bank.shape == (PRESET.queue_size, 4)
    assert {parameter.dtype for parameter in model.key_projection_head.parameters()} == {dtype}
    if precision:
        losses = Losses()
        train(model, epochs=1, precision=precision, callbacks=[losses], limit_val_batches=0)
        assert all(loss == loss for loss in losses.values)


def test_no_head_at_all():
    for head in (nn.Identity(), nn.Sequential()):
        model = build(projection_head=head)
        assert model.criterion.memory_bank.bank.shape == (PRESET.queue_size, WIDTH)
        assert not list(model.projection_head.parameters())


@pytest.mark.parametrize(
    ("confidence", "error", "message"),
    [
        ((0.0, 1.0, 100), ValueError, r"confidence must be a number, \(m1, m2\) or a callable, got \(0.0, 1.0, 100\)"),
        ((0.5,), ValueError, "confidence must be a number"),
        ("0.5", TypeError, "confidence must be a number"),
        ((0.0, -1.0), ValueError, "end must be between 0"),
    ],
)
def test_wrong_confidences(confidence, error, message):
    with pytest.raises(error, match=message):
        build(confidence=confidence)
