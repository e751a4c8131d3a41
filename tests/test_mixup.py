"""Momentum mixup and the confidence schedule."""

import math

import pytest
import torch
from scipy import stats

from slr_plugin import CosineConfidence, Mix, MomentumMixup


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


@pytest.mark.parametrize("kappa", [0.1, 1.0, 2.0])
def test_theta_is_beta_distributed(kappa):
    mixup = MomentumMixup(kappa, generator=torch.Generator().manual_seed(0))
    queries, positives = torch.zeros(20000, 1, dtype=torch.float64), torch.ones(20000, 1, dtype=torch.float64)
    theta = mixup(queries, positives)[1].theta
    assert theta.isfinite().all()
    # The lower half, where float64 resolves the mass that small kappa puts next to the ends; the upper is symmetric.
    lower = theta[theta < 0.5]
    assert abs(len(lower) / len(theta) - 0.5) < 0.01
    assert stats.kstest(lower.numpy(), lambda x: 2 * stats.beta(kappa, kappa).cdf(x)).pvalue > 0.01


def test_cosine_confidence_follows_the_formula_then_holds():
    m1, m2, total = 0.5, 10.0, 40
    schedule = CosineConfidence(m1, m2, total)
    for step in range(total + 1):
        expected = m2 - (m2 - m1) * (math.cos(math.pi * step / total) + 1) / 2
        assert schedule(step) == pytest.approx(expected, abs=1e-12)
        assert schedule(torch.tensor(step)).item() == pytest.approx(expected, abs=1e-12)
    assert schedule(0) == m1
    assert schedule(10 * total) == schedule(torch.tensor(10 * total)) == m2
