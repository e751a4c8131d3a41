"""Seeds of the mixing, which every process and every run draws for itself."""

from __future__ import annotations

import numpy as np
import torch

from slr_plugin.distributed import rank


def mixing_generator(step: int) -> torch.Generator:
    """A generator with a seed of the global seed, the process, and the step at which a run begins or goes on.

    Lightning seeds all processes alike: they would all mix alike. It is made where the training begins, since none can
    be sent to the processes that a strategy spawns.
    """
    seed = np.random.SeedSequence([torch.initial_seed(), rank(), step])
    return torch.Generator().manual_seed(int(seed.generate_state(1, np.uint64)[0] >> 1))
