"""Fewer cases than a full product of settings, where only pairs of them can work together."""

import itertools
from collections.abc import Callable, Iterable


def pairwise(*choices: Iterable, allowed: Callable[..., bool] = lambda *case: True) -> list[tuple]:
    """Cases of one choice of each kind, in which every two choices of different kinds occur together."""
    cases = [case for case in itertools.product(*choices) if allowed(*case)]
    pairs = [set(itertools.combinations(enumerate(case), 2)) for case in cases]
    missing, chosen = set().union(*pairs), []
    while missing:
        best = max(range(len(cases)), key=lambda number: len(pairs[number] & missing))
        missing -= pairs[best]
        chosen.append(best)
    return [cases[number] for number in sorted(chosen)]
