"""solo-learn's own main_pretrain.py at the scale of a CPU: a small encoder, images judged at 32 x 32 pixels.

Everything else (methods, losses, schedules, augmentation, evaluation) is solo-learn's. See run.sh for its use, with a
clone of solo-learn named by SOLO_LEARN_DIR.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.resnet import BasicBlock, ResNet
from torch import nn
from torchvision import transforms

sys.path.insert(0, os.environ["SOLO_LEARN_DIR"])

from main_pretrain import main
from solo.data import classification_dataloader
from solo.methods.base import BaseMethod


def small_resnet9(method: str, **kwargs: Any) -> nn.Module:
    """A ResNet with one block per stage, of width 16 to 128, and a stem for small images."""
    network = ResNet(BasicBlock, (1, 1, 1, 1), num_classes=0, channels=(16, 32, 64, 128), stem_width=16, **kwargs)
    network.conv1 = nn.Conv2d(3, network.conv1.out_channels, kernel_size=3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    network.num_features = 128
    return network


def images_as_they_are() -> dict[str, transforms.Compose]:
    """What solo-learn asks users to rewrite for their own data: its default shows them at 224 x 224 pixels."""
    plain = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)]
    )
    return {"T_train": plain, "T_val": plain}


def keep_figures(module: BaseMethod) -> None:
    """Write what every epoch's validation found, as <checkpoint.dir>/<name>.json; a hook of Lightning's."""
    if module.trainer.sanity_checking:
        return
    logged = module.trainer.callback_metrics.items()
    figures = {name: float(value) for name, value in logged if name.startswith(("val_", "train_slr_"))}
    epochs.append({"epoch": module.trainer.current_epoch, "seconds": time.time() - started, **figures})
    path = Path(module.cfg.checkpoint.dir) / f"{module.cfg.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    run = {"method": module.cfg.method, "seed": module.cfg.seed, "epochs": epochs}
    path.write_text(json.dumps(run, indent=1))


if __name__ == "__main__":
    epochs: list[dict[str, float]] = []
    started = time.time()
    BaseMethod.on_validation_end = keep_figures
    BaseMethod._BACKBONES["small_resnet9"] = small_resnet9
    classification_dataloader.build_custom_pipeline = images_as_they_are
    main()
