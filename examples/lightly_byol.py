"""BYOL in plain PyTorch with momentum mixup and a pull towards alike images, on lightly's parts.

    python examples/lightly_byol.py --data DIR    images as DIR/<class>/*; without --data, CIFAR-10 is downloaded

BYOL has no negatives and hence no labels to refine. Momentum mixup carries over: a mixed query approaches the same
mixture of targets. So does the idea behind refined labels: a target is the mean over those images of the batch that the
momentum network finds alike. Both are definitions of this package, not of the paper. The lines marked ``new`` are all
that separates this from lightly's BYOL example; ``python -m benchmarks representations --studies byol`` compares them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms.byol_transform import BYOLTransform, BYOLView1Transform, BYOLView2Transform
from lightly.utils.scheduler import cosine_schedule
from lightly_data import options, two_views
from torch import Tensor, nn
from torchvision.models import resnet18

from slr_plugin import MomentumMixup  # new

ALIKE = 0.9  # new: the cosine of two targets from which on their images count as alike


class BYOL(nn.Module):
    """Backbone, projection and prediction head, and the moving averages of the first two."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = resnet18()
        self.backbone.fc = nn.Identity()  # 512 features
        self.projection_head = BYOLProjectionHead(512, 1024, 256)
        self.prediction_head = BYOLPredictionHead(256, 1024, 256)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        for module in (self.backbone_momentum, self.projection_head_momentum):
            deactivate_requires_grad(module)

    def forward(self, x: Tensor) -> Tensor:
        """Predictions, (s, 256)."""
        return self.prediction_head(self.projection_head(self.backbone(x)))

    @torch.no_grad()
    def forward_momentum(self, x: Tensor) -> Tensor:
        """Targets, (s, 256)."""
        return self.projection_head_momentum(self.backbone_momentum(x))

    def update_momentum(self, m: float) -> None:
        """Move the averages: m of themselves, 1 - m of the trained weights."""
        update_momentum(self.backbone, self.backbone_momentum, m=m)
        update_momentum(self.projection_head, self.projection_head_momentum, m=m)


def targets_of(outputs: Tensor) -> Tensor:
    """Unit rows: the mean of the momentum network's outputs over the images that are alike."""
    unit = F.normalize(outputs)
    near = unit @ unit.T > ALIKE  # new
    return F.normalize(near.float() @ unit)  # was: unit


def distance(predictions: Tensor, targets: Tensor) -> Tensor:
    """The mean negative cosine; linear in the targets, so that a mixture of targets mixes distances."""
    return -(F.normalize(predictions) * targets).sum(1).mean()


def main(argv: Sequence[str] | None = None) -> None:
    """Pretrain, and print each epoch's mean loss."""
    args = options(__doc__).parse_args(argv)
    views = BYOLView1Transform(input_size=32, gaussian_blur=0.0), BYOLView2Transform(input_size=32, gaussian_blur=0.0)
    dataloader = two_views(args, BYOLTransform(*views))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = BYOL().to(device)
    mixup = MomentumMixup(kappa=2.0)  # new
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06)

    for epoch in range(args.epochs):
        total_loss = 0.0
        momentum = cosine_schedule(epoch, args.epochs, 0.996, 1)
        for batch in dataloader:
            x0, x1 = (view.to(device) for view in batch[0])
            model.update_momentum(momentum)
            target0, target1 = (targets_of(model.forward_momentum(x)) for x in (x0, x1))
            loss = (distance(model(x0), target1) + distance(model(x1), target0)) / 2
            mixed, (theta, partner) = mixup(x0, x1)  # new
            target = target1[partner].lerp(target1, theta[:, None])  # new
            loss = (loss + distance(model(mixed), target)) / 2  # new
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total_loss += loss.detach()
        print(f"epoch {epoch}: mean loss {total_loss / len(dataloader):.4f}")


if __name__ == "__main__":
    main()
