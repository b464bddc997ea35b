import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from notebook_kit import models
from notebook_kit.alignment import (
    interpolate,
    noise_inputs,
    permutation_spec,
    permute,
    pleas,
    random_permutations,
    reset_batch_norm,
    split_widths,
    weight_matching,
)
from notebook_kit.alignment.pleas_layers import build, layer_errors
from notebook_kit.alignment.pleas_pair import read_pair
from notebook_kit.alignment.pleas_plan import cost_of, plan_pleas
from notebook_kit.alignment.split_layer import Split, SplitLayer
from notebook_kit.diagnostics.transport import compute_table
from notebook_kit.models import MLP
from notebook_kit.weights import IncompatibleWeights


def mlps(widths=(8, 16, 12, 5)):
    torch.manual_seed(0)
    return MLP(list(widths)), MLP(list(widths)), torch.randn(200, widths[0])


def permuted(model):
    spec = permutation_spec(model)
    other = copy.deepcopy(model)
    other.load_state_dict(permute(spec, random_permutations(spec, seed=3), model.state_dict()))
    return other


def vggs(x):
    torch.manual_seed(0)
    pair = [models.VGG((4, 6), hidden=8) for _ in "ab"]
    for model in pair:
        reset_batch_norm(model, [x])
    return [model.eval() for model in pair]


@torch.no_grad()
def apart(one, other, x):
    return (one(x) - other(x)).abs().max().item()


def mean_of(a, b):
    return lambda x: (a(x) + b(x)) / 2


@pytest.mark.parametrize("least_squares", [True, False])
def test_budget_two_is_the_mean_of_both(least_squares):
    a, b, x = mlps()
    joined = pleas(a, b, [x], budget=2.0, least_squares=least_squares)
    assert apart(joined, mean_of(a, b), torch.randn(50, 8)) < 1e-5
    assert split_widths(joined)["layers.0"] == (0, 16, 16)


@pytest.mark.parametrize("align", ["activation", "weight"])
@pytest.mark.parametrize("least_squares", [True, False])
def test_a_permuted_copy_merged_whole_is_the_original(least_squares, align):
    a, _, x = mlps()
    joined = pleas(a, permuted(a), [x], align=align, least_squares=least_squares)
    assert apart(joined, a, torch.randn(50, 8)) < 1e-5
    assert split_widths(joined)["layers.1"] == (12, 0, 0)


def test_full_merge_without_refit_is_git_re_basin():
    a, b, x = mlps()
    spec = permutation_spec(a)
    matched = permute(spec, weight_matching(spec, a.state_dict(), b.state_dict()), b.state_dict())
    half = copy.deepcopy(a)
    half.load_state_dict(interpolate(a.state_dict(), matched, 0.5))
    assert apart(pleas(a, b, align="weight", least_squares=False), half, x) < 1e-5


@pytest.mark.parametrize("ridge", [1e-8, 1e-3, 1.0])
@pytest.mark.parametrize("budget", [1.0, 1.3, 1.7])
@pytest.mark.parametrize("net", ["mlp", "vgg"])
def test_least_squares_are_never_worse_than_the_average_on_their_own_objective(net, budget, ridge):
    if net == "mlp":
        a, b, x = mlps()
    else:
        x = torch.rand(40, 64)
        a, b = vggs(x)
    pair = read_pair(a, b, [x])
    plan = plan_pleas(pair, budget=budget, align="activation", allocation="uniform", heads="shared")
    fitted = layer_errors(build(pair, plan, "shared", ridge, [x]), pair, plan)
    plain = layer_errors(build(pair, plan, "shared", None, [x]), pair, plan)
    assert list(fitted) == pair.layers
    for name in fitted:
        assert fitted[name] <= plain[name] * (1 + 1e-6) + 1e-10
    assert sum(fitted.values()) < 0.95 * sum(plain.values()) or ridge == 1.0


def test_a_smaller_ridge_fits_better():
    a, b, x = mlps()
    pair = read_pair(a, b, [x])
    plan = plan_pleas(pair, budget=1.2, align="activation", allocation="uniform", heads="shared")
    errors = [sum(layer_errors(build(pair, plan, "shared", r, [x]), pair, plan).values()) for r in (100.0, 0.1, 1e-6)]
    assert errors[0] > errors[1] > errors[2]


def test_one_unit_by_hand():
    a, b = (nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)) for _ in "ab")
    with torch.no_grad():
        for model, weights in ((a, (2.0, 1.0)), (b, (4.0, 1.0))):
            for layer, weight in zip(model, weights, strict=True):
                layer.weight.fill_(weight)
    joined = pleas(a, b, [torch.tensor([[1.0], [2.0]])], ridge=1e-8)
    assert joined[0].rows["merged"].weight.item() == pytest.approx(3.0)


