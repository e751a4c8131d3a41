"""The views of an image, two to contrast and pairs of crops to mix, and the batches of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from lightly.transforms.moco_transform import MoCoV2Transform
from lightly.transforms.multi_view_transform import MultiViewTransform
from lightly.transforms.torchvision_v2_compatibility import ToTensor
from PIL.Image import Image
from torch import Tensor
from torchvision.transforms import Compose
from torchvision.transforms.functional import get_dimensions, to_pil_image

from slr_plugin.adapters._require import require

#: Crops of the paper's variant with one small crop.
SINGLE = (96,)
#: Crops of the paper's variant with several.
MULTI = (224, 192, 160, 128, 96)

# The MoCo authors' CIFAR demo: no blur, crops from 8 % of the image on, CIFAR-10's own mean and deviation.
CIFAR10_AUGMENTATION: dict[str, Any] = {
    "min_scale": 0.08,
    "gaussian_blur": 0.0,
    "normalize": {"mean": [0.4914, 0.4822, 0.4465], "std": [0.2023, 0.1994, 0.2010]},
}

# CLSA's operations but Identity; timm has no such operation, so a draw applies with less than CLSA's probability 0.5.
_OPERATIONS = [
    *("AutoContrast", "Brightness", "Color", "Contrast", "Equalize", "Rotate", "Sharpness", "ShearX", "ShearY"),
    *("Solarize", "TranslateXRel", "TranslateYRel", "PosterizeOriginal"),  # keeps 4 to 8 bits; timm's Posterize 0 to 4
]
_DRAWS = 5
_PROBABILITY = 0.5 * len(_OPERATIONS) / (len(_OPERATIONS) + 1)

View = Callable[[Image | Tensor], Tensor]


class SANETransform(MultiViewTransform):
    """Two views by MoCo v2's augmentation, then two crops for every entry of ``crops``.

    The order is lightly's: ``[key, query, positive of crop 0, query of crop 0, positive of crop 1, ...]``.
    :class:`SANE` contrasts the first two and mixes each later pair, theta x query + (1 - theta) x another image's
    positive; of two views alone it mixes these.

    Args:
        input_size: side of the two views in pixels.
        crops: sides of the crops in the mixup term, or one: ``()`` the two views themselves (the paper on CIFAR-10),
            ``SINGLE`` SANE-Single's 96, ``MULTI`` SANE-Multi's five. A crop of ``input_size`` is not drawn anew: it is
            the two views.
        strong: the positives that are mixed (not those that are keys and label the queries) also get CLSA's strong
            augmentation, five of 14 operations, each with probability 0.5. Not for tensors; needs timm.
        augmentation: arguments of lightly's MoCoV2Transform in place of its defaults, for all views alike.

    Raises:
        TypeError: an image has more than 8 bits per channel.
        ImportError: ``strong`` without timm.

    >>> from PIL import Image
    >>> views = SANETransform(input_size=32, crops=(32, 24))(Image.new("RGB", (40, 40)))
    >>> [tuple(view.shape) for view in views]
    [(3, 32, 32), (3, 32, 32), (3, 32, 32), (3, 32, 32), (3, 24, 24), (3, 24, 24)]
    """

    def __init__(
        self, input_size: int = 224, crops: Sequence[int] | int = (), strong: bool = False, **augmentation: Any
    ) -> None:
        crops = tuple(crops) if isinstance(crops, Sequence) else (crops,)
        self.input_size = input_size
        self.crops = crops or ((input_size,) if strong else ())
        self.strong = strong

        def view(size: int) -> View:
            return MoCoV2Transform(input_size=size, **augmentation).transforms[0]  # type: ignore[no-any-return]

        # (positive, query) per crop; None where a view is taken over.
        queries = [None if size == input_size else view(size) for size in self.crops]
        positives = [_strengthen(view(size)) for size in self.crops] if strong else queries
        self._pairs: list[tuple[View | None, View | None]] = list(zip(positives, queries, strict=True))
        super().__init__([view(input_size)] * 2)

    @classmethod
    def cifar10(cls, strong: bool = False) -> SANETransform:
        """The paper's views on CIFAR-10: 32 pixels, two views, augmented as in the MoCo authors' CIFAR demo."""
        return cls(input_size=32, strong=strong, **CIFAR10_AUGMENTATION)

    def __call__(self, image: Image | np.ndarray | Tensor) -> list[Tensor]:
        """``2 + 2 * len(crops)`` tensors (channels, side, side).

        Images of PIL and numpy become RGB, as in torchvision's loaders. Tensors, and without ``strong`` grey images,
        keep their channels up to the normalisation, which makes three of one where it has three.
        """
        image = to_pil_image(image) if isinstance(image, np.ndarray) else image
        if isinstance(image, Image):
            if image.mode[0] in "IF":  # RGB would cut their values off at 255
                raise TypeError(f"an image must have 8 bits per channel, got one of mode {image.mode}")
            image = image if image.mode == "L" and not self.strong else image.convert("RGB")
        if min(get_dimensions(image)[1:]) < self.input_size:
            warnings.warn(  # the default filter shows it once per process
                f"images smaller than {self.input_size} x {self.input_size} pixels are enlarged: if the whole data set "
                "is small, pass its size, SANETransform(input_size=...), or SANETransform.cifar10()",
                stacklevel=2,
            )
        views: list[Tensor] = super().__call__(image)  # type: ignore[assignment]
        for pair in self._pairs:
            views += [crop(image) if crop else view for crop, view in zip(pair, views[:2], strict=True)]
        return views


def _strengthen(view: View) -> View:
    """The view with CLSA's operations before it becomes a tensor."""
    require("lightly", "timm")
    from timm.data.auto_augment import rand_augment_transform

    # m10, mstd101: a magnitude uniform over its whole range.
    operations = rand_augment_transform(f"rand-m10-n{_DRAWS}-mstd101-p{_PROBABILITY:.10f}", transforms=_OPERATIONS)
    steps = view.transform.transforms  # type: ignore[attr-defined]
    last = next(place for place, step in enumerate(steps) if isinstance(step, ToTensor))
    return Compose([*steps[:last], operations, *steps[last:]])  # type: ignore[no-any-return]


#: The views of :class:`slr_plugin.adapters.lightly.SANE` where nothing else is said: ImageNet's size.
transform = SANETransform()
