"""A pytest plugin that puts SLRLoss in NTXentLoss's place, for lightly's own unmodified test file.

make test-lightly CLONE=path/to/a/clone/of/lightly
"""

import functools

import lightly.loss

from slr_plugin import SLRLoss

lightly.loss.NTXentLoss = functools.partial(SLRLoss, confidence=0.0, in_batch_keys=False)