def test_block_average_by_hand():
    a, b = (nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False)) for _ in "ab")
    with torch.no_grad():
        a[0].weight.copy_(torch.tensor([[1.0], [10.0]])), a[1].weight.copy_(torch.tensor([[2.0, 4.0]]))
        b[0].weight.copy_(torch.tensor([[3.0], [50.0]])), b[1].weight.copy_(torch.tensor([[6.0, 8.0]]))
    joined = pleas(a, b, align="none", least_squares=False, budget=1.5)
    # the pair (10, 50) is the worse one: units [½(1+3) | 10 | 50], read with [½(2+6) | ½·4 | ½·8]
    assert joined[0].rows["merged"].weight.tolist() == [[2.0]]
    assert joined[0].rows["a"].weight.tolist() == [[10.0]]
    assert joined[0].rows["b"].weight.tolist() == [[50.0]]
    assert joined[1].rows["merged"].weight.tolist() == [[4.0, 2.0, 4.0]]


def test_missing_blocks_are_not_there():
    like = nn.Linear(4, 4)
    layer = SplitLayer(like, Split(2, 2, 2), Split(2, 2, 2))
    assert {name: tuple(rows.weight.shape) for name, rows in layer.rows.items()} == {
        "merged": (2, 6), "a": (2, 4), "b": (2, 4),
    }  # fmt: skip
    x = torch.randn(3, 6)
    other = x.clone()
    other[:, 4:] += 1  # b's own inputs
    with torch.no_grad():
        for rows in layer.rows.values():
            rows.weight.normal_(), rows.bias.zero_()
        assert torch.equal(layer(x)[:, 2:4], layer(other)[:, 2:4])
        assert not torch.equal(layer(x)[:, 4:], layer(other)[:, 4:])


def test_cost_factor_and_width():
    a, b, _ = mlps((8, 8, 8, 8))
    pair = read_pair(a, b, None)
    middle = [cost_of(pair, "shared", {"layers.0": r, "layers.1": r}) for r in (0.0, 0.5, 1.0)]
    # layers of equal size: (1 + r), (1 + r)² − 2r², (1 + r)
    assert middle == pytest.approx([1.0, (1.5 + 1.75 + 1.5) / 3, 2.0])
    plan = plan_pleas(pair, budget=1.3125, align="none", allocation="uniform", heads="shared")
    assert plan.widths["layers.0"] == (6, 2, 2)  # r = 0.25 of 8: 10 units


@settings(deadline=None, max_examples=15)
@given(
    budget=st.floats(1, 2),
    allocation=st.sampled_from(["uniform", "late", "score"]),
    widths=st.lists(st.integers(2, 12), min_size=3, max_size=5),
)
def test_the_budget_is_kept_and_counted_exactly(budget, allocation, widths):
    a, b, x = mlps(widths)
    target = mean_of(a, b)
    joined = pleas(
        a, b, [x], budget=budget, allocation=allocation, score=lambda m: -(m(x) - target(x)).square().mean().item()
    )
    counted, base = compute_table(joined, x), compute_table(a, x)
    assert counted["multiply_adds"].sum() <= budget * base["multiply_adds"].sum() + 1e-6
    assert counted["parameters"].sum() == sum(p.numel() for p in joined.parameters())
    expected = 0
    before = Split(widths[0], 0, 0)
    for split in split_widths(joined).values():
        expected += split.merged * sum(before) + (split.a + split.b) * (before.merged + before.a)
        before = split
    assert counted["multiply_adds"].sum() == expected


def test_more_budget_never_shrinks_a_layer():
    a, b, x = mlps()
    kept = [sum(s.a for s in split_widths(pleas(a, b, [x], budget=c)).values()) for c in (1.0, 1.2, 1.5, 1.8, 2.0)]
    assert kept == sorted(kept)
    assert kept[0] == 0
    assert kept[-1] == 28


def test_late_allocation_spends_on_the_last_layer_first():
    a, b, x = mlps()
    widths = split_widths(pleas(a, b, [x], budget=1.3, allocation="late"))
    assert widths["layers.0"].a == 0
    assert widths["layers.1"].a > 0


def test_score_allocation_spends_where_it_helps():
    # The first layers are one and the same: only the second needs to be kept apart.
    a, b, x = mlps()
    b.layers[0].load_state_dict(a.layers[0].state_dict())
    target = mean_of(a, b)
    widths = split_widths(
        pleas(a, b, [x], budget=1.4, allocation="score", score=lambda m: -(m(x) - target(x)).square().mean().item())
    )
    assert widths["layers.1"].a / 12 > widths["layers.0"].a / 16


