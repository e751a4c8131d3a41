"""MoCo as a LightningModule of your own with the whole method: refined labels and momentum mixup, on lightly's parts.

    python examples/lightly_lightning.py --data DIR    images as DIR/<class>/*; without --data, CIFAR-10 is downloaded

The lines marked ``new`` are all that separates it from the same module with ``NTXentLoss(0.2, (4096, 128))``. Keep the
queue shorter than the data set. ``slr_plugin.adapters.lightly.SANE`` is the ready-made module. The loss of each epoch
and the checkpoints go to outputs/lightning_logs.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytorch_lightning as pl
import torch
from lightly.models.modules import MoCoProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms import MoCoV2Transform
from lightly.utils.scheduler import cosine_schedule
from lightly_data import options, two_views
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn
from torchvision.models import resnet18

from slr_plugin import CosineConfidence, MomentumMixup, SLRLoss  # new


class MoCo(pl.LightningModule):
    """Backbone and projection head, their moving averages, and the loss."""

    def __init__(self, gather_distributed: bool = False) -> None:
        super().__init__()
        self.backbone = resnet18()
        self.backbone.fc = nn.Identity()  # 512 features
        self.projection_head = MoCoProjectionHead(512, 512, 128)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        for module in (self.backbone_momentum, self.projection_head_momentum):
            deactivate_requires_grad(module)

        self.criterion = SLRLoss(0.2, (4096, 128), gather_distributed, sharpening=0.8)  # new: refined labels
        self.mixup = MomentumMixup(kappa=2.0)  # new

    def on_fit_start(self) -> None:  # new
        """The labels' confidence grows from 0 to 1 over the run, whose length is known here."""
        self.criterion.confidence = CosineConfidence(0.0, 1.0, total_steps=self.trainer.estimated_stepping_batches)

    def forward(self, x: Tensor) -> Tensor:
        """Queries, (s, 128)."""
        return self.projection_head(self.backbone(x))

    @torch.no_grad()
    def forward_momentum(self, x: Tensor) -> Tensor:
        """Keys, (s, 128)."""
        return self.projection_head_momentum(self.backbone_momentum(x))

    def training_step(self, batch: list, batch_idx: int) -> Tensor:
        """The loss of a minibatch of two views."""
        momentum = cosine_schedule(self.current_epoch, self.trainer.max_epochs, 0.996, 1)
        update_momentum(self.backbone, self.backbone_momentum, m=momentum)
        update_momentum(self.projection_head, self.projection_head_momentum, m=momentum)
        x_query, x_key = batch[0]
        mixed, mix = self.mixup(x_query, x_key)  # new
        key = self.forward_momentum(x_key)
        loss = self.criterion(self(x_query), key, self(mixed), mix)  # new: self(mixed), mix
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True, sync_dist=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """As in lightly's example."""
        return torch.optim.SGD(self.parameters(), lr=0.06)


def main(argv: Sequence[str] | None = None) -> None:
    """Pretrain on one device."""
    args = options(__doc__).parse_args(argv)
    dataloader = two_views(args, MoCoV2Transform(input_size=32, gaussian_blur=0.0))
    accelerator = "gpu" if torch.cuda.is_available() else "cpu"
    trainer = pl.Trainer(accelerator, devices=1, max_epochs=args.epochs, logger=CSVLogger("outputs"))
    trainer.fit(MoCo(), dataloader)


if __name__ == "__main__":
    main()
