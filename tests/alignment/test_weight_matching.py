import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from notebook_kit.alignment import (
    Part,
    Permutations,
    PermutationSpec,
    invert,
    permutation_spec,
    permute,
    random_permutations,
    similarity,
    weight_matching,
)
from notebook_kit.models import MLP
from notebook_kit.weights import IncompatibleWeights
from tests.alignment.nets import build, weights_of
from tests.alignment.test_spec import CASES


@pytest.mark.parametrize(("name", "residual"), CASES)
def test_a_planted_permutation_is_recovered_exactly(name, residual):
    model = build(name)
    a, spec = weights_of(model), permutation_spec(model, residual=residual)
    planted = random_permutations(spec, seed=7, signs=True)
    b = permute(spec, planted, a)
    found = weight_matching(spec, a, b, seed=1)
    recovered = permute(spec, found, b)
    assert all(torch.equal(recovered[key], a[key]) for key in a)
    assert all(torch.equal(found[perm], index) for perm, index in invert(spec, planted).items())


@pytest.mark.parametrize("name", ["mlp", "llama, groups of 4", "mixtral", "deepseek_v3"])
def test_the_objective_never_falls_and_is_what_it_says(name):
    a, generator = weights_of(build(name)), torch.Generator().manual_seed(1)
    b = {key: tensor[..., torch.randperm(tensor.shape[-1], generator=generator)] for key, tensor in a.items()}
    spec = permutation_spec(build(name), residual=name != "mlp")
    found = weight_matching(spec, a, b, seed=2)
    assert len(found.objective) > 2
    assert all(later >= earlier for earlier, later in zip(found.objective, found.objective[1:], strict=False))
    moved = permute(spec, found, b)
    recomputed = sum((a[key].double() * moved[key].double()).sum().item() for key in spec.axes)
    assert found.objective[-1] == pytest.approx(recomputed, rel=1e-4, abs=1e-3)
    # No single permutation can be improved any more.
    for perm in spec.sizes:
        c, free = similarity(spec, perm, a, b, found, signs=perm in found.signs)
        total = c if free is None else c + free.abs()
        from scipy.optimize import linear_sum_assignment

        rows, columns = linear_sum_assignment(total.numpy(), maximize=True)
        here = total[torch.arange(len(total)), found[perm]].sum()
        assert total.numpy()[rows, columns].sum() <= here + 1e-3


def test_the_hand_worked_example():
    spec = PermutationSpec({"w": ("p", None)}, {"p": 2})
    a, b = {"w": torch.tensor([[1.0, 0], [0, 1]])}, {"w": torch.tensor([[0.0, 1], [1, 0]])}
    c, free = similarity(spec, "p", a, b, Permutations())
    assert c.tolist() == [[0, 1], [1, 0]]
    assert free is None
    assert weight_matching(spec, a, b)["p"].tolist() == [1, 0]


@settings(deadline=None, max_examples=20)
@given(st.integers(2, 7), st.integers(0, 99))
def test_one_hidden_layer_is_solved_exactly_by_the_first_sweep(n, seed):
    import itertools

    generator = torch.Generator().manual_seed(seed)
    spec = PermutationSpec({"w": ("p", None), "b": ("p",), "v": (None, "p")}, {"p": n})
    a, b = (
        {k: torch.randn(s, generator=generator) for k, s in (("w", (n, 3)), ("b", (n,)), ("v", (2, n)))} for _ in "ab"
    )
    found = weight_matching(spec, a, b, max_iter=1)

    def value(order):
        moved = permute(spec, {"p": torch.tensor(order)}, b)
        return sum((a[key] * moved[key]).sum().item() for key in a)

    if n <= 5:
        assert value(found["p"].tolist()) == pytest.approx(max(map(value, itertools.permutations(range(n)))), abs=1e-4)
    assert value(found["p"].tolist()) >= value(range(n)) - 1e-4


def test_signs_are_found_where_they_are_free_and_only_there():
    signed = Part("p", signs=(True,))
    spec = PermutationSpec({"gate": ("p", None), "up": (signed, None)}, {"p": 3})
    torch.manual_seed(0)
    a = {"gate": torch.randn(3, 4), "up": torch.randn(3, 4)}
    b = {"gate": a["gate"][[2, 0, 1]], "up": -a["up"][[2, 0, 1]]}
    found = weight_matching(spec, a, b)
    assert found["p"].tolist() == [1, 2, 0]
    assert found.signs["p"].tolist() == [-1, -1, -1]
    assert not weight_matching(spec, a, b, signs=False).signs


def test_experts_of_one_tensor_are_matched_apart():
    model = build("mixtral")
    a, spec = weights_of(model), permutation_spec(model)
    only = {"layers.0.experts.3": torch.randperm(64, generator=torch.Generator().manual_seed(0))}
    found = weight_matching(spec, a, permute(spec, only, a))
    assert [perm for perm, share in found.moved().items() if share > 0] == ["layers.0.experts.3"]


def test_bad_input_is_named():
    spec, a = permutation_spec(MLP([4, 3, 2])), MLP([4, 3, 2]).state_dict()
    with pytest.raises(IncompatibleWeights, match=r"layers\.0\.weight"):
        weight_matching(spec, a, MLP([4, 5, 2]).state_dict())
    with pytest.raises(IncompatibleWeights, match="needs 3"):
        weight_matching(spec, MLP([4, 5, 2]).state_dict(), MLP([4, 5, 2]).state_dict())
    with pytest.raises(ValueError, match="max_iter must be in"):
        weight_matching(spec, a, a, max_iter=0)
    with pytest.raises(ValueError, match="NaN"):
        weight_matching(spec, a, {**a, "layers.0.bias": torch.full((3,), float("nan"))})
