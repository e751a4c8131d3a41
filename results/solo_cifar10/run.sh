#!/bin/bash
# Eight runs on a CPU, two at a time, one thread each. Usage: results/solo_cifar10/run.sh SOLO_LEARN_CLONE DIR, with
# DIR/train and DIR/test of CIFAR-10's images. Then: python results/solo_cifar10/table.py outputs/solo_cifar10/*.json
set -euo pipefail
cd "$(dirname "$0")/../.."
SOLO_LEARN_DIR=$(realpath "$1")
export SOLO_LEARN_DIR OMP_NUM_THREADS=1
images=outputs/solo_cifar10/images

# The first 500 training and 200 test images of every class.
.venv/bin/python - "$2" $images <<'PYTHON'
import sys
from pathlib import Path

source, target = map(Path, sys.argv[1:])
for split, count in (("train", 500), ("test", 200)):
    for folder in sorted((source / split).iterdir()):
        (target / split / folder.name).mkdir(parents=True, exist_ok=True)
        for image in sorted(folder.iterdir())[:count]:
            link = target / split / folder.name / image.name
            if not link.is_symlink():
                link.symlink_to(image.resolve())
PYTHON

pretrain() { # CONFIG_PATH CONFIG_NAME METHOD SEED: the shipped settings but for scale, alike for all methods
    .venv/bin/python -W ignore results/solo_cifar10/pretrain.py --config-path "$1" --config-name "$2" \
        "name=$3-$4" "+seed=$4" backbone.name=small_resnet9 max_epochs=40 optimizer.batch_size=128 \
        ++method_kwargs.queue_size=2048 data.dataset=custom "data.train_path=$images/train" \
        "data.val_path=$images/test" data.num_workers=0 +knn_eval.enabled=True +knn_eval.k=50 \
        +knn_eval.distance_func=cosine accelerator=cpu "devices='1'" strategy=auto sync_batchnorm=False \
        precision=bf16-mixed wandb.enabled=False auto_resume.enabled=False checkpoint.dir=outputs/solo_cifar10 \
        +default_root_dir=outputs/solo_cifar10/logs +enable_progress_bar=False
}

all() { # SEED
    for method in mocov2plus ressl nnclr; do
        pretrain "$SOLO_LEARN_DIR/scripts/pretrain/cifar" $method.yaml $method "$1"
    done
    pretrain pkg://slr_plugin.adapters.solo_learn.configs sane-cifar10 sane "$1"
}

all 0 &
all 1 &
wait
