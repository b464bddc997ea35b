import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

from notebook_kit import models
from notebook_kit.alignment import (
    feature_correlation,
    greedy_unions,
    permutation_spec,
    permute,
    random_permutations,
    unit_activations,
    zipit,
)
from notebook_kit.models import MLP, VGG, ResNet
from notebook_kit.weights import IncompatibleWeights
from tests.alignment.nets import build

X = torch.rand(200, 64, generator=torch.Generator().manual_seed(0))


def permuted_copy(model, seed=1):
    spec = permutation_spec(model, residual=True)
    twin = copy.deepcopy(model)
    twin.load_state_dict(permute(spec, random_permutations(spec, seed), model.state_dict()))
    return twin


def net(kind):
    torch.manual_seed(0)
    model = {"mlp": lambda: MLP([64, 12, 8, 5]), "vgg": lambda: VGG((4, 6), hidden=8), "resnet": lambda: ResNet((4, 6))}
    model = model[kind]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * (0.5 if parameter.dim() > 1 else 0.3) + 0.1)
    return model


@pytest.mark.parametrize("depth", [None, "all"])
@pytest.mark.parametrize("kind", ["mlp", "vgg", "resnet"])
@pytest.mark.parametrize("copies", [2, 3])
def test_copies_of_a_network_zip_to_its_function(kind, copies, depth):
    model = net(kind)
    spec = permutation_spec(model, residual=True)
    group = [model, *(permuted_copy(model, seed) for seed in range(1, copies))]
    depth = None if depth is None else len(spec.sizes)
    # Copies correlate perfectly, however often they are joined, so that alpha = 1 finds more than two.
    zipped = zipit(spec, group, [X], reduction=1 - 1 / copies, alpha=1.0, depth=depth)
    with torch.no_grad():
        expected = model(X)
        for weights in zipped.weights:
            result = functional_call(model, weights, (X,))
            assert (result - expected).abs().max() < 1e-5 * max(1.0, expected.abs().max())
    numbers = sum(t.numel() for t in model.state_dict().values())
    if depth is None:
        assert zipped.parameters == numbers
        assert all(weights is zipped.weights[0] for weights in zipped.weights)
    else:
        assert numbers < zipped.parameters < copies * numbers


def test_doubles_within_one_network_are_merged_without_loss():
    model = net("mlp")
    wide = MLP([64, 24, 8, 5])
    with torch.no_grad():  # every unit of layer 0 twice; the two are read with 0.3 and 0.7 of its weight
        wide.layers[0].weight.copy_(model.layers[0].weight.repeat(2, 1))
        wide.layers[0].bias.copy_(model.layers[0].bias.repeat(2))
        wide.layers[1].weight.copy_(torch.cat([0.3 * model.layers[1].weight, 0.7 * model.layers[1].weight], 1))
        wide.layers[1].bias.copy_(model.layers[1].bias)
        wide.layers[2].load_state_dict(model.layers[2].state_dict())
    spec = permutation_spec(wide)
    zipped = zipit(spec, [wide], [X], reduction=0.5, depth=1)
    assert zipped.weights[0]["layers.0.weight"].shape == (12, 64)
    with torch.no_grad():
        torch.testing.assert_close(functional_call(wide, zipped.weights[0], (X,)), model(X), atol=1e-4, rtol=1e-4)


def test_the_matrices_by_hand():
    """Two networks of two units on one input; A's two units are one, and so are B's second and A's."""
    a, b = MLP([1, 2, 1]), MLP([1, 2, 1])
    with torch.no_grad():
        for model, rows, columns in ((a, [1.0, 3.0], [2.0, 5.0]), (b, [-1.0, 5.0], [7.0, 11.0])):
            model.layers[0].weight.copy_(torch.tensor(rows)[:, None])
            model.layers[1].weight.copy_(torch.tensor(columns)[None])
            model.layers[0].bias.zero_()
            model.layers[1].bias.zero_()
        b.layers[1].bias.fill_(4.0)
    x = torch.linspace(-1, 1, 41)[:, None]
    # With β = 1 A's two units join; then B's second unit joins them: relu(x) up to a factor.
    zipped = zipit(permutation_spec(a), [a, b], [x], reduction=0.5, alpha=1.0, beta=1.0, depth=1)
    assert zipped.groups["layers.0"].tolist() == [[0, 0], [1, 0]]
    ours, theirs = zipped.weights
    assert ours["layers.0.weight"].flatten().tolist() == [3.0, -1.0]  # merge: mean of 1, 3, 5
    assert ours["layers.0.weight"] is theirs["layers.0.weight"]
    assert ours["layers.1.weight"].tolist() == [[7.0, 0.0]]  # unmerge: 2 + 5
    assert theirs["layers.1.weight"].tolist() == [[11.0, 7.0]]
    whole = zipit(permutation_spec(a), [a, b], [x], reduction=0.5, alpha=1.0, beta=1.0).weights[0]
    assert whole["layers.1.weight"].tolist() == [[9.0, 3.5]]
    assert whole["layers.1.bias"].tolist() == [2.0]


