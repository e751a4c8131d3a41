"""SimCLR in plain PyTorch on lightly's parts: NTXentLoss swapped, nothing else.

    python examples/lightly_simclr.py --data DIR    images as DIR/<class>/*; without --data, CIFAR-10 is downloaded

The lines marked ``was`` are all that separates it from the same script with NTXentLoss. There is no queue: the loss is
symmetric in the two views, and both are trained. Value and gradient are NTXentLoss's, in less memory. Without
``confidence=0.0`` each view refines the other's labels, which is another loss.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from lightly_data import options, two_views
from torch import Tensor, nn
from torchvision.models import resnet18

from slr_plugin import SLRLoss  # was: from lightly.loss import NTXentLoss


class SimCLR(nn.Module):
    """Backbone and projection head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = resnet18()
        self.backbone.fc = nn.Identity()  # 512 features
        self.projection_head = SimCLRProjectionHead(512, 512, 128)

    def forward(self, x: Tensor) -> Tensor:
        """Projected features, (s, 128)."""
        return self.projection_head(self.backbone(x))


def main(argv: Sequence[str] | None = None) -> None:
    """Pretrain, and print each epoch's mean loss."""
    args = options(__doc__).parse_args(argv)
    dataloader = two_views(args, SimCLRTransform(input_size=32, gaussian_blur=0.0))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = SimCLR().to(device)

    criterion = SLRLoss(confidence=0.0)  # was: NTXentLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06)

    for epoch in range(args.epochs):
        total_loss = 0.0
        for batch in dataloader:
            x0, x1 = (view.to(device) for view in batch[0])
            loss = criterion(model(x0), model(x1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total_loss += loss.detach()
        print(f"epoch {epoch}: mean loss {total_loss / len(dataloader):.4f}")


if __name__ == "__main__":
    main()
