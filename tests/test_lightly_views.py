"""The views that SANETransform makes, of images of every kind."""

import numpy as np
import pytest
import torch

for package in ("lightly", "timm"):
    pytest.importorskip(package, reason='pip install "slr-plugin[lightly]"')

from PIL import Image

from slr_plugin.adapters.lightly import SANETransform

pytestmark = pytest.mark.filterwarnings("ignore:The function `to_tensor:UserWarning")  # lightly 1.6.0, on tensors


def image(width=64, height=48):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("arguments", "sides"),
    [
        ({}, [32] * 2),
        ({"crops": (24,)}, [32, 32, 24, 24]),
        ({"crops": (32, 24)}, [32, 32, 32, 32, 24, 24]),
        ({"strong": True}, [32] * 4),
        ({"crops": (32, 24), "strong": True}, [32, 32, 32, 32, 24, 24]),
    ],
)
def test_views(arguments, sides):
    torch.manual_seed(0)
    views = SANETransform(input_size=32, **arguments)(image())
    assert [tuple(view.shape) for view in views] == [(3, side, side) for side in sides]
    assert {view.dtype for view in views} == {torch.float32}


def test_strong_views_of_many_draws():
    view = SANETransform(input_size=16, strong=True)
    source = image()
    assert all(part.isfinite().all() for _ in range(100) for part in view(source))


def test_a_crop_of_full_size_is_the_views_but_for_a_strong_positive():
    torch.manual_seed(0)
    key, query, positive, crop = SANETransform(input_size=32, crops=(32,))(image())
    assert positive is key
    assert crop is query
    key, query, positive, crop = SANETransform(input_size=32, crops=(32,), strong=True)(image())
    assert crop is query
    assert not torch.equal(positive, key)


def test_strong_follows_clsa():
    """Five draws among 14 operations, one of them the identity, each applied with probability 0.5."""
    torch.manual_seed(0)
    strong = SANETransform(input_size=32, strong=True)._pairs[0][0]
    (augment,) = (step for step in strong.transforms if hasattr(step, "ops"))
    assert augment.num_layers == 5
    assert augment.choice_weights is None
    assert len({operation.name for operation in augment.ops}) == 13
    assert [operation.prob for operation in augment.ops] == pytest.approx([0.5 * 13 / 14] * 13)
    assert {operation.magnitude_std for operation in augment.ops} == {float("inf")}
    names = [type(step).__name__ for step in strong.transforms]
    assert names.index("RandAugment") < names.index("ToTensor")


def test_cifar10_views():
    views = SANETransform.cifar10()(image(32, 32))
    assert [view.shape[-1] for view in views] == [32, 32]
    crop = SANETransform.cifar10().transforms[0].transform.transforms[0]
    assert crop.scale == (0.08, 1.0)


def test_a_small_image_warns_and_says_what_to_do():
    with pytest.warns(UserWarning, match=r"SANETransform\(input_size=...\)"):
        assert SANETransform(input_size=96)(image())[0].shape == (3, 96, 96)


def test_tensors_are_views_too():
    assert len(SANETransform(input_size=32)(torch.zeros(3, 40, 40, dtype=torch.uint8))) == 2


def kinds():
    """The same picture in the modes of PIL and as arrays."""
    picture = image(40, 40)
    pixels = np.asarray(picture)
    modes = {mode: picture.convert(mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV")}
    return modes | {"array": pixels, "grey array": pixels[..., 0], "one channel": pixels[..., :1]}


@pytest.mark.parametrize("strong", [False, True])
@pytest.mark.parametrize("kind", kinds())
def test_images_become_rgb(kind, strong):
    torch.manual_seed(0)
    transform = SANETransform(input_size=32, crops=(24,), strong=strong)
    for _ in range(8):  # of strong augmentations every draw, and of grey images the one in five that is made grey
        views = transform(kinds()[kind])
        assert [tuple(view.shape) for view in views] == [(3, side, side) for side in (32, 32, 24, 24)]


def test_an_image_of_another_mode_has_the_views_of_its_rgb_image():
    transform = SANETransform(input_size=32, gaussian_blur=0.0)  # which draws from numpy
    for kind in ("P", "RGBA", "CMYK", "array"):
        source = kinds()[kind]
        rgb = Image.fromarray(source) if kind == "array" else source.convert("RGB")
        torch.manual_seed(0)
        views = transform(source)
        torch.manual_seed(0)
        assert all(torch.equal(a, b) for a, b in zip(views, transform(rgb), strict=True))


def test_grey_images_of_grey_settings_stay_grey():
    transform = SANETransform(input_size=32, normalize={"mean": [0.5], "std": [0.5]})
    assert [tuple(view.shape) for view in transform(kinds()["L"])] == [(1, 32, 32)] * 2


@pytest.mark.parametrize(
    "wrong",
    [
        image(40, 40).convert("F"),
        image(40, 40).convert("I"),
        Image.fromarray(np.full((40, 40), 4000, dtype=np.uint16)),
    ],
)
def test_images_of_more_bits_are_refused(wrong):
    with pytest.raises(TypeError, match=f"8 bits per channel, got one of mode {wrong.mode}"):
        SANETransform(input_size=32)(wrong)


def test_one_crop_needs_no_tuple():
    assert SANETransform(crops=96).crops == (96,)