def test_the_worst_pairs_are_kept_apart():
    a, _, x = mlps()
    b = copy.deepcopy(a)
    with torch.no_grad():
        b.layers[0].weight[[3, 7]] = torch.randn(2, 8) * 3
    pair = read_pair(a, b, [x])
    plan = plan_pleas(pair, budget=1.3, align="activation", allocation="uniform", heads="shared")
    assert {3, 7} <= set(plan.separate["layers.0"].tolist())


def test_convolutions_with_batch_norm():
    x = torch.rand(40, 64)
    a, b = vggs(x)
    assert apart(pleas(a, b, [x], budget=2.0), mean_of(a, b), x) < 1e-4
    assert apart(pleas(a, permuted(a), [x]), a, x) < 1e-4
    joined = pleas(a, b, [x], budget=1.4)
    assert isinstance(joined, models.VGG)
    base = compute_table(a, x)["multiply_adds"].sum()
    assert 1.2 * base < compute_table(joined, x)["multiply_adds"].sum() <= 1.4 * base


def test_two_heads_keep_both_label_spaces():
    a, _, x = mlps()
    b = MLP([8, 16, 12, 3])
    joined = pleas(a, b, [x], budget=2.0, heads="separate")
    assert apart(joined, lambda x: torch.cat([a(x), b(x)], 1), x) < 1e-5
    small = pleas(a, b, [x], budget=1.0, heads="separate")
    assert split_widths(small) == {"layers.0": (16, 0, 0), "layers.1": (12, 0, 0), "layers.2": (0, 5, 3)}
    assert small(x).shape == (200, 8)
    copies = pleas(a, permuted(a), [x], heads="separate")
    assert apart(copies, lambda x: torch.cat([a(x), a(x)], 1), x) < 1e-5


def test_noise_has_two_numbers_of_the_data_and_nothing_else():
    x = torch.rand(400, 30) * 3
    noise = noise_inputs(x, n=1000)
    assert noise.shape == (1000, 30)
    assert torch.equal(noise, noise_inputs(x, n=1000))
    assert abs(noise.mean() - x.mean()) < 0.02
    assert abs(noise.std() - x.std()) < 0.02
    a, b, x = mlps()
    assert apart(pleas(a, b, [noise_inputs(x)], budget=2.0), mean_of(a, b), x) < 1e-5


def test_networks_are_not_modified_and_the_class_stays():
    torch.manual_seed(0)
    a, b = models.DigitEncoder(10), models.DigitEncoder(10)
    before = copy.deepcopy(a.state_dict())
    joined = pleas(a, b, [torch.rand(100, 64)], budget=1.3)
    assert isinstance(joined, models.DigitEncoder)
    assert joined(torch.rand(4, 64)).shape == (4, 10)
    assert all(torch.equal(before[key], tensor) for key, tensor in a.state_dict().items())


def test_bad_input():
    a, b, x = mlps()
    for budget in (0.9, 2.1, float("nan")):
        with pytest.raises(ValueError, match=r"budget must be in \[1, 2\]"):
            pleas(a, b, [x], budget=budget)
    with pytest.raises(ValueError, match='align="activation" and least_squares=True needs batches'):
        pleas(a, b)
    with pytest.raises(ValueError, match="least_squares=True needs batches"):
        pleas(a, b, align="weight")
    with pytest.raises(ValueError, match="at least one batch"):
        pleas(a, b, [])
    with pytest.raises(ValueError, match='allocation="score" needs score'):
        pleas(a, b, [x], allocation="score")
    with pytest.raises(IncompatibleWeights, match=r"'layers.0.weight' has shape \[16, 8\] in model_a and \[20, 8\] in"):
        pleas(a, MLP([8, 20, 12, 5]), [x])
    with pytest.raises(IncompatibleWeights, match="is only in model_a"):
        pleas(a, MLP([8, 16, 5]), [x])
    with pytest.raises(IncompatibleWeights, match="one architecture"):
        pleas(a, nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 5)), [x])
    with pytest.raises(ValueError, match="pleas knows MLP"):
        pleas(models.tiny_vit(), models.tiny_vit(), [x])
    normed = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 5))
    with pytest.raises(ValueError, match="LayerNorm, whose mean over units changes"):
        pleas(normed, copy.deepcopy(normed), [x])
    convolutions = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3))
    with pytest.raises(ValueError, match="convolutions need batches"):
        pleas(convolutions, copy.deepcopy(convolutions), align="weight", least_squares=False)
    broken = copy.deepcopy(b)
    broken.layers[0].bias.data[0] = float("inf")
    with pytest.raises(ValueError, match=r"'layers.0.bias' of model_b holds NaN or Inf"):
        pleas(a, broken, [x])
    with pytest.raises(ValueError, match="of model_a hold NaN or Inf on these batches"):
        pleas(a, b, [torch.full((3, 8), float("nan"))])
