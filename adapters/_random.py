"""Seeds of the mixing, which every process and every run draws for itself."""

from __future__ import annotations

import numpy as np
import torch

from slr_plugin.distributed import rank


def seed_mixing(generator: torch.Generator, step: int) -> None:
    """Seed by the global seed, the process, and the step at which a run begins or goes on."""
    seed = np.random.SeedSequence([torch.initial_seed(), rank(), step])
    generator.manual_seed(int(seed.generate_state(1, np.uint64)[0] >> 1))
