"""RegMean: the card's numbers, least squares against a plain solver, dead inputs, and how Grams are recorded."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from notebook_kit.checkpoints import load, save
from notebook_kit.merging import IncompatibleWeights, average, gram_matrices, merge_files, regmean
from notebook_kit.merging.regmean import statistics
from notebook_kit.models import MLP, tiny_bert, tiny_gpt2, tiny_llama
from tests.untyped import untyped

close = torch.testing.assert_close


def diag(*values):
    return torch.tensor(values).diag()


IDS = torch.randint(0, 256, (2, 6), generator=torch.Generator().manual_seed(2))


def problem(seed, count=3, out=2, width=4, n=30):
    g = torch.Generator().manual_seed(seed)
    W = [torch.randn(out, width, generator=g) for _ in range(count)]
    X = [torch.randn(n, width, generator=g) @ torch.randn(width, width, generator=g) for _ in range(count)]
    return W, X


def merged(W, G, **settings):
    base = {"w": torch.zeros_like(W[0])}
    return regmean(base, [{"w": w} for w in W], grams=[{"w": g} for g in G], **settings)["w"]


def test_the_hand_worked_example():
    W = [torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, 6.0]])]
    for alpha in (0.0, 0.5, 1.0):
        close(merged(W, [diag(2.0, 1.0), diag(1.0, 3.0)], alpha=alpha), torch.tensor([[2.0, 5.0]]), rtol=1e-5, atol=0)


@given(st.integers(0, 10**6), st.integers(1, 5), st.floats(0, 1))
@settings(deadline=None, max_examples=30)
def test_identities(seed, count, alpha):
    W, X = problem(seed, count)
    G = [x.T @ x / len(x) for x in X]
    mean = torch.stack(W).mean(0)
    tight = {"rtol": 1e-4, "atol": 1e-5}
    close(merged(W, [G[0]] * count, alpha=alpha), mean, **tight)
    close(merged([W[0]] * count, G, alpha=alpha), W[0], **tight)
    close(merged(W[:1], G[:1], alpha=alpha), W[0], **tight)
    close(merged(W, [torch.eye(4)] * count, alpha=0.0), mean, **tight)
    close(merged(W, G, alpha=alpha), merged(W, [5 * g for g in G], alpha=alpha), **tight)


def test_it_is_the_least_squares_solution():
    W, X = problem(0)
    G = [x.T @ x / len(x) for x in X]
    target = torch.cat([x @ w.T for x, w in zip(X, W, strict=True)])
    expected = torch.linalg.lstsq(torch.cat(X), target).solution.T
    close(merged(W, G, alpha=1.0, ridge=1e-9), expected, rtol=1e-4, atol=1e-5)
    weights = [1.0, 4.0, 0.25]
    root = [w**0.5 for w in weights]
    rows = torch.cat([r * x for r, x in zip(root, X, strict=True)])
    target = torch.cat([r * x @ w.T for r, x, w in zip(root, X, W, strict=True)])
    expected = torch.linalg.lstsq(rows, target).solution.T
    close(merged(W, G, alpha=1.0, ridge=1e-9, weights=weights), expected, rtol=1e-4, atol=1e-5)


def test_no_weight_fits_the_experts_outputs_better():
    W, X = problem(1)

    def loss(w):
        return sum(float((x @ (v - w).T).square().mean()) for x, v in zip(X, W, strict=True))

    best = merged(W, [x.T @ x / len(x) for x in X], alpha=1.0)
    g = torch.Generator().manual_seed(0)
    assert all(loss(best) < loss(best + 0.01 * torch.randn(2, 4, generator=g)) for _ in range(20))
    assert loss(best) < loss(torch.stack(W).mean(0))


def test_a_dead_input_gets_the_mean_and_a_strong_ridge_pulls_to_it():
    W, X = problem(2)
    for x in X:
        x[:, 1] = 0
    G = [x.T @ x / len(x) for x in X]
    result = merged(W, G, alpha=1.0)
    assert torch.isfinite(result).all()
    mean = torch.stack(W).mean(0)
    close(result[:, 1], mean[:, 1])
    near, far = (float((merged(W, G, ridge=ridge) - mean).norm()) for ridge in (1.0, 1e-6))
    assert near < far
    close(merged(W, [torch.zeros(4, 4)] * 3), mean)


def test_a_transposed_weight_is_merged_from_the_other_side():
    W, X = problem(3)
    G = [x.T @ x / len(x) for x in X]
    base = {"w": torch.zeros(4, 2)}
    flipped = regmean(base, [{"w": w.T.contiguous()} for w in W], grams=[{"w.T": g} for g in G])["w"]
    close(flipped.T, merged(W, G))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 10])
def test_the_contract(dtype, count):
    def model(seed):
        g = torch.Generator().manual_seed(seed)
        weights = {
            "w": torch.randn(2, 4, generator=g),
            "b": torch.randn(2, generator=g),
            "s": torch.randn((), generator=g),
        }
        return {k: v.to(dtype) for k, v in weights.items()} | {"e": torch.zeros(0, 2), "n": torch.tensor([seed])}

    base, experts = model(0), [model(seed) for seed in range(1, count + 1)]
    grams = [{"w": x.T @ x} for x in problem(0, count)[1]]
    copies = [{k: v.clone() for k, v in weights.items()} for weights in (base, *experts, *grams)]
    result = regmean(base, experts, grams=grams)
    assert list(result) == list(base)
    assert all((result[k].shape, result[k].dtype) == (v.shape, v.dtype) for k, v in base.items())
    assert torch.equal(result["n"], base["n"])
    for key in ("b", "s"):
        close(result[key], average(base, experts)[key], rtol=1e-2, atol=1e-2)
    for tensor in result.values():
        tensor.zero_()
    for weights, copy in zip((base, *experts, *grams), copies, strict=True):
        assert all(torch.equal(weights[key], copy[key]) for key in copy)


def test_files_are_streamed(tmp_path):
    W, X = problem(4, 2)
    weights = [{"w": w, "b": w[:, 0].clone()} for w in (torch.zeros(2, 4), *W)]
    paths = [save(w, tmp_path / f"{i}.safetensors") for i, w in enumerate(weights)]
    grams = [{"w": x.T @ x} for x in X]
    out = merge_files(regmean, paths[0], paths[1:], tmp_path / "out.safetensors", grams=grams, progress=False)
    whole = regmean(weights[0], weights[1:], grams=grams)
    assert all(torch.equal(tensor, whole[key]) for key, tensor in load(out).items())


def test_what_does_not_fit_is_named():
    W, X = problem(5, 2)
    base, experts, grams = {"w": W[0]}, [{"w": w} for w in W], [{"w": x.T @ x} for x in X]
    with pytest.raises(ValueError, match=r"grams must have one mapping per expert, 2, got 1"):
        regmean(base, experts, grams=grams[:1])
    with pytest.raises(
        IncompatibleWeights, match=r"'w': Gram \[2, 2\] in grams\[1\] for a weight \[2, 4\], expected \[4, 4\]"
    ):
        regmean(base, experts, grams=[grams[0], {"w": torch.eye(2)}])
    with pytest.raises(ValueError, match="grams have none of the model's weights, but x"):
        statistics(base, experts, grams=[{"x": torch.eye(4)}] * 2)
    with pytest.raises(ValueError, match="grams have none of the model's weights, but x"):
        regmean({**base, "b": W[0]}, [{**e, "b": W[0]} for e in experts], grams=[{"x": torch.eye(4)}] * 2)
    both = [{**g, "b": torch.eye(4)} if i == 0 else g for i, g in enumerate(grams)]
    with pytest.raises(ValueError, match=r"'b' is in grams\[0\] but not in grams\[1\]"):
        regmean({**base, "b": W[0]}, [{**e, "b": W[0]} for e in experts], grams=both)
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\], got 2 \(regmean\)"):
        regmean(base, experts, grams=grams, alpha=2)
    with pytest.raises(ValueError, match="weights must be at least 0"):
        regmean(base, experts, grams=grams, weights=[1.0, -1.0])
    with untyped(), pytest.raises(TypeError, match="grams must be a sequence of mappings"):
        regmean(base, experts, grams=grams[0])


# ---------------------------------------------------------------- recording
def test_grams_of_an_mlp_are_those_of_its_layers_inputs():
    model, x = MLP([5, 4, 3], "relu").train(), torch.randn(20, 5)
    grams = gram_matrices(model, [(x[:7], None), x[7:]])
    assert list(grams) == ["layers.0.weight", "layers.1.weight"]
    close(grams["layers.0.weight"], x.T @ x / 20)
    hidden = torch.relu(model.layers[0](x)).detach()
    close(grams["layers.1.weight"], hidden.T @ hidden / 20)
    assert model.training
    assert not any(layer._forward_pre_hooks for layer in model.modules())


def test_tokens_count_and_padding_does_not():
    model = tiny_bert()
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
    grams = gram_matrices(model, [{"input_ids": IDS, "attention_mask": mask}])
    key = "encoder.layer.0.attention.self.query.weight"
    h = model.embeddings(input_ids=IDS)[mask.bool()].detach()
    close(grams[key], h.T @ h / 10, rtol=1e-4, atol=1e-5)
    assert grams["pooler.dense.weight"].shape == (32, 32)  # one row a sequence, no mask


def test_conv1d_is_known_and_a_head_tied_to_an_embedding_is_left():
    grams = gram_matrices(tiny_gpt2(), [{"input_ids": IDS, "labels": IDS}])
    assert grams["transformer.h.0.attn.c_attn.weight.T"].shape == (32, 32)
    assert grams["transformer.h.0.mlp.c_proj.weight.T"].shape == (128, 128)
    assert not any("lm_head" in key or "wte" in key for key in grams)
    weights = [tiny_gpt2(seed).state_dict() for seed in range(3)]
    result = regmean(weights[0], weights[1:], grams=[grams, grams])
    close(
        result["transformer.h.0.attn.c_attn.weight"],
        average(weights[0], weights[1:])["transformer.h.0.attn.c_attn.weight"],
    )
    assert "lm_head.weight" in gram_matrices(tiny_llama(), [{"input_ids": IDS}])


def test_a_layer_used_twice_is_recorded_once_with_both_inputs():
    layer = nn.Linear(3, 3)
    model, x = nn.Sequential(layer, layer), torch.randn(6, 3)
    grams = gram_matrices(model, [x])
    rows = torch.cat([x, layer(x).detach()])
    assert list(grams) == ["0.weight"]
    close(grams["0.weight"], rows.T @ rows / 12)
    two = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    two[1].weight = two[0].weight
    assert list(gram_matrices(two, [x])) == ["0.weight"]


def test_what_cannot_be_recorded_is_named():
    with pytest.raises(ValueError, match=r"batches reached no linear layer of ReLU \(gram_matrices\)"):
        gram_matrices(nn.ReLU(), [torch.ones(2, 2)])
    with pytest.raises(ValueError, match="batches reached no linear layer"):
        gram_matrices(MLP([2, 2]), [])
    with pytest.raises(ValueError, match=r"the inputs of 'layers.0.weight' hold NaN or Inf"):
        gram_matrices(MLP([2, 2]), [torch.tensor([[1.0, float("inf")]])])
