"""Uses that compute something else than is meant warn once; correct ones never do."""

import copy

import pytest
import torch

from slr_plugin import CosineConfidence, MomentumMixup, SLRLoss
from slr_plugin.functional import slr_loss

S, D, N = 64, 8, 128
ALONE = "one sample and no queue leave no negative"

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(autouse=True)
def _seeded(one_thread):
    torch.manual_seed(0)


@pytest.fixture
def encoder():
    return torch.nn.Linear(D, D)


def views(size=S, alike=0.5):
    image = torch.randn(size, D)
    return [image + alike * torch.randn(size, D) for _ in range(2)]


def both_directions(first, second, encoder, x0, x1, **last):
    """MoCo v3's symmetric loss, the keys by the same network."""
    with torch.no_grad():
        keys = [encoder(x) for x in (x0, x1)]
    return first(encoder(x0), keys[1], **last) + second(encoder(x1), keys[0])


def summed_batches(criterion, encoder):
    losses = [criterion(encoder(x0), encoder(x1).detach()) for x0, x1 in (views() for _ in range(3))]
    torch.stack(losses).mean().backward()


def two_losses(criterion, encoder):
    both_directions(criterion, copy.deepcopy(criterion), encoder, *views()).backward()


def update_once(criterion, encoder):
    both_directions(criterion, criterion, encoder, *views(), update=False).backward()


def one_backward_each(criterion, encoder):
    x0, x1 = views()
    for queries, keys in ((x0, x1), (x1, x0)):
        criterion(encoder(queries), encoder(keys).detach()).backward()


def mixed_queries(criterion, encoder):
    x0, x1 = views()
    mixed, mix = MomentumMixup()(x0, x1)
    criterion(encoder(x0), encoder(x1).detach(), encoder(mixed), mix).backward()


def a_loss_for_a_log_line(criterion, encoder):
    x0, x1 = views()
    loss = criterion(encoder(x0), encoder(x1).detach())
    with torch.no_grad():
        criterion(encoder(x1), encoder(x0))
    loss.backward()


def one_sample_beside_a_queue(criterion, encoder):
    criterion(encoder(torch.randn(1, D)), torch.randn(1, D)).backward()


CORRECT = [
    summed_batches,
    two_losses,
    update_once,
    one_backward_each,
    mixed_queries,
    a_loss_for_a_log_line,
    one_sample_beside_a_queue,
]


@pytest.mark.parametrize("use", CORRECT, ids=lambda use: use.__name__)
def test_correct_uses_do_not_warn(use, encoder):
    criterion = SLRLoss(0.2, (N, D), confidence=CosineConfidence(0, 1, 10))
    for _ in range(8):
        use(criterion, encoder)


@pytest.mark.parametrize("symmetric", [None, False])
def test_one_sample_without_any_negative_warns(symmetric):
    criterion = SLRLoss(symmetric=symmetric)
    sample = torch.randn(1, D, requires_grad=True)
    criterion(sample.detach(), torch.randn(1, D))  # nothing is trained
    criterion(sample, torch.randn(1, D), negatives=torch.randn(3, D))
    with pytest.warns(UserWarning, match=ALONE):
        assert criterion(sample, torch.randn(1, D)) == 0
    with pytest.warns(UserWarning, match=ALONE):
        slr_loss(sample, torch.randn(1, D), symmetric=symmetric)


def test_the_warning_points_at_the_caller():
    with pytest.warns(UserWarning, match=ALONE) as record:
        SLRLoss()(torch.randn(1, D, requires_grad=True), torch.randn(1, D))
    assert record[0].filename == __file__
