#!/bin/bash
# Six runs on a CPU, two at a time, one thread each. Usage: results/lightly_cifar10/run.sh DIR, with DIR/train and
# DIR/test of CIFAR-10's images. Then: python results/lightly_cifar10/table.py outputs/lightly_cifar10/*/results.json
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1
data=$1

train() {
    .venv/bin/python -W ignore examples/lightly_cifar10.py --data "$data" --method "$1" --seed "$2" \
        --backbone resnet9 --width 0.25 --limit 5000 --epochs 60 --batch-size 128 --queue-size 2048 --knn-every 10 \
        --workers 0 --precision bf16-mixed --output "outputs/lightly_cifar10/$1-$2"
}

for seed in 0 1 2; do
    train mocov2 $seed &
    train sane $seed &
    wait
done