def test_greedy_unions_by_hand():
    c = torch.tensor([[1.0, 0.9, 0.2, 0.1], [0.9, 1.0, 0.3, 0.0], [0.2, 0.3, 1.0, 0.4], [0.1, 0.0, 0.4, 1.0]])
    assert greedy_unions(c, 2, 4).tolist() == [0, 1, 2, 3]
    # The budget is rounded down: half a union per model is none.
    assert greedy_unions(c, 2, 3, beta=1.0).tolist() == [0, 1, 1, 2]
    assert greedy_unions(c, 2, 3, beta=0.0).tolist() == [0, 1, 1, 2]
    assert greedy_unions(c, 2, 2, beta=1.0).tolist() == [0, 0, 1, 1]
    assert greedy_unions(c, 2, 1).tolist() == [0, 0, 0, 0]
    # One model alone has no budget.
    assert greedy_unions(c, 1, 2, beta=0.0).tolist() == [0, 0, 1, 1]
    # A chain: 0-1 join; 2 correlates .8 with the union's weaker member, times alpha.
    chain = torch.tensor([[1.0, 0.9, 0.8, 0.0], [0.9, 1.0, 0.85, 0.0], [0.8, 0.85, 1.0, 0.5], [0.0, 0.0, 0.5, 1.0]])
    assert greedy_unions(chain, 1, 2, alpha=1.0).tolist() == [0, 0, 0, 1]
    assert greedy_unions(chain, 1, 2, alpha=0.5).tolist() == [0, 0, 1, 1]
    # alpha = 0 forbids chains, even where the rest correlates worse.
    chain[2, 3] = chain[3, 2] = -0.5
    assert greedy_unions(chain, 1, 2, alpha=0.0).tolist() == [0, 0, 1, 1]


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3), st.integers(1, 6), st.data(), st.floats(0, 1), st.floats(0, 1), st.integers(0, 99))
def test_any_unions_leave_what_was_asked_for(n_models, n, drawn, alpha, beta, seed):
    x = torch.randn(9, n_models * n, generator=torch.Generator().manual_seed(seed))
    n_out = drawn.draw(st.integers(1, n_models * n))
    groups = greedy_unions(feature_correlation(x), n_models, n_out, alpha=alpha, beta=beta)
    assert groups.unique().tolist() == list(range(n_out))
    first = [groups.tolist().index(g) for g in range(n_out)]
    assert first == sorted(first)
    if n_models > 1 and beta == 0 and n_out >= n_models * n / 2 and n_models == 2:
        assert all(len(set(row.tolist())) == n for row in groups.reshape(2, n))


def test_a_reduction_of_zero_changes_no_function_and_a_depth_of_zero_nothing():
    a, b = net("mlp"), permuted_copy(net("mlp"))
    spec = permutation_spec(a)
    kept = zipit(spec, [a, b], [X], reduction=0.0, depth=2)
    with torch.no_grad():
        for model, weights in zip((a, b), kept.weights, strict=True):
            torch.testing.assert_close(functional_call(model, weights, (X,)), model(X), atol=1e-4, rtol=1e-4)
    same = zipit(spec, [a, b], [X], depth=0)
    for model, weights in zip((a, b), same.weights, strict=True):
        assert all(torch.equal(weights[key], tensor) for key, tensor in model.state_dict().items())


def test_activations_have_one_column_a_unit():
    model = net("vgg")
    spec = permutation_spec(model)
    seen = unit_activations(spec, model, [X[:10], X[10:30]])
    assert {perm: tuple(z.shape) for perm, z in seen.items()} == {
        "conv0": (30 * 64, 4), "conv1": (30 * 16, 4), "conv2": (30 * 16, 6), "conv3": (30 * 4, 6), "hidden": (30, 8),
    }  # fmt: skip
    maps = nn.Sequential(*list(model)[:4])(X[:30])
    torch.testing.assert_close(seen["conv0"], maps.movedim(1, -1).reshape(-1, 4))
    flat = nn.Sequential(*list(model)[:-4])(X[:30])
    torch.testing.assert_close(seen["conv3"].reshape(30, 4, 6).movedim(1, 2).reshape(30, 24), flat.flatten(1))
    mean = unit_activations(spec, model, [X[:10], X[10:30]], per_input=True)
    torch.testing.assert_close(mean["conv0"], maps.mean((2, 3)), atol=1e-5, rtol=1e-5)
    c = feature_correlation(seen["hidden"], seen["hidden"])
    expected = torch.corrcoef(seen["hidden"].double().T).nan_to_num()
    torch.testing.assert_close(c, expected)


def test_bad_input_is_named():
    a = net("mlp")
    spec = permutation_spec(a)
    with pytest.raises(ValueError, match="at least one model"):
        zipit(spec, [], [X])
    with pytest.raises(ValueError, match="at least one batch"):
        zipit(spec, [a, a], [])
    with pytest.raises(ValueError, match=r"reduction must be in \[0, 1\]"):
        zipit(spec, [a, a], [X], reduction=1.2)
    with pytest.raises(IncompatibleWeights):
        zipit(spec, [a, MLP([64, 10, 8, 5])], [X])
    with pytest.raises(ValueError, match="into 5 groups"):
        greedy_unions(torch.eye(4), 2, 5)
    with pytest.raises(ValueError, match="of 3 models"):
        greedy_unions(torch.eye(4), 3, 2)
    llama = models.tiny_llama()
    with pytest.raises(ValueError, match="heads or experts"):
        zipit(permutation_spec(llama), [llama, llama], [torch.zeros(1, 3, dtype=torch.long)])
    resnet = net("resnet")
    with pytest.raises(ValueError, match=r"zips 'stream\.0' but not 'stages\.0\.0\.first'"):
        zipit(permutation_spec(resnet, residual=True), [resnet, resnet], [X], depth=1)
    wide = build("llama, groups of 4")
    with pytest.raises(ValueError, match="no activations of their own"):
        unit_activations(permutation_spec(wide), wide, [torch.zeros(1, 3, dtype=torch.long)])
