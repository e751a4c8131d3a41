"""The definitions at the top of slr_plugin/streaming/stats.py, dense."""

import math

import torch

# Of 9 rows: some see all of 14 keys, one sees all but two.
HIDDEN = torch.tensor([[2, -1], [3, -1], [4, -1], [5, 0], [1, 9], [2, 10], [-1, 11], [-1, 12], [-1, 13]])


def hidden_for(rows):
    """HIDDEN for any number of rows, of which further ones see all keys."""
    return torch.cat([HIDDEN, torch.full((max(0, rows - 9), 2), -1)])[:rows]


def dense(rows, keys, queue, scale, hidden=HIDDEN, values=None, queue_values=None):
    """Log-sum-exp, largest weight, mean, and all weights."""
    every = torch.cat([keys, queue])
    logits = scale * (rows @ every.T)
    for row, unseen in enumerate([] if hidden is None else hidden.tolist()):
        logits[row, [key for key in unseen if key >= 0]] = -torch.inf
    weights = logits.softmax(1)
    averaged = every if values is None else torch.cat([values, queue_values])
    return logits.logsumexp(1), weights.amax(1), weights @ averaged, weights


def parts(stats):
    """Softmax statistics as :func:`dense` returns them."""
    return stats.reference_bits * math.log(2) + stats.offset, stats.max_weight, stats.mean
