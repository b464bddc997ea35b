"""Weight matching against the published algorithm, written plainly; merged experts against transformers' own block."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from notebook_kit import zoo
from notebook_kit.alignment import permutation_spec, permute, weight_matching
from notebook_kit.expert_merging import expert_view, m_smoe, plan_m_smoe, usage_of
from notebook_kit.models import MLP
from tests.expert_merging.moes import prepared


def published(a, b, n_layers, seed, max_iter=100):
    """Algorithm 1 of Ainsworth et al. for an MLP, every similarity recomputed at every step."""
    a, b = ({key: tensor.double().numpy() for key, tensor in weights.items()} for weights in (a, b))
    perms = [np.arange(len(a[f"layers.{i}.bias"])) for i in range(n_layers - 1)]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(max_iter):
        progress = False
        for i in torch.randperm(n_layers - 1, generator=generator).tolist():
            into = b[f"layers.{i}.weight"]
            if i > 0:
                into = into[:, perms[i - 1]]
            out = b[f"layers.{i + 1}.weight"]
            if i + 1 < n_layers - 1:
                out = out[perms[i + 1]]
            c = a[f"layers.{i}.weight"] @ into.T + a[f"layers.{i + 1}.weight"].T @ out
            c += np.outer(a[f"layers.{i}.bias"], b[f"layers.{i}.bias"])
            _, new = linear_sum_assignment(c, maximize=True)
            rows = np.arange(len(c))
            progress = progress or c[rows, new].sum() > c[rows, perms[i]].sum() + 1e-9
            perms[i] = new
        if not progress:
            break
    return perms


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("widths", [[8, 20, 5], [8, 24, 16, 12, 5]])
def test_weight_matching_is_the_published_algorithm(widths, seed):
    torch.manual_seed(seed)
    # In float64 both: near ties would fall either way.
    a, b = MLP(widths).double().state_dict(), MLP(widths).double().state_dict()
    found = weight_matching(permutation_spec(MLP(widths)), a, b, seed=seed)
    for ours, theirs in zip(found.values(), published(a, b, len(widths) - 1, seed), strict=True):
        assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize("width", [32, 64])
def test_on_trained_twins_too(width):
    bed = zoo.digit_twins(width)
    a, b = bed.experts
    found = weight_matching(permutation_spec(bed.model), a, b, seed=3)
    for ours, theirs in zip(found.values(), published(a, b, 3, 3), strict=True):
        assert ours.tolist() == theirs.tolist()
    assert permute(permutation_spec(bed.model), found, b).keys() == a.keys()


def test_a_merged_block_computes_the_formula():
    model, trace, _ = prepared()
    new = m_smoe(model, trace, n_experts=3, align=False)
    plan, usage = plan_m_smoe(model, trace, n_experts=3), usage_of(trace, model)
    x = torch.randn(11, 32, generator=torch.Generator().manual_seed(0))
    for layer, merged in zip(expert_view(model), expert_view(new), strict=True):
        f, groups = usage[layer.name].double(), plan[layer.name].groups
        stored = [
            tuple(
                sum(f[i] * part[i].double() for i in group) / f[list(group)].sum()
                for part in (layer.gate, layer.up, layer.down)
            )
            for group in groups
        ]
        top = (x @ layer.router.T).softmax(-1).double().topk(2)
        expected = torch.zeros(11, 32).double()
        for token in range(11):
            for weight, expert in zip(top.values[token] / top.values[token].sum(), top.indices[token], strict=True):
                gate, up, down = stored[plan[layer.name].expert_map[expert]]
                v = x[token].double()
                expected[token] += weight * (down @ (torch.nn.functional.silu(gate @ v) * (up @ v)))
        torch.testing.assert_close(merged.block(x[None])[0], expected.float(), atol=1e-4, rtol=1e-4)
