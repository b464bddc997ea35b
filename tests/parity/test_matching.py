"""ZipIt's greedy matching and merging against the published algorithm, written plainly with whole matrices."""

import pytest
import torch
from torch.func import functional_call

from notebook_kit import zoo
from notebook_kit.alignment import feature_correlation, greedy_unions, permutation_spec, unit_activations, zipit
from notebook_kit.data import digits
from notebook_kit.models import MLP


def published(correlation, n_models, remainder, alpha, beta):
    """Stoica et al.: rows and columns are deleted one by one; returns P [units, groups]."""
    sims = correlation.double().clone()
    units = len(sims)
    n = units // n_models
    p = torch.eye(units)
    sims.fill_diagonal_(-torch.inf)
    origin = torch.arange(units) // n
    budget = torch.full((n_models,), int((units - remainder) // n_models * beta + 1e-4))
    while p.shape[1] > remainder:
        flat = int(sims.reshape(-1).argmax())
        row, column = sorted((flat // len(sims), flat % len(sims)))
        p[:, row] += p[:, column]
        keep = torch.arange(len(sims)) != column
        sims[:, row] = torch.minimum(sims[:, row], sims[:, column]) * alpha
        sims[row] = sims[:, row]  # the official order scales the corner twice, which is -inf anyhow
        within, owner = origin[row] == origin[column], origin[row]
        sims, p, origin = sims[keep][:, keep], p[:, keep], origin[keep]
        if within:
            budget[owner] -= 1
            if budget[owner] <= 0:
                mine = origin == owner
                sims[mine[:, None] & mine] = -torch.inf
    return p


@pytest.mark.parametrize("beta", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("alpha", [0.3, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_greedy_unions_are_the_published_ones(alpha, beta, seed):
    x = torch.randn(60, 8, generator=torch.Generator().manual_seed(seed))
    z = torch.relu(x @ torch.randn(8, 48, generator=torch.Generator().manual_seed(seed + 9)))
    correlation = feature_correlation(z)
    p = published(correlation, 2, 24, alpha, beta)
    ours = greedy_unions(correlation, 2, 24, alpha=alpha, beta=beta)
    assert ours.tolist() == p.argmax(1).tolist()
    assert (p.sum(1) == 1).all()


@pytest.mark.parametrize("depth", [1, 2, None])
def test_zipped_weights_are_m_w_u(depth):
    bed = zoo.digit_twins(32)
    models = [MLP([64, 32, 32, 10]) for _ in "AB"]
    for model, weights in zip(models, bed.experts, strict=True):
        model.load_state_dict(weights)
    x, spec = digits("train")[0][:300], permutation_spec(models[0])
    zipped = zipit(spec, models, [x], reduction=0.5, alpha=0.3, beta=0.5, depth=depth)
    n_zipped = 2 if depth is None else depth
    merge, unmerge = [[torch.eye(64)] * 2], [[torch.eye(64)] * 2]
    for layer in range(n_zipped):
        z = torch.cat([unit_activations(spec, model, [x])[f"layers.{layer}"] for model in models], 1)
        correlation = feature_correlation(z)
        silent = (z == 0).all(0)
        correlation[silent[:, None] & silent] = 1.0
        p = published(correlation, 2, 32, 0.3, 0.5)
        merge.append((p / p.sum(0)).T.chunk(2, dim=1))
        unmerge.append(p.chunk(2, dim=0))
    for i, weights in enumerate(zipped.weights):
        h = x
        for layer in range(3):
            w, b = ([model.state_dict()[f"layers.{layer}.{key}"] for model in models] for key in ("weight", "bias"))
            read = unmerge[layer] if layer <= n_zipped else None
            if layer < n_zipped:
                w = (
                    sum(m @ v @ u for m, v, u in zip(merge[layer + 1], w, read, strict=True))
                    if layer
                    else sum(m @ v for m, v in zip(merge[1], w, strict=True))
                )
                b = sum(m @ v for m, v in zip(merge[layer + 1], b, strict=True))
            elif layer == n_zipped and depth is None:
                w, b = sum(v @ u for v, u in zip(w, read, strict=True)) / 2, sum(b) / 2
            elif layer == n_zipped:
                w, b = w[i] @ read[i], b[i]
            else:
                w, b = w[i], b[i]
            h = h @ w.T + b
            h = torch.relu(h) if layer < 2 else h
        with torch.no_grad():
            torch.testing.assert_close(functional_call(models[i], weights, (x,)), h, atol=1e-4, rtol=1e-4)
