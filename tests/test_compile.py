"""torch.compile takes a training step with the loss in it as one graph and computes the same."""

import copy
import shutil

import pytest
import torch
from lightly.loss import NTXentLoss
from torch._dynamo.testing import CompileCounter

from slr_plugin import CosineConfidence, MomentumMixup, SLRLoss

# Inductor needs a C++ compiler; everything up to it (tracing, autograd, functionalisation) does not.
BACKENDS = ["aot_eager", *(["inductor"] if shutil.which("g++") else [])]

# Warnings that torch's own compiler gives about itself.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::DeprecationWarning")


class Step(torch.nn.Module):
    """An encoder with the criterion on top."""

    def __init__(self, memory_bank_size, mixed):
        super().__init__()
        self.encoder = torch.nn.Linear(8, 4)
        self.mixed = mixed
        self.criterion = SLRLoss(
            0.2, memory_bank_size, sharpening=0.7, confidence=CosineConfidence(0.5, 2.0, total_steps=4)
        )

    def forward(self, x0, x1, mixed, mix):
        queries = self.encoder(x0)
        keys = self.encoder(x1) if not len(self.criterion.memory_bank) else self.encoder(x1).detach()
        return self.criterion(queries, keys, self.encoder(mixed), mix) if self.mixed else self.criterion(queries, keys)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("memory_bank_size", "mixed", "backend"),
    [((10, 4), True, BACKENDS[-1]), ((10, 4), False, "aot_eager"), (0, False, BACKENDS[-1])],
)
def test_a_compiled_training_step_equals_the_eager_one(memory_bank_size, mixed, backend):
    torch.manual_seed(0)
    eager = Step(memory_bank_size, mixed)
    twin = copy.deepcopy(eager)
    compiled = torch.compile(twin, fullgraph=True, backend=backend)
    for _ in range(4):
        x0, x1 = torch.randn(2, 6, 8)
        mixed_images, mix = MomentumMixup(2.0)(x0, x1)
        losses = [model(x0, x1, mixed_images, mix) for model in (eager, compiled)]
        torch.testing.assert_close(*losses, rtol=0, atol=1e-5)
        for model, loss in zip((eager, twin), losses, strict=True):
            model.zero_grad()
            loss.backward()
        torch.testing.assert_close(eager.encoder.weight.grad, twin.encoder.weight.grad, rtol=0, atol=1e-5)
    for name, value in eager.criterion.state_dict().items():
        torch.testing.assert_close(twin.criterion.state_dict()[name], value)
    torch.testing.assert_close(eager.criterion.stats, twin.criterion.stats, rtol=0, atol=1e-5)
    assert twin.criterion.step == 4


def test_graph_breaks_none_where_ntxent_has_some():
    queries, keys = torch.randn(6, 4, requires_grad=True), torch.randn(6, 4)
    ours = torch._dynamo.explain(SLRLoss(0.2, (10, 4)))(queries, keys)
    torch.compiler.reset()
    theirs = torch._dynamo.explain(NTXentLoss(0.2, (10, 4)))(queries, keys)
    assert ours.graph_break_count == 0 < theirs.graph_break_count


@pytest.mark.parametrize(
    ("settings", "extra"),
    [
        ({"memory_bank_size": (10, 4)}, {"negatives": torch.randn(3, 4)}),
        ({"memory_bank_size": (10, 4), "in_batch_keys": False}, {"negatives": torch.randn(3, 4)}),
        ({}, {"negatives": torch.randn(3, 4)}),
        ({"symmetric": False}, {}),
        ({"memory_bank_size": (10, 4), "estimator_dim": 2}, {"estimator": torch.randn(6, 2)}),
    ],
)
def test_every_key_set_is_one_graph_and_computes_the_same(settings, extra):
    torch.manual_seed(0)
    eager = SLRLoss(0.2, sharpening=0.7, **settings)
    compiled = torch.compile(copy.deepcopy(eager), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        queries, keys = torch.randn(6, 4, requires_grad=True), torch.randn(6, 4)
        results = []
        for criterion in (eager, compiled):
            loss = criterion(queries, keys, **extra)
            results.append((loss.detach(), *torch.autograd.grad(loss, queries)))
        torch.testing.assert_close(*results, rtol=0, atol=1e-5)


def graphs_of(criterion, assign, steps=5):
    """The number of graphs that were compiled after each step."""
    counter = CompileCounter()
    compiled = torch.compile(criterion, backend=counter)
    counts = []
    for step in range(steps):
        assign(step)
        compiled(torch.randn(6, 4, requires_grad=True), torch.randn(6, 4))
        counts.append(counter.frame_count)
    return counts


@pytest.mark.parametrize("name", ["confidence", "temperature"])
def test_settings_that_change_at_every_step_compile_nothing_anew(name):
    if name == "confidence" and torch.__version__ < "2.5":
        pytest.skip("torch 2.4 compiles anew for every new value of an attribute")
    criterion = SLRLoss(0.2, (10, 4))
    value = (lambda step: 0.1 + 0.1 * step) if name == "confidence" else (lambda step: torch.tensor(0.1 + 0.1 * step))
    counts = graphs_of(criterion, lambda step: setattr(criterion, name, value(step)))
    assert counts[1:] == [counts[1]] * 4
    if name == "confidence":
        assert criterion.stats["mu"].item() == pytest.approx(0.5)


@pytest.mark.parametrize(("dynamic", "backend"), [(None, BACKENDS[-1]), (True, "aot_eager")])
def test_losses_with_other_schedules_compile_beside_each_other(backend, dynamic):
    """The second one's numbers become dynamic."""
    for schedule in (CosineConfidence(0.0, 1.0, 5), CosineConfidence(0.5, 10.0, 5)):
        eager = SLRLoss(0.2, (8, 6), confidence=schedule)
        compiled = torch.compile(copy.deepcopy(eager), dynamic=dynamic, backend=backend)
        queries, keys = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6)
        for _ in range(2):
            torch.testing.assert_close(compiled(queries, keys), eager(queries, keys))


def test_training_goes_on_after_a_compiled_call_in_inference_mode():
    criterion = SLRLoss(0.2, (16, 8))
    queries, keys = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8)
    with torch.inference_mode():
        torch.compile(criterion, backend="aot_eager")(queries, keys, update=True)
    criterion(queries, keys).backward()
    assert criterion.step == 2
    assert criterion.memory_bank.bank_ptr == 8


@pytest.mark.parametrize("options", [{"confidence": 0.0}, {"confidence": 1.0}, {"memory_bank_size": (16, 8)}])
def test_a_compiled_loss_with_a_learnable_temperature_has_the_eager_gradients(options):
    eager = SLRLoss(torch.nn.Parameter(torch.tensor(0.2)), **options)
    compiled = torch.compile(copy.deepcopy(eager), fullgraph=True, backend="aot_eager")
    queries, keys = (torch.randn(4, 8, requires_grad=True) for _ in range(2))
    gradients = []
    for criterion in (compiled, eager):
        criterion(queries, keys).backward()
        gradients.append([queries.grad, keys.grad, criterion.temperature.grad])
        queries.grad = keys.grad = None
    torch.testing.assert_close(*gradients)
