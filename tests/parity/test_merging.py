"""Merging against mergekit and peft: the same numbers where the conventions are the same.

Each convention that differs is chosen by an argument of ours; what cannot be chosen is said beside the test.
"""

import pytest
import torch

from notebook_kit.merging import average, dare, slerp, task_arithmetic, ties
from notebook_kit.merging.dare import drop_and_rescale

SHAPES = {"embed": (17, 8), "mlp.weight": (12, 8), "mlp.bias": (12,), "deep": (3, 4, 5)}
DENSITIES = [0.1, 0.35, 0.8, 1.0]


@pytest.fixture
def base():
    return {key: torch.randn(shape) for key, shape in SHAPES.items()}


@pytest.fixture
def experts(base):
    return [{key: tensor + 0.1 * torch.randn(tensor.shape) for key, tensor in base.items()} for _ in range(3)]


def close(ours, theirs, atol=1e-6):
    assert ours.keys() == theirs.keys()
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-5, atol=atol)


# ---------------------------------------------------------------- peft
def by_peft(function, base, experts, weights, **options):
    merged = {}
    for key, theta in base.items():
        taus = [expert[key] - theta for expert in experts]
        merged[key] = theta + function(taus, torch.tensor(weights), **options)
    return merged


@pytest.fixture
def peft():
    return pytest.importorskip("peft.utils.merge_utils")


@pytest.mark.filterwarnings("ignore:The density")
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize(("elect", "their_elect"), [("mass", "total"), ("count", "frequency")])
def test_ties_is_pefts(peft, base, experts, density, elect, their_elect):
    if elect == "count":  # three votes of which some are 0 may be even: peft says plus, the paper the majority
        experts = [{key: base[key] + (expert[key] - base[key]).abs() for key in base} for expert in experts]
    theirs = by_peft(peft.ties, base, experts, [1.0] * 3, density=density, majority_sign_method=their_elect)
    close(ties(base, experts, density=density, scope="tensor", elect=elect), theirs)


def test_pefts_weights_come_after_the_election_ours_before(peft, base, experts):
    weights = [1.0, 0.5, 2.0]
    theirs = by_peft(peft.ties, base, experts, weights, density=0.5)
    ours = ties(base, experts, density=0.5, scope="tensor", weights=weights)
    assert any(not torch.allclose(ours[key], theirs[key], atol=1e-4) for key in base)
    equal = by_peft(peft.ties, base, experts, [0.7] * 3, density=0.5)
    close(ties(base, experts, density=0.5, scope="tensor", scale=0.7), equal)


def test_task_arithmetic_is_pefts(peft, base, experts):
    theirs = by_peft(peft.task_arithmetic, base, experts, [0.4, -0.2, 1.0])
    close(task_arithmetic(base, experts, scale=1.0, weights=[0.4, -0.2, 1.0]), theirs)


@pytest.mark.parametrize("density", [0.2, 0.6])
def test_ties_without_election_is_pefts_magnitude_prune(peft, base, experts, density):
    theirs = by_peft(peft.magnitude_prune, base, experts, [0.4, -0.2, 1.0], density=density)
    ours = ties(base, experts, density=density, scope="tensor", elect="none", combine="sum", weights=[0.4, -0.2, 1.0])
    close(ours, theirs)


def test_dare_rescales_as_peft(peft):
    tau = torch.randn(4000)
    theirs = peft.prune(tau, 0.3, method="random", rescale=True)
    ours = drop_and_rescale(tau, 0.3, "inverse", torch.Generator().manual_seed(0))
    for pruned in (ours, theirs):
        kept = pruned != 0
        torch.testing.assert_close(pruned[kept], tau[kept] / 0.3)
        assert abs(float(kept.float().mean()) - 0.3) < 0.03


def test_dare_on_pefts_masks_is_pefts(peft, base, experts, monkeypatch):
    """With the same random numbers the whole merges agree, sum and election."""
    draw = torch.rand

    def same_numbers(*shape, generator=None):
        return (torch.arange(torch.Size(*shape).numel()) * 0.618034 % 1).reshape(*shape)

    def same_masks(probabilities, **_):
        return (same_numbers(probabilities.shape) < probabilities).to(probabilities.dtype)

    monkeypatch.setattr(torch, "rand", same_numbers)
    monkeypatch.setattr(torch, "bernoulli", same_masks)
    linear = by_peft(peft.dare_linear, base, experts, [1.0] * 3, density=0.4)
    close(dare(base, experts, density=0.4, scale=1.0), linear, atol=1e-5)
    voted = by_peft(peft.dare_ties, base, experts, [1.0] * 3, density=0.4)
    close(dare(base, experts, density=0.4, scale=1.0, elect="mass"), voted, atol=1e-5)
    monkeypatch.setattr(torch, "rand", draw)


