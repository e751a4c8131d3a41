#!/usr/bin/env bash
# What a GPU is wanted for, most wanted first. Every part keeps what it has done, so that a run which was stopped goes on.
#
#     benchmarks/on_a_gpu.sh DIR        # CIFAR-10 as DIR/train/<class>/* and DIR/test/<class>/*
set -euo pipefail
data=$(realpath "${1:?give the folder of CIFAR-10, see above}")
cd "$(dirname "$0")/.."

represent() {
    python -m benchmarks representations --data "$data" --device cuda "$@"
}

python -m pytest -q tests/test_gpu.py
python -m pytest -q tests/test_representations.py -k recorded
represent --budget cpu-long --jobs 20 --methods one-hot p+q mm sane one-hot-batch decoupled
python -m benchmarks groups --device cuda --images 8192 32768 --output results/loss/gpu
represent --budget teacher-all --methods decoupled imagenet-labels imagenet-clusters
represent --budget gpu-100 --jobs 3 --seeds 1 --methods moco sane dcl
python -m benchmarks loss --device cuda --precision high --output results/loss/gpu/high
