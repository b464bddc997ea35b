"""Grafting: exact shares, nested masks, the smallest loss of all masks, and moments in a fraction of the space."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from notebook_kit.checkpoints import load, save
from notebook_kit.merging import (
    IncompatibleWeights,
    compress_moment,
    fast_fisher_graft,
    graft_density,
    graft_masks,
    merge_files,
    ranks,
    restore_moment,
    selection,
    squared_gradients,
    stored_numbers,
)

close = torch.testing.assert_close


def model(seed, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (6, 5), "a.bias": (7,), "scalar": (), "empty": (0, 2), "c": (40,)}
    return {k: torch.randn(s, generator=g).to(dtype) for k, s in shapes.items()} | {"steps": torch.tensor([seed])}


def moments_of(seed):
    return {key: tensor.square() for key, tensor in model(1000 + seed).items() if key != "steps"}


def graft(delta, v, **settings):
    base = {"w": torch.zeros(len(delta))}
    return fast_fisher_graft(base, [{"w": torch.tensor(delta)}], moments=[{"w": torch.tensor(v)}], **settings)["w"]


# ---------------------------------------------------------------- masks
def test_by_hand():
    delta, v = [1.0, -2.0, 3.0, 0.5], [9.0, 1.0, 0.1, 40.0]  # v Δ²: 9, 4, 0.9, 10
    assert graft(delta, v, density=0.5).tolist() == [1, 0, 0, 0.5]
    assert graft(delta, v, density=0.5, importance="magnitude").tolist() == [0, -2, 3, 0]
    assert graft(delta, v, density=0.5, importance="curvature").tolist() == [1, 0, 0, 0.5]
    assert graft(delta, v, density=0.25, scale=2.0).tolist() == [0, 0, 0, 1]
    assert graft(delta, v, density=0.0).tolist() == [0, 0, 0, 0]
    assert graft(delta, v, density=1.0).tolist() == delta


def test_layers_compete_for_one_budget():
    base = {"small": torch.zeros(4), "large": torch.zeros(4)}
    expert = {"small": torch.ones(4), "large": torch.ones(4)}
    v = {"small": torch.arange(1.0, 5.0), "large": 10 * torch.arange(1.0, 5.0)}
    (mask,) = graft_masks(base, [expert], moments=[v], density=0.5)
    assert mask["small"].sum() == 0
    assert mask["large"].all()


@given(st.integers(0, 10**6), st.floats(0, 1), st.sampled_from(["fisher", "magnitude", "curvature"]), st.booleans())
@settings(deadline=None, max_examples=40)
def test_exactly_the_share_is_kept_even_where_scores_tie(seed, density, importance, integers):
    g = torch.Generator().manual_seed(seed)
    draw = (
        (lambda n: torch.randint(1, 4, (n,), generator=g).float())
        if integers
        else (lambda n: torch.rand(n, generator=g))
    )
    base = {"a": torch.zeros(17), "b": torch.zeros(13)}
    expert, v = ({"a": draw(17) + 0.1, "b": draw(13) + 0.1} for _ in range(2))
    (mask,) = graft_masks(base, [expert], moments=[v], density=density, importance=importance)
    kept = torch.cat([mask["a"], mask["b"]])
    assert int(kept.sum()) == int(density * 30)
    score = torch.cat(
        [{"fisher": v[k] * expert[k] ** 2, "magnitude": expert[k], "curvature": v[k]}[importance] for k in base]
    )
    assert not kept.any() or kept.all() or score[kept].min() >= score[~kept].max() * (1 - 1e-5)


@given(st.integers(0, 10**6), st.floats(0, 1), st.floats(0, 1), st.floats(1e-6, 1e6))
@settings(deadline=None, max_examples=20)
def test_masks_are_nested_and_know_no_scale(seed, one, other, factor):
    base, expert, v = model(0), model(seed), moments_of(seed)
    low, high = sorted((one, other))
    small, large = (graft_masks(base, [expert], moments=[v], density=d)[0] for d in (low, high))
    assert all((~small[key] | large[key]).all() for key in small)
    scaled = graft_masks(
        base, [expert], moments=[{k: 2.0 ** round(factor % 9) * t for k, t in v.items()}], density=low
    )[0]
    assert sum(int((scaled[key] != small[key]).sum()) for key in small) <= 2  # rounding of roots at the edge


def test_of_all_masks_of_its_size_it_has_the_smallest_loss():
    g = torch.Generator().manual_seed(0)
    delta, v = torch.randn(8, generator=g), torch.rand(8, generator=g)
    for kept in range(9):
        ours = graft(delta.tolist(), v.tolist(), density=kept / 8)

        def loss(theta):
            return float(0.5 * (v * (theta - delta).square()).sum())

        best = min(
            loss(torch.zeros(8).index_put((torch.tensor(m, dtype=torch.long),), delta[list(m)]))
            for m in itertools.combinations(range(8), kept)
        )
        assert loss(ours) == pytest.approx(best, abs=1e-6)


def test_edits_without_a_score_are_never_grafted_unless_all_are():
    assert graft([1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 1.0], density=0.75).tolist() == [0, 0, 0, 4]
    assert graft([1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 1.0], density=1.0).tolist() == [1, 2, 3, 4]


def test_what_float32_cannot_square_is_still_ranked():
    assert graft([1e-15, 2e-15, 3e-15], [1e-25] * 3, density=0.34).tolist() == pytest.approx([0, 0, 3e-15])


def test_pieces_and_brackets_change_nothing(monkeypatch):
    base, expert, v = model(0), model(1), moments_of(1)
    whole = graft_masks(base, [expert], moments=[v], density=0.3)[0]
    monkeypatch.setattr(selection, "CHUNK", 7)
    monkeypatch.setattr(ranks, "SAMPLE", 16)
    again = graft_masks(base, [expert], moments=[v], density=0.3)[0]
    assert all(torch.equal(again[key], whole[key]) for key in whole)


def test_a_tensor_without_moments_stays_the_experts_and_does_not_count():
    base, expert = {"w": torch.zeros(4), "buffer": torch.zeros(9)}, {"w": torch.ones(4), "buffer": torch.ones(9)}
    merged = fast_fisher_graft(base, [expert], moments=[{"w": torch.arange(4.0) + 1}], density=0.5)
    assert merged["w"].tolist() == [0, 0, 1, 1]
    assert merged["buffer"].tolist() == [1] * 9
    assert list(graft_masks(base, [expert], moments=[{"w": torch.ones(4)}], density=0.5)[0]) == ["w"]


def test_tied_weights_count_once_and_stay_equal():
    shared, edited = torch.zeros(6), torch.arange(1.0, 7.0)
    base = {"embed": shared, "head": shared, "b": torch.zeros(6)}
    expert = {"embed": edited, "head": edited, "b": torch.full((6,), 9.0)}
    result = fast_fisher_graft(base, [expert], moments=[{"embed": torch.ones(6), "b": torch.ones(6)}], density=0.75)
    assert torch.equal(result["embed"], result["head"])
    assert int(result["embed"].count_nonzero() + result["b"].count_nonzero()) == 9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("curvature", ["full", "rank1", "svd"])
def test_the_contract(dtype, curvature):
    base, expert, v = model(0, dtype), model(1, dtype), moments_of(1)
    copies = [{k: t.clone() for k, t in weights.items()} for weights in (base, expert, v)]
    merged = fast_fisher_graft(base, [expert], moments=[v], density=0.5, curvature=curvature, rank=2)
    assert list(merged) == list(base)
    for key, tensor in base.items():
        assert (merged[key].shape, merged[key].dtype) == (tensor.shape, tensor.dtype)
        if key != "steps":
            assert ((merged[key] == tensor) | (merged[key] == expert[key])).all()  # one or the other, bit for bit
    assert torch.equal(merged["steps"], base["steps"])
    changed = sum(int((merged[key] != base[key]).sum()) for key in v)
    assert changed == int(0.5 * 78)
    for tensor in merged.values():
        tensor.zero_()
    for weights, copy in zip((base, expert, v), copies, strict=True):
        assert all(torch.equal(weights[key], copy[key]) for key in copy)


@pytest.mark.parametrize("curvature", ["full", "rank1", "svd"])
def test_files_are_streamed(tmp_path, curvature):
    base, expert, v = model(0), model(1), moments_of(1)
    paths = [save(w, tmp_path / f"{i}.safetensors") for i, w in enumerate((base, expert))]
    options = {"moments": [v], "density": 0.3, "curvature": curvature, "rank": 2}
    out = merge_files(fast_fisher_graft, paths[0], paths[1:], tmp_path / "out.safetensors", progress=False, **options)
    whole, streamed = fast_fisher_graft(base, [expert], **options), load(out)
    assert all(torch.equal(streamed[key], whole[key]) for key in whole)


def test_what_does_not_fit_is_named():
    base, expert, v = model(0), model(1), moments_of(1)
    with pytest.raises(ValueError, match=r"fast_fisher_graft takes exactly one expert, got 2; `ota` joins several"):
        fast_fisher_graft(base, [expert, expert], moments=[v, v])
    with pytest.raises(ValueError, match=r"moments must have one mapping per expert, 1, got 2: training.fit"):
        fast_fisher_graft(base, [expert], moments=[v, v])
    with pytest.raises(IncompatibleWeights, match=r"'c': shape \[40\] in base, \[4\] in moments\[0\]"):
        fast_fisher_graft(base, [expert], moments=[{**v, "c": torch.ones(4)}])
    with pytest.raises(ValueError, match=r"'c' of moments\[0\] must be finite and at least 0"):
        fast_fisher_graft(base, [expert], moments=[{**v, "c": -v["c"]}])
    with pytest.raises(ValueError, match=r"moments\[0\] has none of the model's tensors, such as 'a.weight', but 'x'"):
        fast_fisher_graft(base, [expert], moments=[{"x": torch.ones(1)}])
    with pytest.raises(ValueError, match=r"density must be in \[0, 1\], got 1.5 \(fast_fisher_graft\)"):
        fast_fisher_graft(base, [expert], moments=[v], density=1.5)
    with pytest.raises(ValueError, match="importance must be one of 'fisher', 'magnitude', 'curvature', got 'size'"):
        graft_masks(base, [expert], moments=[v], importance="size")


# ---------------------------------------------------------------- the search
def test_the_smallest_density_that_will_do():
    base, expert = {"w": torch.zeros(10)}, {"w": torch.ones(10)}
    v = {"w": torch.tensor([8.0, 4, 2, 1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1])}

    def score(merged):
        return float((v["w"] * merged["w"]).sum() / v["w"].sum())

    found = graft_density(base, expert, moments=v, score=score, tolerance=0.11, densities=(0.5, 0.1, 0.3, 0.2))
    assert (found.density, found.score) == (0.3, pytest.approx(14 / 15.6))
    assert [density for density, _ in found.trials] == [0.1, 0.2, 0.3]
    exact = graft_density(base, expert, moments=v, score=score, tolerance=0.0, densities=(0.5,))
    assert (exact.density, exact.score) == (1.0, pytest.approx(1))
    with pytest.raises(ValueError, match=r"score .* gave NaN"):
        graft_density(base, expert, moments=v, score=lambda weights: float("nan"))


# ---------------------------------------------------------------- moments
def test_rank_one_by_hand():
    left, right = compress_moment(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert (left.shape, right.shape) == ((2, 1), (1, 2))
    close(restore_moment((left, right)), torch.tensor([[1.2, 1.8], [2.8, 4.2]]))


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 10**6), st.integers(1, 8))
@settings(deadline=None, max_examples=40)
def test_compression(m, n, seed, rank):
    g = torch.Generator().manual_seed(seed)
    v = torch.rand(m, n, generator=g) ** 4
    one = restore_moment(compress_moment(v))
    close(one.sum(0), v.sum(0), rtol=1e-4, atol=1e-6)
    close(one.sum(1), v.sum(1), rtol=1e-4, atol=1e-6)
    outer = torch.outer(v[:, 0], v[0])
    close(restore_moment(compress_moment(outer)), outer, rtol=1e-4, atol=1e-6)
    some = restore_moment(compress_moment(v, curvature="svd", rank=rank))
    assert (some >= 0).all()
    assert (one >= 0).all()
    if rank >= min(m, n):
        close(some, v)
    u, s, vh = torch.linalg.svd(v, full_matrices=False)
    nearest = (u[:, :rank] * s[:rank]) @ vh[:rank]
    assert float((some - v).norm()) <= float((nearest - v).norm()) + 1e-5  # what was negative only came nearer


def test_what_is_not_a_matrix_or_is_an_embedding_stays_whole():
    for shape in ((5,), (), (2, 3, 4), (0, 3)):
        v = torch.rand(shape)
        for curvature in ("full", "rank1", "svd"):
            (kept,) = compress_moment(v, curvature=curvature)
            assert torch.equal(kept, v)
    table = torch.rand(9, 4)
    for name in ("model.embed_tokens.weight", "lm_head.weight", "transformer.wte.weight"):
        assert len(compress_moment(table, curvature="svd", rank=1, name=name)) == 1
        assert len(compress_moment(table, curvature="rank1", name=name)) == 2
    assert len(compress_moment(table, curvature="svd", rank=1, name="layers.0.weight")) == 2
    assert restore_moment(compress_moment(torch.zeros(3, 2))).tolist() == [[0, 0]] * 3
    assert restore_moment(compress_moment(torch.ones(3, 2).half())).dtype == torch.float32


def test_storage_is_counted():
    moments = {"w": torch.rand(128, 64), "b": torch.rand(128)}
    assert stored_numbers(moments) == 128 * 64 + 128
    assert stored_numbers(moments, curvature="rank1") == 128 + 64 + 128
    assert stored_numbers(moments, curvature="svd", rank=3) == 3 * (128 + 64) + 128


def test_squared_gradients_after_the_fact():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5))
    net.add_module("unused", nn.Identity())
    extra = nn.Parameter(torch.ones(2))
    net.register_parameter("extra", extra)
    batches = [(torch.randn(4, 3), torch.tensor([0, 1, 1, 0])) for _ in range(3)]

    def loss(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    seen = squared_gradients(net, iter(batches), loss)
    assert net[1].training
    net.eval()
    rows = [torch.autograd.grad(loss(net, batch), net[0].weight)[0].square() for batch in batches]
    close(seen["0.weight"], torch.stack(rows).mean(0))
    assert seen["extra"].tolist() == [0, 0]
    assert list(seen) == [name for name, _ in net.named_parameters()]
    with pytest.raises(ValueError, match="batches hold no batch"):
        squared_gradients(net, [], loss)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        squared_gradients(net.requires_grad_(False), batches, loss)
