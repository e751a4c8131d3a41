"""MoCo in plain PyTorch with the whole method: refined labels and momentum mixup, on lightly's parts.

    python examples/lightly_moco.py --data DIR    images as DIR/<class>/*; without --data, CIFAR-10 is downloaded

The lines marked ``new`` are all that separates it from the same script with ``NTXentLoss(0.2, (4096, 128))``. That loss
itself is ``SLRLoss(0.2, (4096, 128), confidence=0.0, in_batch_keys=False)``. Keep the queue shorter than the data set.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from lightly.models.modules import MoCoProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms import MoCoV2Transform
from lightly.utils.scheduler import cosine_schedule
from lightly_data import options, two_views
from torch import Tensor, nn
from torchvision.models import resnet18

from slr_plugin import CosineConfidence, MomentumMixup, SLRLoss  # new


class MoCo(nn.Module):
    """Backbone and projection head, and their moving averages."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = resnet18()
        self.backbone.fc = nn.Identity()  # 512 features
        self.projection_head = MoCoProjectionHead(512, 512, 128)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        for module in (self.backbone_momentum, self.projection_head_momentum):
            deactivate_requires_grad(module)

    def forward(self, x: Tensor) -> Tensor:
        """Queries, (s, 128)."""
        return self.projection_head(self.backbone(x))

    @torch.no_grad()
    def forward_momentum(self, x: Tensor) -> Tensor:
        """Keys, (s, 128)."""
        return self.projection_head_momentum(self.backbone_momentum(x))

    def update_momentum(self, m: float) -> None:
        """Move the averages: m of themselves, 1 - m of the trained weights."""
        update_momentum(self.backbone, self.backbone_momentum, m=m)
        update_momentum(self.projection_head, self.projection_head_momentum, m=m)


def main(argv: Sequence[str] | None = None) -> None:
    """Pretrain, and print each epoch's mean loss."""
    args = options(__doc__).parse_args(argv)
    dataloader = two_views(args, MoCoV2Transform(input_size=32, gaussian_blur=0.0))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = MoCo().to(device)

    confidence = CosineConfidence(start=0.0, end=1.0, total_steps=args.epochs * len(dataloader))  # new
    criterion = SLRLoss(0.2, (4096, 128), sharpening=0.8, confidence=confidence).to(device)  # new: refined labels
    mixup = MomentumMixup(kappa=2.0)  # new
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06)

    for epoch in range(args.epochs):
        total_loss = 0.0
        momentum = cosine_schedule(epoch, args.epochs, 0.996, 1)
        for batch in dataloader:
            x_query, x_key = (view.to(device) for view in batch[0])
            mixed, mix = mixup(x_query, x_key)  # new
            model.update_momentum(momentum)
            key = model.forward_momentum(x_key)
            loss = criterion(model(x_query), key, model(mixed), mix)  # new: model(mixed), mix
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total_loss += loss.detach()
        print(f"epoch {epoch}: mean loss {total_loss / len(dataloader):.4f}")


if __name__ == "__main__":
    main()
