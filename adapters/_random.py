"""Random generators: seeded for mixing, and their state as plain values, so that checkpoints load with weights_only."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import distributed as dist

from slr_plugin.distributed import rank, world_size


def seed_mixing(generator: torch.Generator, step: int) -> None:
    """Seed by the global seed, the process, and the step at which a run begins or goes on."""
    seed = np.random.SeedSequence([torch.initial_seed(), rank(), step])
    generator.manual_seed(int(seed.generate_state(1, np.uint64)[0] >> 1))


def random_state(*generators: torch.Generator) -> dict[str, Any]:
    """The state of this process: torch, CUDA, numpy, Python, and ``generators``."""
    state: tuple[Any, ...] = np.random.get_state(legacy=True)  # type: ignore[assignment]
    name, keys, *position = state
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": [name, keys.tolist(), *position],
        "python": random.getstate(),
        "generators": [generator.get_state() for generator in generators],
    }


def set_random_state(state: dict[str, Any], *generators: torch.Generator) -> None:
    """Restore what :func:`random_state` returned."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
    np.random.set_state(tuple(state["numpy"]))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    for generator, stored in zip(generators, state["generators"], strict=True):
        generator.set_state(stored.cpu())


def gather_random_states(*generators: torch.Generator) -> list[dict[str, Any]]:
    """The states of all processes, in the order of ranks. All processes must call it."""
    state = random_state(*generators)
    if world_size() == 1:
        return [state]
    states: list[dict[str, Any]] = [{}] * world_size()
    dist.all_gather_object(states, state)
    return states
