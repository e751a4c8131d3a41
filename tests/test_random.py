"""Seeds of the mixing: each run, process and continuation draws its own."""

import torch

from slr_plugin.adapters import _run


def test_no_two_runs_processes_or_continuations_share_draws(monkeypatch):
    seen = set()
    for seed in (0, 1, 2):
        for process in (0, 1):
            for step in (0, 1):
                torch.manual_seed(seed)
                monkeypatch.setattr(_run, "rank", lambda process=process: process)
                mixing = _run.mixing_generator(step).initial_seed()
                assert _run.mixing_generator(step).initial_seed() == mixing
                seen.add(mixing)
    assert len(seen) == 12
