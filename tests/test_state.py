"""What advances queue and step, and what does not: a plain model follows every action; activation checkpointing."""

import copy
import functools
import pickle
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from lightly.loss import NTXentLoss
from torch.utils import checkpoint as checkpointing
from torch.utils.checkpoint import checkpoint

from slr_plugin import CosineConfidence, SLRLoss

pytestmark = pytest.mark.filterwarnings("ignore:one sample and no queue")

SIZE, DIM = 5, 4


def features(seed, count=3, grad=False):
    return torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)


class Criterion(RuleBasedStateMachine):
    """Drives a loss and a list of rows, a pointer and a step through the same actions."""

    @initialize(kind=st.sampled_from(["queue", "own positive", "one direction", "both views"]), schedule=st.booleans())
    def build(self, kind, schedule):
        confidence = CosineConfidence(0.5, 2.0, 7) if schedule else 1.0
        options = {"own positive": {"in_batch_keys": False}, "one direction": {"symmetric": False}}.get(kind, {})
        size = (SIZE, DIM) if kind in ("queue", "own positive") else 0
        self.criterion = SLRLoss(0.2, size, confidence=confidence, **options)
        self.saved = None
        self.dtype = torch.float32
        self.adopt(0)

    def adopt(self, step):
        """Begin again from the rows that a fresh queue has."""
        bank = self.criterion.memory_bank
        self.rows, self.pointer, self.step = [row.clone() for row in bank.bank], 0, step

    @rule(
        seed=st.integers(0, 999),
        count=st.integers(1, 7),
        mode=st.sampled_from(["grad", "no_grad", "inference_mode", "eval", "autocast", "constant"]),
        update=st.sampled_from([None, None, True, False]),
        finite=st.sampled_from([True, True, True, False]),
    )
    def call(self, seed, count, mode, update, finite):
        queries, keys = features(seed, count, mode != "constant"), features(seed + 1000, count)
        if not finite:
            keys[0, 0] = torch.inf
        around = {
            "no_grad": torch.no_grad,
            "inference_mode": torch.inference_mode,
            "autocast": functools.partial(torch.autocast, "cpu", torch.bfloat16),
        }.get(mode, torch.enable_grad)
        self.criterion.train(mode != "eval")
        with around():
            loss = self.criterion(queries, keys, update=update)
        assert bool(loss.isfinite()) == finite
        if loss.requires_grad:
            loss.backward()
        advances = mode in ("grad", "eval", "autocast") if update is None else update
        if advances and finite:
            self.step += 1
            for row in F.normalize(keys, dim=1) if self.rows else []:
                self.rows[self.pointer] = row.to(self.dtype)
                self.pointer = (self.pointer + 1) % SIZE

    @rule(seed=st.integers(0, 999), mode=st.sampled_from([torch.no_grad, torch.inference_mode, torch.enable_grad]))
    def look_at_labels(self, seed, mode):
        with mode():
            labels = self.criterion.labels(features(seed, grad=True), features(seed + 1000))
        torch.testing.assert_close(labels.sum(1), torch.ones(len(labels)))

    @rule(
        bad=st.sampled_from(
            [
                lambda c: c(features(0, grad=True), features(1, count=4)),
                lambda c: c(features(0, grad=True), features(1), features(2)),
                lambda c: c(features(0, grad=True)[:, :0], features(1)[:, :0]),
                lambda c: c.set_step(-1),
                lambda c: setattr(c, "temperature", 0),
                lambda c: setattr(c, "confidence", -1),
                lambda c: setattr(c, "symmetric", 2),
            ]
        )
    )
    def fail(self, bad):
        with pytest.raises((ValueError, TypeError)):
            bad(self.criterion)

    @rule(name=st.sampled_from(["temperature", "sharpening", "refined_weight", "confidence"]), value=st.floats(0.1, 1))
    def assign(self, name, value):
        setattr(self.criterion, name, value)
        assert getattr(self.criterion, name) == value

    @rule(way=st.sampled_from([copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))]))
    def go_on_with_a_copy(self, way):
        left = self.criterion
        self.criterion = way(left)
        left(features(1, grad=True), features(2))  # of which the copy sees nothing

    @rule()
    def save(self):
        self.saved = copy.deepcopy(self.criterion.state_dict()), [*self.rows], self.pointer, self.step

    @rule(assign=st.booleans())
    def load(self, assign):
        if self.saved:
            state, rows, self.pointer, self.step = self.saved
            self.criterion.load_state_dict(copy.deepcopy(state), assign=assign)
            if assign and rows:
                self.dtype = state["memory_bank.bank"].dtype
            self.rows = [row.to(self.dtype) for row in rows]

    @rule(dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    def convert(self, dtype):
        self.criterion.to(dtype)
        self.dtype = dtype
        self.rows = [row.to(dtype) for row in self.rows]

    @rule(step=st.integers(0, 20))
    def set_step(self, step):
        self.criterion.set_step(step)
        self.step = step

    @rule()
    def reset(self):
        self.criterion.reset_parameters()
        self.adopt(0)

    @rule()
    def leave_and_return_by_the_meta_device(self):
        self.criterion.to("meta")
        with pytest.raises(RuntimeError, match="to_empty"):
            self.criterion(features(0, grad=True), features(1))
        with pytest.raises(RuntimeError, match="to_empty"):
            self.criterion.labels(features(0), features(1))
        self.criterion.to_empty(device="cpu")
        self.adopt(0)

    @invariant()
    def agrees(self):
        assert self.criterion.step == self.step
        bank = self.criterion.memory_bank
        assert bank.bank_ptr == self.pointer
        if self.rows:
            torch.testing.assert_close(bank.bank, torch.stack(self.rows))
            torch.testing.assert_close(
                bank.bank.norm(dim=1).float(), torch.ones(SIZE), rtol=0, atol=0.02
            )  # as bfloat16


Criterion.TestCase.settings = settings(
    max_examples=25,
    stateful_step_count=15,
    derandomize=True,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestCriterionAgainstAPlainModel = Criterion.TestCase


# ------------------------------------------------------------------------------------------- activation checkpointing

KINDS = {
    "queue": lambda: SLRLoss(0.2, (32, 16)),
    "own positive": lambda: SLRLoss(0.2, (32, 16), in_batch_keys=False),
    "queue, schedule": lambda: SLRLoss(0.2, (32, 16), confidence=CosineConfidence(0.0, 5.0, 4)),
    "queue, callable": lambda: SLRLoss(0.2, (32, 16), confidence=lambda step: 1.0 + step),
    "schedule": lambda: SLRLoss(0.2, confidence=CosineConfidence(0.0, 5.0, 4)),
    "neither": lambda: SLRLoss(0.2),
}
WAYS = {
    "plain": lambda step, *views: step(*views),
    "reentrant": functools.partial(checkpoint, use_reentrant=True),
    "not reentrant": functools.partial(checkpoint, use_reentrant=False),
}
if hasattr(checkpointing, "create_selective_checkpoint_contexts"):  # torch 2.4 has none
    WAYS["selective"] = functools.partial(
        checkpoint,
        use_reentrant=False,
        context_fn=functools.partial(
            checkpointing.create_selective_checkpoint_contexts, [torch.ops.slr_plugin.softmax_stats.default]
        ),
    )
MOVED_ON = "checkpoint the encoder without the loss"


def train(build, way, calls=1, between=None):
    """Two steps; the gradients of both and what the criterion holds afterwards."""
    torch.manual_seed(0)
    criterion, encoder = build(), torch.nn.Linear(16, 16)
    gradients = []
    for step in range(2):
        encoder.zero_grad()
        losses = []
        for call in range(calls):
            x, k = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(10 * step + call))
            x.requires_grad_()
            losses.append(WAYS[way](lambda x, k: criterion(encoder(x), k), x, k))
            if between:
                between(criterion, encoder(x), k)
        sum(losses).backward()
        gradients.append(encoder.weight.grad.clone())
    return torch.stack(gradients), criterion.state_dict()


def log(criterion, queries, keys):
    with torch.no_grad():
        criterion(queries, keys)


def train_elsewhere(criterion, queries, keys):
    criterion(queries.detach().flip(0).requires_grad_(), keys.flip(1))


@pytest.mark.parametrize("between", [None, log, train_elsewhere], ids=["alone", "logged", "another call"])
@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("way", [way for way in WAYS if way != "plain"])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_gives_the_plain_gradient_once_or_says_what_to_do(kind, way, calls, between):
    alone = calls == 1 and between is not train_elsewhere
    if kind != "neither" and not (way == "reentrant" and alone):
        with pytest.raises(RuntimeError, match=MOVED_ON):
            train(KINDS[kind], way, calls, between)
        return
    expected, got = (train(KINDS[kind], name, calls, between) for name in ("plain", way))
    torch.testing.assert_close(got[0], expected[0])
    for name, value in expected[1].items():
        torch.testing.assert_close(got[1][name], value)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("update", [None, True, False])
def test_a_checkpointed_call_without_queue_and_schedule_counts_once(update, use_reentrant):
    criterion, x = SLRLoss(0.2), torch.randn(8, 16, requires_grad=True)
    checkpoint(lambda x: criterion(x, x.flip(1), update=update), x, use_reentrant=use_reentrant).backward()
    assert criterion.step == (update is not False)


@pytest.mark.parametrize("between", [None, log], ids=["alone", "logged"])
def test_reentrant_checkpointing_is_no_worse_than_ntxents(between):
    def ntxent():
        return NTXentLoss(0.2, (32, 16))

    def ours():
        return SLRLoss(0.2, (32, 16), in_batch_keys=False, confidence=0.0)

    for build in (ntxent, ours):
        torch.testing.assert_close(train(build, "reentrant", 1, between), train(build, "plain", 1, between))
    torch.testing.assert_close(train(ours, "reentrant")[0], train(ntxent, "plain")[0])


def test_checkpointing_a_call_that_is_not_finite_gives_a_gradient_that_is_not():
    criterion, encoder = SLRLoss(0.2, (32, 16)), torch.nn.Linear(16, 16)
    x, k = torch.randn(8, 16, requires_grad=True), torch.full((8, 16), torch.nan)
    checkpoint(lambda x, k: criterion(encoder(x), k), x, k, use_reentrant=True).backward()
    assert encoder.weight.grad.isnan().all()
    assert criterion.step == 0


def test_a_checkpointed_call_without_update_sees_the_queue_of_its_forward_or_raises():
    criterion, encoder = SLRLoss(0.2, (32, 16)), torch.nn.Linear(16, 16)
    x, k = torch.randn(2, 8, 16, requires_grad=True)
    views = x, k.detach()

    def step(x, k):
        return criterion(encoder(x), k, update=False)

    for reentrant in (True, False):
        encoder.zero_grad()
        step(*views).backward()
        plain = encoder.weight.grad.clone()
        encoder.zero_grad()
        checkpoint(step, *views, use_reentrant=reentrant).backward()
        torch.testing.assert_close(encoder.weight.grad, plain)
        loss = checkpoint(step, *views, use_reentrant=reentrant)
        criterion(encoder(x), k.detach())
        with pytest.raises(RuntimeError, match=MOVED_ON):
            loss.backward()


def test_a_reset_leaves_a_temperature_that_is_no_parameter_to_its_owner():
    temperature = torch.tensor(0.2)
    criterion = SLRLoss(temperature)
    temperature.fill_(0.7)
    criterion.reset_parameters()
    assert criterion.temperature is temperature
    torch.testing.assert_close(temperature, torch.tensor(0.7))


def test_a_reset_under_a_default_device_without_values():
    criterion = SLRLoss(0.2, (8, 4))
    with torch.device("meta"):
        criterion.reset_parameters()
    torch.testing.assert_close(criterion.memory_bank.bank.norm(dim=1), torch.ones(8))


def test_a_confidence_that_is_a_module_can_be_replaced():
    class Ramp(torch.nn.Module):
        def forward(self, step):
            return 0.5 * step

    views = torch.randn(2, 4, 4)
    criterion, twin = SLRLoss(0.2, confidence=Ramp()), SLRLoss(0.2, confidence=0.5)
    criterion.set_step(1)
    torch.testing.assert_close(criterion(*views), twin(*views))
    with pytest.raises(ValueError, match="confidence"):
        criterion.confidence = -1.0
    torch.testing.assert_close(criterion(*views), twin(*views))
    criterion.confidence = 0.25
    twin.confidence = 0.25
    torch.testing.assert_close(criterion(*views), twin(*views))


@pytest.fixture
def threads_that_take_turns():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def test_two_threads_may_call_one_loss(threads_that_take_turns):
    criterion, errors = SLRLoss(0.2, (1000, 16)), []

    def work():
        try:
            for _ in range(100):
                criterion(torch.randn(8, 16, requires_grad=True), torch.randn(8, 16)).backward()
        except RuntimeError as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
