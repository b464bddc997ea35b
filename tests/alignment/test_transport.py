from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from notebook_kit.alignment import ground_cost, incoming, outgoing, transport_plan


def cost(n, m, seed=0):
    return torch.rand(n, m, generator=torch.Generator().manual_seed(seed))


def test_two_units_by_hand():
    plan = transport_plan(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), epsilon=0.5)
    # exp(-1/0.5) = 0.1353; 0.5 / (1 + 0.1353) = 0.4404
    assert torch.allclose(plan, torch.tensor([[0.4404, 0.0596], [0.0596, 0.4404]], dtype=plan.dtype), atol=1e-4)


@settings(deadline=None, max_examples=25)
@given(n=st.integers(1, 9), m=st.integers(1, 9), seed=st.integers(0, 99), log_epsilon=st.floats(-2, 1))
def test_marginals_hold_and_nothing_is_negative(n, m, seed, log_epsilon):
    for how in ({"epsilon": 10**log_epsilon}, {"method": "exact"}):
        plan = transport_plan(cost(n, m, seed), max_iter=5000, **how)
        assert (plan >= 0).all()
        assert (plan.sum(1) - 1 / n).abs().max() < 1e-9
        assert (plan.sum(0) - 1 / m).abs().max() < 1e-9


def test_given_marginals_hold():
    source, target = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.5, 0.5])
    for method in ("sinkhorn", "exact"):
        plan = transport_plan(cost(3, 2), method=method, source=source, target=target)
        assert torch.allclose(plan.sum(1).float(), source, atol=1e-6)
        assert torch.allclose(plan.sum(0).float(), target, atol=1e-6)


def test_soft_plans_tend_to_the_permutation_as_epsilon_falls():
    c, order = cost(16, 16), torch.randperm(16)
    c[torch.arange(16), order] -= 0.5
    hard = torch.zeros(16, 16, dtype=torch.float64)
    hard[linear_sum_assignment(c.numpy())] = 1 / 16
    assert torch.equal(transport_plan(c, method="exact"), hard)
    away = [(transport_plan(c, epsilon=e) - hard).abs().sum() for e in (10.0, 1.0, 0.3, 0.1, 0.03)]
    assert all(later < earlier for earlier, later in pairwise(away))
    assert away[0] > 1
    assert (transport_plan(c, epsilon=1e-3) - hard).abs().sum() < 1e-3


@settings(deadline=None, max_examples=20)
@given(n=st.integers(2, 10), m=st.integers(2, 10), seed=st.integers(0, 99), epsilon=st.sampled_from([0.5, 0.1, 0.02]))
def test_a_soft_plan_costs_at_most_epsilon_log_n_more_than_the_exact_one(n, m, seed, epsilon):
    c = cost(n, m, seed).double()
    exact, soft = (float((transport_plan(c, **how, max_iter=5000) * c).sum()) for how in (
        {"method": "exact"}, {"epsilon": epsilon}
    ))  # fmt: skip
    assert exact - 1e-9 <= soft <= exact + epsilon * torch.tensor(float(min(n, m))).log() + 1e-6


def test_rectangular_soft_plans_tend_to_the_exact_one():
    c = cost(12, 8)
    exact = transport_plan(c, method="exact")
    excess = [float((transport_plan(c, epsilon=e, max_iter=5000) - exact).mul(c).sum()) for e in (0.1, 0.01, 0.001)]
    assert excess[0] > excess[1] > excess[2] > -1e-9
    assert excess[2] < 1e-3


def test_large_epsilon_sends_everything_everywhere():
    plan = transport_plan(cost(5, 3), epsilon=10.0)
    assert (plan - 1 / 15).abs().max() < 0.1 / 15
    assert torch.allclose(outgoing(plan), torch.full((5, 3), 1 / 5, dtype=plan.dtype), atol=0.02)


def test_a_constant_added_to_the_cost_moves_no_mass():
    assert torch.allclose(transport_plan(cost(6, 6)), transport_plan(cost(6, 6) - 100.0), atol=1e-5)


def test_the_two_scalings():
    plan = transport_plan(cost(6, 4))
    assert torch.allclose(outgoing(plan).sum(0), torch.ones(4, dtype=plan.dtype))
    assert torch.allclose(incoming(plan).sum(1), torch.ones(6, dtype=plan.dtype))


def test_ground_cost_is_the_distance_of_standardised_units():
    z = torch.randn(50, 3, dtype=torch.float64)
    m = ground_cost(torch.cat([z, -z], 1), 5 * z + 2)
    assert m.diagonal().abs().max() < 1e-7  # √(2 − 2r) of r = 1, in rounding
    assert m.max() == 1.0  # opposite units are the farthest, √4, and set the scale
    r = torch.corrcoef(z.T)[0, 1]
    assert torch.allclose(m[0, 1], (2 - 2 * r).sqrt() / 2)


def test_a_dead_unit_is_as_far_from_all():
    z = torch.randn(40, 3)
    z[:, 0] = 7.0
    m = ground_cost(z, torch.randn(40, 4))
    assert torch.allclose(m[0], m[0, 0].expand(4))
    assert torch.isfinite(m).all()


def test_not_converged_is_an_error():
    with pytest.raises(RuntimeError, match=r"did not converge.*raise max_iter or epsilon"):
        transport_plan(cost(64, 96), epsilon=1e-4, max_iter=10)


@pytest.mark.parametrize("epsilon", [0.0, -1.0, float("nan")])
def test_epsilon_must_be_positive(epsilon):
    with pytest.raises(ValueError, match="epsilon must be in"):
        transport_plan(cost(3, 3), epsilon=epsilon)


def test_bad_input():
    with pytest.raises(ValueError, match="cost holds NaN or Inf"):
        transport_plan(torch.tensor([[0.0, float("nan")]]))
    with pytest.raises(ValueError, match="same mass"):
        transport_plan(cost(2, 2), source=torch.tensor([1.0, 1.0]))
    with pytest.raises(ValueError, match="target must hold 2 masses >= 0"):
        transport_plan(cost(2, 2), target=torch.tensor([1.5, -0.5]))
    with pytest.raises(ValueError, match="method must be one of"):
        transport_plan(cost(2, 2), method="emd")
    with pytest.raises(ValueError, match="z_b holds NaN"):
        ground_cost(torch.full((4, 2), float("nan")), torch.ones(4, 2))
