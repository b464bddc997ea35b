"""OTA: the card's numbers, masks in the denominator, its aggregates and options, and the minimum that it is."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from notebook_kit.checkpoints import load, save
from notebook_kit.merging import (
    IncompatibleWeights,
    average,
    fast_fisher_graft,
    fisher,
    graft_masks,
    merge_files,
    ota,
)
from tests.merging.test_graft import model, moments_of

close = torch.testing.assert_close
ZERO = {"w": torch.zeros(2)}
DELTA = [{"w": torch.tensor([1.0, 1.0])}, {"w": torch.tensor([3.0, 1.0])}]
V = [{"w": torch.tensor([4.0, 1.0])}, {"w": torch.tensor([1.0, 9.0])}]


def merged(delta, v, **settings):
    base = {"w": torch.zeros(len(delta[0]))}
    moments = [{"w": torch.tensor(row)} for row in v]
    return ota(base, [{"w": torch.tensor(row)} for row in delta], moments=moments, **settings)["w"]


def test_the_hand_worked_example():
    close(ota(ZERO, DELTA, moments=V, density=1.0)["w"], torch.tensor([5 / 3, 1.0]))
    # scores 4, 1 and 9, 9: each keeps one; of the tie the last
    half = ota(ZERO, DELTA, moments=V, density=0.5)["w"]
    close(half, torch.tensor([1.0, 1.0]))
    one, two = graft_masks(ZERO, DELTA, moments=V, density=0.5)
    assert one["w"].tolist() == [True, False]
    assert two["w"].tolist() == [False, True]


def test_a_masked_edit_leaves_the_denominator():
    delta, v = [[4.0, 0.0, 0.0, 1.0], [0.0, 0.0, 6.0, 3.0]], [[1.0] * 4] * 2
    assert merged(delta, v, density=0.5).tolist() == [4, 0, 6, 2]
    assert merged(delta, v, density=1.0).tolist() == [2, 0, 3, 2]


@given(st.integers(0, 10**6), st.integers(1, 5))
@settings(deadline=None, max_examples=10)
def test_identities(seed, count):
    g = torch.Generator().manual_seed(seed)
    base = {"w": torch.randn(4, 3, generator=g), "b": torch.randn(5, generator=g)}
    experts = [{k: t + torch.randn(t.shape, generator=g) for k, t in base.items()} for _ in range(count)]
    moments = [{k: torch.rand(t.shape, generator=g) for k, t in base.items()} for _ in range(count)]
    first, v = experts[:1], moments[:1]
    grafted = fast_fisher_graft(base, first, moments=v, density=0.5)
    ours = ota(base, experts, moments=moments, density=0.4)
    mean = average(base, experts)
    pairs = [
        (ota(base, experts, moments=v * count, density=1.0), mean),
        (ota(base, experts, moments=moments, density=1.0, power=0.0), mean),
        (ota(base, first, moments=v, density=0.5), grafted),
        (ota(base, first * count, moments=v * count, density=0.5), grafted),
        (ota(base, first, moments=v, density=1.0), experts[0]),
        (ota(base, experts, moments=[{k: 4 * t for k, t in m.items()} for m in moments], density=0.4), ours),
        (ota(base, experts, moments=moments, density=0.0), base),
    ]
    for merged, expected in pairs:
        for key in base:
            close(merged[key], expected[key], rtol=1e-4, atol=1e-5)


def test_power_zero_is_the_mean_over_survivors():
    base, experts = model(0), [model(seed) for seed in (1, 2, 3)]
    moments = [moments_of(seed) for seed in (1, 2, 3)]
    ours = ota(base, experts, moments=moments, density=0.4, power=0.0)
    masks = graft_masks(base, experts, moments=moments, density=0.4)
    for key in moments[0]:
        m = torch.stack([mask[key] for mask in masks])
        delta = torch.stack([expert[key] - base[key] for expert in experts])
        expected = base[key] + (m * delta).sum(0) / m.sum(0).clamp(min=1)
        close(ours[key], expected)
        untouched = ~m.any(0)
        assert torch.equal(ours[key][untouched], base[key][untouched])


def test_disjoint_masks_add_up():
    base = {"w": torch.full((4,), 10.0)}
    experts = [{"w": base["w"] + torch.tensor(row)} for row in ([1.0, 2.0, 1e-3, 0.0], [0.0, 1e-3, 3.0, 4.0])]
    result = ota(base, experts, moments=[{"w": torch.ones(4)}, {"w": torch.full((4,), 7.0)}], density=0.5)
    close(result["w"], torch.tensor([11.0, 12.0, 13.0, 14.0]))


def test_it_is_the_weighted_least_squares_minimum():
    g = torch.Generator().manual_seed(0)
    delta, v = torch.randn(3, 6, generator=g), torch.rand(3, 6, generator=g)
    ours = merged(delta.tolist(), v.tolist(), density=1.0)

    def loss(theta):
        return float((v.sqrt() * (theta - delta).square()).sum())

    assert all(loss(ours) < loss(ours + 0.01 * torch.randn(6, generator=g)) for _ in range(20))


def test_without_grafting_it_is_fisher_merging_with_the_root_of_v():
    base, experts = model(0), [model(1), model(2)]
    moments = [moments_of(1), moments_of(2)]
    ours = ota(base, experts, moments=moments, density=1.0)
    theirs = fisher(base, experts, fishers=moments, power=0.5, normalize_fishers=False, fisher_floor=1e-12)
    for key in moments[0]:
        close(ours[key], theirs[key], rtol=1e-4, atol=1e-5)


def test_where_nobody_has_a_curvature_the_mean_of_the_survivors_stands():
    assert merged([[1.0, 1.0], [3.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]], density=1.0).tolist() == [2, 1]


# ---------------------------------------------------------------- options
def test_aggregates():
    delta, v = [[4.0, -1.0, 0.1], [2.0, 5.0, 0.1], [0.1, -2.0, 0.3]], [[1.0] * 3] * 3
    # density 2/3 keeps two edits of each: [4, -1, 0], [2, 5, 0], [0, -2, .3]
    settings = {"density": 0.67}
    close(merged(delta, v, aggregate="precond", **settings), torch.tensor([3.0, 2 / 3, 0.3]))
    close(merged(delta, v, aggregate="linear", **settings), torch.tensor([2.0, 2 / 3, 0.1]))
    close(merged(delta, v, aggregate="ties", **settings), torch.tensor([3.0, 5.0, 0.3]))
    close(merged(delta, v, aggregate="linear", scale=3.0, **settings), torch.tensor([6.0, 2.0, 0.3]))


def test_fallback():
    delta, v = [[4.0, 1.0], [6.0, 3.0]], [[1.0, 1.0]] * 2
    assert merged(delta, v, density=0.5).tolist() == [5, 0]
    assert merged(delta, v, density=0.5, fallback="mean").tolist() == [5, 2]


def test_expert_weights_and_normalized_moments():
    delta, v = [[1.0], [3.0]], [[4.0], [4.0]]
    assert merged(delta, v, density=1.0, weights=[3.0, 1.0]).tolist() == [1.5]
    assert merged(delta, v, density=1.0, weights=[3.0, 1.0], aggregate="linear").tolist() == [1.5]
    uneven = {"density": 1.0, "normalize_moments": True}
    close(merged([[1.0, 1.0], [3.0, 3.0]], [[4.0, 4.0], [100.0, 100.0]], **uneven), torch.tensor([2.0, 2.0]))
    for bad in ([1.0, -1.0], [0.0, 0.0]):
        with pytest.raises(ValueError, match="weights must be at least 0 and not all 0"):
            merged(delta, v, weights=bad)


def test_rescaling_gives_each_tensor_its_norm_back():
    base = {
        "m": torch.zeros(6, 5),
        "b": torch.zeros(20),
        "model.embed_tokens.weight": torch.zeros(7, 3),
        "k": torch.zeros(2, 3, 4),
    }
    g = torch.Generator().manual_seed(0)
    expert = {key: torch.randn(t.shape, generator=g) for key, t in base.items()}
    v = {key: torch.rand(t.shape, generator=g) for key, t in base.items()}
    result = ota(base, [expert], moments=[v], density=0.3, rescale=True)
    (mask,) = graft_masks(base, [expert], moments=[v], density=0.3)

    def spectral(t):
        return torch.linalg.matrix_norm(t.reshape(len(t), -1), ord=2)

    close(spectral(result["m"]), spectral(expert["m"]))
    close(spectral(result["k"]), spectral(expert["k"]))
    close(result["b"].norm(), expert["b"].norm())

    def longest(t):
        return t.norm(dim=0).max()

    close(longest(result["model.embed_tokens.weight"]), longest(expert["model.embed_tokens.weight"]))
    for key in base:
        assert (result[key][~mask[key]] == 0).all()
        ratio = result[key][mask[key]] / expert[key][mask[key]]
        close(ratio, torch.full_like(ratio, float(ratio[0])))
    silent = {**v, "m": v["m"] * 1e-30}
    assert ota(base, [expert], moments=[silent], density=0.3, rescale=True)["m"].abs().sum() == 0


# ---------------------------------------------------------------- contract
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 10])
@pytest.mark.parametrize(
    "options", [{}, {"curvature": "rank1", "aggregate": "ties"}, {"rescale": True, "fallback": "mean"}]
)
def test_the_contract(dtype, count, options):
    base, experts = model(0, dtype), [model(seed, dtype) for seed in range(1, count + 1)]
    moments = [moments_of(seed) for seed in range(count)]
    copies = [{k: t.clone() for k, t in weights.items()} for weights in (base, *experts, *moments)]
    result = ota(base, experts, moments=moments, **options)
    assert list(result) == list(base)
    for key, tensor in base.items():
        assert (result[key].shape, result[key].dtype) == (tensor.shape, tensor.dtype)
        assert torch.isfinite(result[key].float()).all()
    assert torch.equal(result["steps"], base["steps"])
    for tensor in result.values():
        tensor.zero_()
    for weights, copy in zip((base, *experts, *moments), copies, strict=True):
        assert all(torch.equal(weights[key], copy[key]) for key in copy)


@pytest.mark.parametrize("options", [{}, {"rescale": True, "normalize_moments": True, "aggregate": "ties"}])
def test_pieces_change_nothing(options, monkeypatch):
    base, experts, moments = model(0), [model(1), model(2)], [moments_of(1), moments_of(2)]
    whole = ota(base, experts, moments=moments, density=0.3, **options)
    monkeypatch.setattr(sys.modules["notebook_kit.merging.contract"], "PIECE", 7)
    pieces = ota(base, experts, moments=moments, density=0.3, **options)
    assert all(torch.equal(pieces[key], whole[key]) for key in whole)


def test_a_tensor_without_moments_is_averaged():
    base, experts = (
        {**ZERO, "buffer": torch.zeros(3)},
        [{**d, "buffer": torch.full((3,), 2.0 * i)} for i, d in enumerate(DELTA)],
    )
    assert ota(base, experts, moments=V)["buffer"].tolist() == [1, 1, 1]
    assert ota(base, experts, moments=V, weights=[1.0, 3.0])["buffer"].tolist() == [1.5] * 3


@pytest.mark.parametrize(
    "options",
    [{"density": 0.3}, {"density": 0.5, "curvature": "svd", "rank": 2}, {"rescale": True, "aggregate": "linear"}],
)
def test_files_are_streamed(tmp_path, options):
    weights, moments = [model(seed) for seed in range(3)], [moments_of(seed) for seed in range(2)]
    paths = [save(w, tmp_path / f"{i}.safetensors") for i, w in enumerate(weights)]
    out = merge_files(
        ota, paths[0], paths[1:], tmp_path / "out.safetensors", progress=False, moments=moments, **options
    )
    whole, streamed = ota(weights[0], weights[1:], moments=moments, **options), load(out)
    assert all(torch.equal(streamed[key], whole[key]) for key in whole)


def test_moments_may_lie_on_disk(tmp_path):
    from notebook_kit.checkpoints import Checkpoint

    base, experts, moments = model(0), [model(1), model(2)], [moments_of(1), moments_of(2)]
    lazy = [Checkpoint(save(v, tmp_path / f"{i}.safetensors")) for i, v in enumerate(moments)]
    ours, whole = (ota(base, experts, moments=m, curvature="rank1") for m in (lazy, moments))
    assert all(torch.equal(ours[key], whole[key]) for key in whole)


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"moments must have one mapping per expert, 2, got 1"):
        ota(ZERO, DELTA, moments=V[:1])
    with pytest.raises(IncompatibleWeights, match=r"'w': shape \[2\] in base, \[3\] in moments\[1\]"):
        ota(ZERO, DELTA, moments=[V[0], {"w": torch.ones(3)}])
    with pytest.raises(ValueError, match=r"epsilon must be in \[1e-30, 1e-08\], got 0.1 \(ota\)"):
        ota(ZERO, DELTA, moments=V, epsilon=0.1)
    with pytest.raises(ValueError, match="aggregate must be one of 'precond', 'linear', 'ties'"):
        ota(ZERO, DELTA, moments=V, aggregate="mean")
