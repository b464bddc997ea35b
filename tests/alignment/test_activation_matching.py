import pytest
import torch

from notebook_kit import models
from notebook_kit.alignment import (
    PermutationSpec,
    activation_matching,
    match_features,
    permutation_spec,
    permute,
    random_permutations,
)
from notebook_kit.models import MLP
from tests.alignment.nets import build, outputs, weights_of, with_weights


def batches_for(name):
    generator = torch.Generator().manual_seed(5)
    if name in ("mlp", "sequential"):
        return [torch.randn(200, 8, generator=generator)]
    if name == "vit":
        return [torch.randn(30, 1, 16, 16, generator=generator)]
    return [{"input_ids": torch.randint(0, 256, (16, 12), generator=generator)} for _ in range(2)]


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("name", ["vit", "bert", "llama", "llama, groups of 4", "mixtral", "deepseek_v3", "qwen2_moe"])
def test_planted_transformers_come_back_as_functions(name, residual):
    model = build(name)
    a, spec = weights_of(model), permutation_spec(model, residual=residual)
    b = permute(spec, random_permutations(spec, seed=3, signs=True), a)
    model_b = with_weights(name, b)
    found = activation_matching(spec, model, model_b, batches_for(name))
    recovered = permute(spec, found, b)
    # Half way between the two the function is still a's, which no wrong permutation would give. Units that never
    # vary on the batches may be paired anyhow.
    half = {k: (a[k] + recovered[k]) / 2 if a[k].is_floating_point() else a[k] for k in a}
    scale = outputs(model).abs().max()
    assert (outputs(with_weights(name, half)) - outputs(model)).abs().max() < 2e-2 * scale
    naive = {k: (a[k] + b[k]) / 2 if a[k].is_floating_point() else a[k] for k in a}
    assert (outputs(with_weights(name, naive)) - outputs(model)).abs().max() > 5e-2 * scale


@pytest.mark.parametrize("name", ["mlp", "sequential"])
def test_planted_mlps_come_back(name):
    model = build(name)
    a, spec = weights_of(model), permutation_spec(model)
    b = permute(spec, random_permutations(spec, seed=3), a)
    found = activation_matching(spec, model, with_weights(name, b), batches_for(name))
    recovered = permute(spec, found, b)
    assert all(torch.equal(recovered[key], a[key]) for key in a)


def test_dead_units_are_paired_with_dead_units():
    torch.manual_seed(0)
    model = MLP([4, 6, 2])
    with torch.no_grad():
        model.layers[0].bias[:2] = -100.0
    a, spec = weights_of(model), permutation_spec(model)
    b = permute(spec, {"layers.0": torch.tensor([5, 1, 4, 0, 2, 3])}, a)
    other = MLP([4, 6, 2])
    other.load_state_dict(b)
    found = activation_matching(spec, model, other, [torch.randn(50, 4)])
    dead_in_b = {1, 3}
    assert set(found["layers.0"][:2].tolist()) == dead_in_b
    assert found["layers.0"][2:].tolist() == [4, 5, 2, 0]


def test_a_sign_is_read_from_the_correlation():
    z = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    found = match_features(z, -z[:, [1, 2, 0]], signs=True)
    assert found["units"].tolist() == [2, 0, 1]
    assert found.signs["units"].tolist() == [-1, -1, -1]
    assert match_features(z[:1], z[:1])["units"].tolist() == [0, 1, 2]


def test_training_mode_is_left_alone_and_hooks_are_gone():
    model = MLP([4, 3, 2]).train()
    activation_matching(permutation_spec(model), model, model, [torch.randn(5, 4)])
    assert model.training
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_bad_input_is_named():
    model = MLP([4, 3, 2])
    with pytest.raises(ValueError, match="at least one batch"):
        activation_matching(permutation_spec(model), model, model, [])
    spec = PermutationSpec({"model.norm.weight": ("p",)}, {"p": 32})
    with pytest.raises(ValueError, match="cannot capture the activations of p in LlamaForCausalLM"):
        activation_matching(spec, models.tiny_llama(), models.tiny_llama(), [torch.zeros(1, 3, dtype=torch.long)])
