"""What several test modules share."""

import pytest
import torch

collect_ignore = ["_solo_learn.py"]  # for doctests, of which it has none; it needs a clone of solo-learn


@pytest.fixture
def one_thread():
    """Small tensors: a second thread costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
