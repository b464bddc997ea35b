"""DARE: random, but true on average, and the same for the same seed."""

import pytest
import torch

from notebook_kit.merging import dare, task_arithmetic, ties
from notebook_kit.merging.dare import drop_and_rescale

BASE = {"w": torch.zeros(6, 5), "v": torch.zeros(30)}


@pytest.fixture
def expert():
    return {"w": torch.linspace(-2, 2, 30).reshape(6, 5), "v": torch.linspace(-2, 2, 30)}


def test_the_expectation_is_the_task_vector(expert):
    tau, n, density = expert["w"], 2000, 0.3
    g = torch.Generator().manual_seed(0)
    draws = torch.stack([drop_and_rescale(tau, density, "inverse", g) for _ in range(n)])
    variance = tau**2 * (1 - density) / density
    error = (draws.mean(dim=0) - tau).abs()
    # Thirty entries: at three standard errors each, 1 in 12 such tests would fail by chance; the seed is fixed.
    assert (error <= 3 * (variance / n).sqrt() + 1e-6).float().mean() >= 0.95
    assert (error <= 4.5 * (variance / n).sqrt() + 1e-6).all()
    torch.testing.assert_close(draws.var(dim=0), variance, rtol=0.15, atol=1e-6)
    bare = drop_and_rescale(tau, density, "none", g)
    assert set(bare[bare != 0].tolist()) <= set(tau.reshape(-1).tolist())


def test_the_merge_is_unbiased_over_seeds(expert):
    n = 300
    total = sum(dare(BASE, [expert], density=0.5, scale=1.0, seed=seed)["w"] for seed in range(n))
    bound = 4 * (expert["w"] ** 2 / n).sqrt() + 1e-5
    assert ((total / n - expert["w"]).abs() <= bound).all()


def test_density_one_is_task_arithmetic(expert):
    experts = [expert, {key: tensor * 2 + 1 for key, tensor in expert.items()}]
    for rescale in ("inverse", "norm", "none"):
        ours = dare(BASE, experts, density=1, scale=0.7, weights=[1, -1], rescale=rescale)
        plain = task_arithmetic(BASE, experts, scale=0.7, weights=[1, -1])
        for key in BASE:
            torch.testing.assert_close(ours[key], plain[key], rtol=1e-5, atol=1e-5)


def test_with_election_and_density_one_it_is_ties(expert):
    experts = [expert, {key: 3 - tensor for key, tensor in expert.items()}]
    for elect in ("mass", "count"):
        ours = dare(BASE, experts, density=1, scale=1.0, elect=elect)
        reference = ties(BASE, experts, density=1, elect=elect)
        voted = torch.stack([e["w"] if elect == "mass" else e["w"].sign() for e in experts]).sum(dim=0) != 0
        torch.testing.assert_close(ours["w"][voted], reference["w"][voted])


def test_density_zero_is_base(expert):
    for rescale in ("inverse", "norm", "none"):
        merged = dare(BASE, [expert], density=0, rescale=rescale)
        assert all(torch.equal(merged[key], BASE[key]) for key in BASE)


def test_seeds_reproduce_and_differ(expert):
    first, again, other = (dare(BASE, [expert, expert], seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(first[key], again[key]) for key in BASE)
    assert not torch.equal(first["w"], other["w"])


def test_each_expert_and_each_tensor_has_its_own_mask(expert):
    same = {key: torch.ones_like(tensor) for key, tensor in expert.items()}
    one = dare(BASE, [same], density=0.5, scale=1.0, rescale="none")
    assert not torch.equal(one["w"].reshape(-1), one["v"])
    both = dare(BASE, [same, same], density=0.5, scale=1.0, rescale="none")
    assert set(both["v"].tolist()) == {0, 1, 2}


def test_a_mask_belongs_to_the_tensors_name_not_to_its_place(expert):
    whole = dare(BASE, [expert])
    backwards = dare(dict(reversed(BASE.items())), [dict(reversed(expert.items()))])
    alone = dare({"v": BASE["v"]}, [{"v": expert["v"]}])
    assert torch.equal(whole["v"], backwards["v"])
    assert torch.equal(whole["v"], alone["v"])


def test_the_global_random_state_is_left_alone(expert):
    before = torch.get_rng_state()
    dare(BASE, [expert])
    assert torch.equal(before, torch.get_rng_state())


def test_rescaling_to_the_old_norm(expert):
    merged = dare(BASE, [expert], density=0.4, scale=1.0, rescale="norm")
    torch.testing.assert_close(merged["w"].abs().sum(), expert["w"].abs().sum())
