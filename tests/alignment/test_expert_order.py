import pytest
import torch

from notebook_kit import models
from notebook_kit.alignment import compose, invert, permutation_spec, permute, random_permutations, weight_matching
from tests.alignment.nets import BUILD, build, outputs, weights_of, with_weights

KINDS = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3, one group"]
BUILD["deepseek_v3, one group"] = lambda: models.tiny_deepseek_v3(n_group=1, topk_group=1)


def prepared(kind, residual=True):
    model = build(kind)
    return model, weights_of(model), permutation_spec(model, residual=residual, expert_order=True)


@pytest.mark.parametrize("kind", KINDS)
def test_reordered_experts_leave_the_logits_unchanged(kind):
    model, weights, spec = prepared(kind)
    orders = [perm for perm in spec.sizes if perm.endswith(".order")]
    assert orders
    permutations = random_permutations(spec, seed=3, signs=True)
    new = permute(spec, permutations, weights)
    difference = (outputs(with_weights(kind, new)) - outputs(model)).abs().max()
    assert difference < 1e-5 * max(1.0, outputs(model).abs().max())
    # The router's rows alone would be another function.
    alone = permute(spec, {orders[0]: permutations[orders[0]]}, weights)
    router = next(
        name for name in alone if name.endswith("mlp.gate.weight") and not torch.equal(alone[name], weights[name])
    )
    changed = outputs(with_weights(kind, weights | {router: alone[router]})) - outputs(model)
    assert changed.abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["mixtral", "olmoe"])
def test_inverting_and_composing(kind):
    _, weights, spec = prepared(kind)
    p, q = (random_permutations(spec, seed=seed, signs=True) for seed in (1, 2))
    moved = permute(spec, p, weights)
    back = permute(spec, invert(spec, p), moved)
    assert all(torch.equal(back[key], weights[key]) for key in weights)
    one, two = permute(spec, compose(spec, q, p), weights), permute(spec, q, moved)
    assert all(torch.equal(one[key], two[key]) for key in weights)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_planted_order_is_recovered_exactly(kind, residual):
    _, a, spec = prepared(kind, residual)
    planted = random_permutations(spec, seed=7, signs=True)
    b = permute(spec, planted, a)
    found = weight_matching(spec, a, b, seed=1)
    recovered = permute(spec, found, b)
    assert all(torch.equal(recovered[key], a[key]) for key in a)
    assert all(torch.equal(found[perm], index) for perm, index in invert(spec, planted).items())


def test_the_objective_never_falls_and_is_what_it_says():
    _, a, spec = prepared("mixtral")
    generator = torch.Generator().manual_seed(1)
    b = {key: tensor[..., torch.randperm(tensor.shape[-1], generator=generator)] for key, tensor in a.items()}
    found = weight_matching(spec, a, b, seed=2)
    assert all(later >= earlier for earlier, later in zip(found.objective, found.objective[1:], strict=False))
    moved = permute(spec, found, b)
    recomputed = sum((a[key].double() * moved[key].double()).sum().item() for key in spec.axes)
    assert found.objective[-1] == pytest.approx(recomputed, rel=1e-4)
    # Beginning there, nothing is left to gain; free to reorder experts, it gains more than with their order fixed.
    assert len(weight_matching(spec, a, b, seed=5, start=found).objective) == 1
    fixed = weight_matching(permutation_spec(build("mixtral"), residual=True), a, b, seed=2)
    assert found.objective[-1] > fixed.objective[-1]


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"'model\.layers\.1\.mlp'.*groups of experts first"):
        permutation_spec(models.tiny_deepseek_v3(), expert_order=True)
    with pytest.raises(ValueError, match="llama has no routed experts"):
        permutation_spec(models.tiny_llama(), expert_order=True)
