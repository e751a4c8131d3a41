"""What several test modules share."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes: with more threads than cores all wait for all
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch; for processes that tests start, too

import pytest
import torch
from _intra_op import intra_op_threads
from torch._subclasses.fake_tensor import FakeTensorMode

collect_ignore = [
    "_metric_learning.py",
    "_open_clip.py",
    "_sentences.py",
    "_solo_learn.py",
    "_stable_pretraining.py",
]  # for doctests, of which they have none; they need what they are for


@pytest.fixture
def one_thread():
    """Small tensors: a second thread costs more than it brings."""
    with intra_op_threads(1):
        yield


@pytest.fixture
def unseeded(monkeypatch):
    """No trace of Lightning's seed_everything, from which its trainers and loaders would take orders."""
    for name in ("PL_SEED_WORKERS", "PL_GLOBAL_SEED"):
        monkeypatch.setenv(name, "0")  # so that it is removed or restored afterwards
        monkeypatch.delenv(name)


@pytest.fixture
def pretended_gpu():
    """A mode in which tensors on a GPU have shapes but no values; torch 2.4 cannot pretend without a driver."""
    mode = FakeTensorMode()
    try:
        with mode:
            torch.empty(2, device="cuda")[:1]
    except RuntimeError as error:
        pytest.skip(f"this torch asks for a real GPU: {str(error).splitlines()[0]}")
    return mode
