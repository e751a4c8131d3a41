"""The module of lightly_lightning.py in several processes: one per GPU, or two on the CPU.

    python examples/lightly_distributed.py --data DIR    images as DIR/<class>/*; without --data, CIFAR-10 is downloaded

What DDP adds to the method: the keys of all processes are gathered, so that loss, gradient and queue are those of one
process with the whole batch; each process mixes by draws of its own; and keys are encoded in minibatches shuffled
across processes, so that batch normalisation cannot give the positive away.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytorch_lightning as pl
import torch
from lightly.models.utils import batch_shuffle, batch_unshuffle
from lightly.transforms import MoCoV2Transform
from lightly_data import options, two_views
from lightly_lightning import MoCo
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor

from slr_plugin import MomentumMixup


class DistributedMoCo(MoCo):
    """MoCo that trains in several processes as in one."""

    def __init__(self) -> None:
        super().__init__(gather_distributed=True)

    def on_fit_start(self) -> None:
        """The rank is known here: processes that share a seed would all mix alike."""
        super().on_fit_start()
        seed = (self.global_rank << 32) + torch.initial_seed() % 2**32
        generator = torch.Generator(self.device).manual_seed(seed)
        self.mixup = MomentumMixup(kappa=2.0, generator=generator)

    def forward_momentum(self, x: Tensor) -> Tensor:
        """Keys, (s, 128), in the order of ``x``."""
        x, shuffle = batch_shuffle(x, distributed=True)
        return batch_unshuffle(super().forward_momentum(x), shuffle, distributed=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Pretrain; Lightning starts this script again for every further process."""
    parser = options(__doc__)
    devices = torch.cuda.device_count() or 2
    parser.add_argument("--devices", type=int, default=devices, help="processes (default here: %(default)s)")
    args = parser.parse_args(argv)
    dataloader = two_views(args, MoCoV2Transform(input_size=32, gaussian_blur=0.0), processes=args.devices)
    trainer = pl.Trainer(
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        strategy="ddp",
        devices=args.devices,
        max_epochs=args.epochs,
        logger=CSVLogger("outputs"),
    )
    trainer.fit(DistributedMoCo(), dataloader)


if __name__ == "__main__":
    main()
