"""Momentum mixup."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from _devices import WithoutFloat64
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from slr_plugin import Mix, MomentumMixup

pytestmark = pytest.mark.filterwarnings("ignore:a minibatch of one sample")

SOURCES = pytest.mark.parametrize("source", ["generator", "global"])
repeat = settings(derandomize=True, deadline=None, max_examples=200)


def views(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, *shape, generator=generator).to(dtype))


@pytest.mark.parametrize("shape", [(5, 3, 8, 8), (5, 1, 100), (5, 7), (5,), (1, 3)])
@pytest.mark.parametrize("mode", ["elem", "batch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_mixes_each_query_with_its_partners_positive(shape, mode, dtype):
    queries, positives = views(*shape, dtype=dtype)
    before = queries.clone(), positives.clone()
    mixed, mix = MomentumMixup(2.0, mode)(queries, positives)
    assert mixed.dtype == dtype
    for i, (theta, partner) in enumerate(zip(*mix, strict=True)):
        expected = theta * queries[i] + (1 - theta) * positives[partner]
        torch.testing.assert_close(
            mixed[i],
            expected,
            rtol=0.02 if dtype == torch.bfloat16 else 1e-5,
            atol=1e-2 if dtype == torch.bfloat16 else 1e-6,
        )
    assert mix.theta.shape == mix.partner.shape == (shape[0],)
    assert sorted(mix.partner.tolist()) == list(range(shape[0]))
    assert (len(set(mix.theta.tolist())) == 1) == (mode == "batch" or shape[0] == 1)
    assert torch.equal(queries, before[0])
    assert torch.equal(positives, before[1])


def test_injected_theta_and_partner_are_used():
    queries, positives = views(3, 2)
    theta, partner = torch.tensor([1.0, 0.0, 0.25]), torch.tensor([2, 0, 0])
    mixed, mix = MomentumMixup()(queries, positives, theta=theta, partner=partner)
    assert torch.equal(mixed[0], queries[0])
    assert torch.equal(mixed[1], positives[0])
    torch.testing.assert_close(mixed[2], 0.25 * queries[2] + 0.75 * positives[0])
    assert torch.equal(mix.theta, theta)
    assert torch.equal(mix.partner, partner)
    assert torch.equal(MomentumMixup()(queries, positives, theta=0.5)[1].theta, torch.full((3,), 0.5))


def test_mix_unpacks():
    _, mix = MomentumMixup()(*views(3, 2))
    theta, partner = mix
    assert isinstance(mix, Mix)
    assert theta is mix.theta
    assert partner is mix.partner


def test_one_generator_one_stream():
    def draw(generator):
        return MomentumMixup(2.0, generator=generator)(*views(50, 2))[1]

    first, again = (draw(torch.Generator().manual_seed(3)) for _ in range(2))
    other = draw(torch.Generator().manual_seed(4))
    assert torch.equal(first.theta, again.theta)
    assert torch.equal(first.partner, again.partner)
    assert not torch.equal(first.theta, other.theta)
    assert not torch.equal(first.partner, other.partner)
    torch.manual_seed(3)
    draws = draw(None)
    torch.manual_seed(3)
    assert torch.equal(draw(None).theta, draws.theta)


def draw_theta(kappa, source, dtype, size=20000):
    """Theta of one large minibatch, from a generator or from the global one."""
    generator = torch.Generator().manual_seed(0) if source == "generator" else None
    torch.manual_seed(1)
    samples = torch.zeros(size, 1, dtype=dtype)
    return MomentumMixup(kappa, generator=generator)(samples, samples)[1].theta


@SOURCES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kappa", [1e-3, 0.1, 0.5, 1, 2, 100])
def test_theta_is_beta_distributed(kappa, dtype, source):
    theta = draw_theta(kappa, source, dtype).double().sort().values
    # The distance of Kolmogorov and Smirnov, where float32 resolves it: the mass that small kappa puts within 1e-30 of
    # an end is one step. 1.95 / sqrt(n) is exceeded once in 1000 seeds.
    points = torch.cat([torch.logspace(-30, -2, 57), torch.linspace(0.01, 0.99, 99)]).double()
    empirical = torch.searchsorted(theta, points, right=True) / len(theta)
    assert (empirical - torch.from_numpy(stats.beta(kappa, kappa).cdf(points))).abs().max() < 1.95 / len(theta) ** 0.5
    assert ((theta >= 0) & (theta <= 1)).all()


@SOURCES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kappa", [1e-8, 1e-3, 0.1, 2, 100])
def test_theta_has_the_variance_of_its_kappa(kappa, dtype, source):
    theta = draw_theta(kappa, source, dtype)
    assert theta.dtype == dtype
    assert theta.double().mean().item() == pytest.approx(0.5, abs=0.015)
    assert theta.double().var().item() == pytest.approx(1 / (4 * (2 * kappa + 1)), rel=0.04)


@SOURCES
def test_the_largest_kappa_mixes_halves(source):
    theta = draw_theta(1e8, source, torch.float32)
    assert theta.std().item() == pytest.approx(0.5 / (2e8 + 1) ** 0.5, rel=0.03)
    assert theta.mean().item() == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("kappa", [1e-9, 1e9, 10**400, 5e-324])
def test_a_kappa_beyond_that_is_refused(kappa):
    with pytest.raises(ValueError, match=r"kappa must be between 1e-08 and 100000000\.0, got"):
        MomentumMixup(kappa)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@SOURCES
@pytest.mark.parametrize("theta", [None, 0.3])
def test_a_device_without_float64_mixes(theta, source, dtype):
    generator = torch.Generator().manual_seed(0) if source == "generator" else None
    queries, positives = views(8, 3, 4, dtype=dtype)
    with WithoutFloat64():
        mixed, mix = MomentumMixup(0.1, generator=generator)(queries, positives, theta=theta)
    assert mixed.dtype == mix.theta.dtype == dtype


@repeat
@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    mode=st.sampled_from(["elem", "batch"]),
    kappa=st.floats(-8, 8, allow_subnormal=False).map(lambda exponent: 10.0**exponent),
    given_theta=st.sampled_from([None, 0.0, 0.3, 1.0, "tensor"]),
    given_partner=st.booleans(),
    strided=st.booleans(),
    seed=st.integers(0, 9999),
)
def test_any_minibatch_is_mixed_as_the_mix_says(shape, dtype, mode, kappa, given_theta, given_partner, strided, seed):
    generator = torch.Generator().manual_seed(seed)
    queries, positives = torch.randn(2, *shape, generator=generator).to(dtype)
    if strided:  # not contiguous, and the same values again
        queries, positives = (view.mT.contiguous().mT if view.ndim > 1 else view for view in (queries, positives))
    theta = torch.rand(shape[0], generator=generator) if given_theta == "tensor" else given_theta
    partner = torch.randint(shape[0], (shape[0],), generator=generator) if given_partner else None
    mixed, mix = MomentumMixup(kappa, mode, generator)(queries, positives, theta, partner)
    assert (mixed.shape, mixed.dtype, mix.theta.dtype) == (queries.shape, dtype, dtype)
    if partner is None:
        assert mix.partner.sort().values.tolist() == list(range(shape[0]))
    else:
        assert torch.equal(mix.partner, partner)
    weight = mix.theta.double().view(-1, *[1] * (queries.ndim - 1))
    expected = weight * queries.double() + (1 - weight) * positives.double()[mix.partner]
    largest = max(view.abs().max().item() for view in (queries, positives))
    assert (mixed.double() - expected).abs().max() <= 3 * torch.finfo(dtype).eps * largest


# -------------------------------------------------------------------------------------------- settings and their copies


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("kappa", -1, ValueError),
        ("kappa", 0, ValueError),
        ("kappa", math.nan, ValueError),
        ("kappa", "2", TypeError),
        ("kappa", torch.tensor(2.0), TypeError),
        ("mode", "foo", ValueError),
        ("mode", None, ValueError),
        ("generator", 3, TypeError),
    ],
)
def test_settings_assigned_later_are_checked_as_in_the_constructor(name, value, error):
    mixup = MomentumMixup(2.0, "batch")
    before = getattr(mixup, name)
    with pytest.raises(error) as assigned:
        setattr(mixup, name, value)
    with pytest.raises(error, match=name) as built:
        MomentumMixup(**{name: value})
    assert str(assigned.value) == str(built.value)
    assert getattr(mixup, name) == before


def test_settings_assigned_later_are_used():
    mixup = MomentumMixup(2.0)
    mixup.kappa, mixup.mode, mixup.generator = np.float32(0.5), "batch", torch.Generator().manual_seed(3)
    assert repr(mixup) == "MomentumMixup(kappa=0.5, mode='batch')"
    wanted = MomentumMixup(0.5, "batch", torch.Generator().manual_seed(3))
    for ours, theirs in zip(mixup(*views(5, 2))[1], wanted(*views(5, 2))[1], strict=True):
        assert torch.equal(ours, theirs)
    mixup.generator = None
    assert mixup(*views(5, 2))[1].theta.shape == (5,)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda mixup: pickle.loads(pickle.dumps(mixup))])
@SOURCES
def test_a_copy_goes_on_with_a_generator_of_its_own(source, duplicate):
    mixup = MomentumMixup(0.3, "batch", torch.Generator().manual_seed(3) if source == "generator" else None)
    mixup(*views(5, 2))
    twin = duplicate(mixup)
    assert repr(twin) == repr(mixup)
    assert (twin.generator is None) == (mixup.generator is None)
    with pytest.raises(ValueError, match="kappa"):
        twin.kappa = -1
    if source == "generator":
        draws = [drawn for each in (mixup, twin) for drawn in (each(*views(5, 2))[1].theta,)]
        assert torch.equal(*draws)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
@pytest.mark.parametrize("argument", ["queries", "positives"])
def test_labels_in_the_place_of_images_are_refused_for_what_they_are(argument, dtype):
    arguments = dict.fromkeys(("queries", "positives"), torch.rand(8, 3, 4, 4)) | {argument: torch.ones(8, dtype=dtype)}
    message = rf"{argument} must have a floating point dtype, got {dtype} of shape \(8,\).*class labels are not mixed"
    with pytest.raises(TypeError, match=message):
        MomentumMixup()(**arguments)


def test_one_sample_alone_mixes_its_own_two_views():
    queries, positives = views(1, 4)
    mixed, mix = MomentumMixup()(queries, positives)
    assert mix.partner.tolist() == [0]
    torch.testing.assert_close(mixed, mix.theta * queries + (1 - mix.theta) * positives)


# --------------------------------------------------------------------------------------------------------- compiled


@pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kappa", [1e-3, 2.0])
def test_drawing_compiles_to_one_graph_with_the_same_draws(kappa):
    torch.compiler.reset()
    compiled = torch.compile(MomentumMixup(kappa), fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    compiled_draws = [compiled(*views(8, 3)) for _ in range(3)]
    torch.manual_seed(0)
    eager_draws = [MomentumMixup(kappa)(*views(8, 3)) for _ in range(3)]
    for (ours, mix), (theirs, wanted) in zip(compiled_draws, eager_draws, strict=True):
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(mix.theta, wanted.theta)
        assert torch.equal(mix.partner, wanted.partner)
    torch.compiler.reset()