# ---------------------------------------------------------------- mergekit
@pytest.fixture(scope="module")
def mergekit():
    return pytest.importorskip("mergekit.merge_methods.generalized_task_arithmetic")


def by_mergekit(
    module, base, experts, weights, *, density=1.0, consensus=None, sparsify=None, normalize=False, lam=1.0
):
    """Run mergekit's own `merge_group` on each tensor."""
    from types import SimpleNamespace

    method = module.GeneralizedTaskArithmeticMerge(
        consensus_method=consensus,
        sparsification_method=sparsify,
        default_normalize=normalize,
        default_rescale=False,
        method_name="test",
        method_pretty_name=None,
        method_reference_url=None,
    )
    merged = {}
    for key, theta in base.items():
        entries = [SimpleNamespace(id=i, tensor=expert[key].clone()) for i, expert in enumerate(experts)]
        group = SimpleNamespace(base=SimpleNamespace(tensor=theta.clone()), non_base=entries)
        each = dict(enumerate(weights)), dict.fromkeys(range(len(experts)), density)
        merged[key] = method.merge_group(
            group,
            weight=each[0],
            density=each[1],
            int8_mask=False,
            normalize=normalize,
            rescale=False,
            **{"lambda": lam},
        )
    return merged


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, 2.0, 1.0]])
@pytest.mark.parametrize(("combine", "normalize"), [("mean", True), ("sum", False)])
def test_ties_is_mergekits(mergekit, base, experts, density, weights, combine, normalize):
    theirs = by_mergekit(
        mergekit,
        base,
        experts,
        weights,
        density=density,
        consensus=mergekit.ConsensusMethod.sum,
        sparsify=mergekit.SparsificationMethod.magnitude,
        normalize=normalize,
        lam=0.8,
    )
    ours = ties(base, experts, density=density, scope="tensor", combine=combine, weights=weights, scale=0.8)
    close(ours, theirs)


def test_task_arithmetic_is_mergekits(mergekit, base, experts):
    theirs = by_mergekit(mergekit, base, experts, [0.3, 0.5, -0.2], lam=0.7)
    close(task_arithmetic(base, experts, scale=0.7, weights=[0.3, 0.5, -0.2]), theirs)
    normalized = by_mergekit(mergekit, base, experts, [1.0, 2.0, 1.0], normalize=True)
    close(average(base, experts, weights=[1.0, 2.0, 1.0]), normalized)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
def test_slerp_is_mergekits(t):
    """mergekit walks an arc for each t of its batch axis; with one row that is the whole tensor, as ours."""
    theirs = pytest.importorskip("mergekit.merge_methods.slerp").slerp
    a, b = torch.randn(2, 40)
    pairs = [(a, b), (a, -a), (a, 2 * a), (a, a + 1e-4 * b), (a, -a + 0.1 * b)]
    for first, second in pairs:
        ours = slerp({"w": torch.zeros(40)}, [{"w": first}, {"w": second}], t=t)["w"]
        expected = theirs(torch.tensor([t]), first[None], second[None])[0]
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("scope", "flatten"), [("tensor", True), ("row", False)])
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_of_task_vectors_is_mergekits_nuslerp(t, scope, flatten):
    """It takes the line only where two directions are one to 1e-8, we from 1.8 degrees on: these are further apart."""
    theirs = pytest.importorskip("mergekit.merge_methods.nuslerp").nuslerp
    base, a, b = torch.randn(3, 6, 9)
    expected = base + theirs(t, a - base, b - base, flatten=flatten)
    ours = slerp({"w": base}, [{"w": a}, {"w": b}], t=t, scope=scope, space="task_vectors")["w"]
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    plain = slerp({"w": base}, [{"w": a}, {"w": b}], t=t, scope=scope)["w"]
    torch.testing.assert_close(plain, theirs(t, a, b, flatten=flatten), rtol=1e-4, atol=1e-5)


def test_dare_with_rescale_norm_is_mergekits(monkeypatch):
    sparsify = pytest.importorskip("mergekit.sparsify")
    tau = torch.randn(30, 20)
    mask = torch.rand(30, 20)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: mask)
    monkeypatch.setattr(torch, "bernoulli", lambda p, **_: (mask < p).to(p.dtype))
    theirs = sparsify.bernoulli(tau, 0.4, rescale_norm=sparsify.RescaleNorm.l1)
    torch.testing.assert_close(drop_and_rescale(tau, 0.4, "norm", torch.Generator()), theirs)


def test_trimming_is_mergekits(base):
    sparsify = pytest.importorskip("mergekit.sparsify")
    zero = {key: torch.zeros_like(tensor) for key, tensor in base.items()}
    for density in (0.1, 0.5, 0.9):
        ours = ties(zero, [base], density=density, scope="tensor")
        close(ours, {key: sparsify.magnitude(tensor, density) for key, tensor in base.items()})
