"""Fisher merging: the card's numbers, its options, where nobody cares, and the search for the weights."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from notebook_kit.checkpoints import load, save
from notebook_kit.merging import IncompatibleWeights, average, fisher, merge_files, search_weights
from tests.untyped import untyped

close = torch.testing.assert_close
ZERO = {"w": torch.zeros(2)}
PAIR = [{"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([0.0, 4.0])}]
FISHERS = [{"w": torch.tensor([4.0, 1.0])}, {"w": torch.tensor([1.0, 1.0])}]


def one(values):
    return {"w": torch.tensor(values)}


def model(seed, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return {
        "a.weight": torch.randn(4, 3, generator=g).to(dtype),
        "a.bias": torch.randn(3, generator=g).to(dtype),
        "scalar": torch.randn((), generator=g).to(dtype),
        "empty": torch.zeros(0, 3, dtype=dtype),
        "running_mean": torch.randn(3, generator=g).to(dtype),
        "steps": torch.tensor([seed]),
    }


def fisher_of(seed):
    g = torch.Generator().manual_seed(1000 + seed)
    shapes = {k: v.shape for k, v in model(0).items() if k not in ("running_mean", "steps")}
    return {key: torch.rand(shape, generator=g).square() for key, shape in shapes.items()}


def test_the_hand_worked_example():
    close(fisher(ZERO, PAIR, fishers=FISHERS, normalize_fishers=False)["w"], torch.tensor([0.8, 3.0]))
    close(fisher(ZERO, PAIR, fishers=FISHERS)["w"], torch.tensor([0.57841, 3.48921]), rtol=0, atol=1e-5)


def test_weights_and_power():
    fine = {"fishers": FISHERS, "normalize_fishers": False}
    # λF = (3·4, 1·1) / 4 and (3·1, 1·1) / 4
    close(fisher(ZERO, PAIR, weights=[3.0, 1.0], **fine)["w"], torch.tensor([12 / 13, 10 / 4]))
    close(fisher(ZERO, PAIR, power=0.5, **fine)["w"], torch.tensor([2 / 3, 3.0]))
    for normalize in (True, False):
        flat = fisher(ZERO, PAIR, fishers=FISHERS, power=0.0, weights=[3.0, 1.0], normalize_fishers=normalize)
        close(flat["w"], average(ZERO, PAIR, weights=[3.0, 1.0])["w"])


def test_the_floor_is_the_targets_or_everybodys():
    base, experts = {"w": torch.zeros(3)}, [one([1.0, 1.0, 1.0]), one([3.0, 3.0, 3.0])]
    tiny = [one([0.0, 0.0, 1.0]), one([0.0, 1e-6, 1.0])]
    plain = {"fishers": tiny, "normalize_fishers": False}
    close(fisher(base, experts, **plain)["w"], torch.tensor([1.0, 2.0, 2.0]))
    close(fisher(base, experts, favor_target=False, **plain)["w"], torch.tensor([2.0, 2.0, 2.0]))
    close(fisher(base, experts, fisher_floor=1e-2, **plain)["w"], torch.tensor([1.0, 1.0002, 2.0]), rtol=0, atol=1e-4)


def test_one_expert_without_a_say_in_a_tensor():
    experts = [*PAIR, one([100.0, 100.0])]
    silent = [*FISHERS, one([0.0, 0.0])]
    merged = fisher(ZERO, experts, fishers=silent, normalize_fishers=False)
    close(merged["w"], torch.tensor([0.8, 3.0]))


def test_one_hot_weights_give_that_expert_even_where_its_fisher_is_zero():
    some = [one([0.0, 2.0]), one([0.0, 5.0])]
    for favor in (True, False):
        for hot in (0, 1):
            weights = [float(i == hot) for i in range(2)]
            assert torch.equal(
                fisher(ZERO, PAIR, fishers=some, weights=weights, favor_target=favor)["w"], PAIR[hot]["w"]
            )


@given(st.integers(1, 5), st.integers(0, 10**6), st.booleans(), st.booleans())
@settings(deadline=None, max_examples=30)
def test_properties(count, seed, normalize, favor):
    g = torch.Generator().manual_seed(seed)
    base = {"w": torch.zeros(4, 3)}
    experts = [{"w": torch.randn(4, 3, generator=g)} for _ in range(count)]
    fishers = [{"w": torch.rand(4, 3, generator=g) ** 4} for _ in range(count)]
    weights = (torch.rand(count, generator=g) + 0.1).tolist()
    options = {"weights": weights, "normalize_fishers": normalize, "favor_target": favor}
    merged = fisher(base, experts, fishers=fishers, **options)["w"]
    stack = torch.stack([expert["w"] for expert in experts])
    assert (merged >= stack.amin(0) - 1e-5).all()
    assert (merged <= stack.amax(0) + 1e-5).all()
    close(fisher(base, [experts[0]] * count, fishers=fishers, **options)["w"], experts[0]["w"], rtol=1e-5, atol=1e-6)
    flat = [{"w": torch.full((4, 3), 0.3)}] * count
    plain = average(base, experts, weights=weights)["w"]
    close(fisher(base, experts, fishers=flat, **options)["w"], plain, rtol=1e-5, atol=1e-6)
    if normalize:  # the floor stands on the Fisher as it is, so it must not bite
        high = [{"w": f["w"] + 0.01} for f in fishers]
        scaled = [{"w": 7 * high[0]["w"]}, *high[1:]]
        ours, other = (fisher(base, experts, fishers=f, **options)["w"] for f in (high, scaled))
        close(ours, other, rtol=1e-4, atol=1e-5)


def test_in_a_quadratic_world_the_merge_is_the_exact_minimum():
    g = torch.Generator().manual_seed(0)
    thetas, fishers = torch.randn(3, 6, generator=g), torch.rand(3, 6, generator=g) + 0.1
    theta = torch.zeros(6, requires_grad=True)
    loss = 0.5 * (fishers * (theta - thetas).square()).sum()
    hessian = fishers.sum(0)
    minimum = theta.detach() - torch.autograd.grad(loss, theta)[0] / hessian
    rows = [{"w": row} for row in thetas]
    merged = fisher({"w": torch.zeros(6)}, rows, fishers=[{"w": f} for f in fishers], normalize_fishers=False)
    close(merged["w"], minimum)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 2, 10])
def test_the_contract(dtype, count):
    base, experts = model(0, dtype), [model(seed, dtype) for seed in range(1, count + 1)]
    fishers = [fisher_of(seed) for seed in range(count)]
    copies = [{k: v.clone() for k, v in weights.items()} for weights in (base, *experts, *fishers)]
    merged = fisher(base, experts, fishers=fishers)
    assert list(merged) == list(base)
    for key, tensor in base.items():
        assert (merged[key].shape, merged[key].dtype) == (tensor.shape, tensor.dtype)
    assert torch.equal(merged["steps"], base["steps"])
    mean = torch.stack([expert["running_mean"].float() for expert in experts]).mean(0)
    close(merged["running_mean"].float(), mean, rtol=1e-2, atol=1e-2)  # no Fisher: the plain mean
    for tensor in merged.values():
        tensor.zero_()
    for weights, copy in zip((base, *experts, *fishers), copies, strict=True):
        assert all(torch.equal(weights[key], copy[key]) for key in copy)


def test_a_tied_weight_needs_one_fisher_and_is_counted_once():
    shared = torch.randn(3, 2)
    base = {"embed": shared, "head": shared, "b": torch.zeros(2)}
    experts = [{k: v + i for k, v in base.items()} for i in (1, 2)]
    once = [{"embed": torch.rand(3, 2), "b": torch.rand(2)} for _ in range(2)]
    twice = [{**f, "head": f["embed"]} for f in once]
    for fishers in (once, twice):
        merged = fisher(base, experts, fishers=fishers)
        assert torch.equal(merged["embed"], merged["head"])
    close(merged["b"], fisher(base, experts, fishers=once)["b"])


def test_pieces_change_nothing(monkeypatch):
    base, experts = model(0), [model(1), model(2)]
    fishers = [fisher_of(1), fisher_of(2)]
    whole = fisher(base, experts, fishers=fishers)
    monkeypatch.setattr(sys.modules["notebook_kit.merging.contract"], "PIECE", 5)
    pieces = fisher(base, experts, fishers=fishers)
    assert all(torch.equal(pieces[key], whole[key]) for key in whole)


def test_files_are_streamed(tmp_path):
    weights = [model(seed) for seed in range(3)]
    paths = [save(w, tmp_path / f"{i}.safetensors") for i, w in enumerate(weights)]
    fishers = [fisher_of(seed) for seed in range(2)]
    options = {"fishers": fishers, "power": 0.7, "weights": [0.2, 0.8]}
    out = merge_files(fisher, paths[0], paths[1:], tmp_path / "out.safetensors", progress=False, **options)
    whole, streamed = fisher(weights[0], weights[1:], **options), load(out)
    assert all(torch.equal(streamed[key], whole[key]) for key in whole)


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"fishers must have one mapping per expert, 2, got 1: diagonal_fisher"):
        fisher(ZERO, PAIR, fishers=FISHERS[:1])
    with pytest.raises(IncompatibleWeights, match=r"'w': shape \[2\] in base, \[3\] in fishers\[1\]"):
        fisher(ZERO, PAIR, fishers=[FISHERS[0], {"w": torch.ones(3)}])
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"'w' of fishers\[1\] must be finite and at least 0"):
            fisher(ZERO, PAIR, fishers=[FISHERS[0], one([1.0, bad])])
    with pytest.raises(ValueError, match=r"fishers\[0\] has none of the model's tensors, such as 'w', but 'model.w'"):
        fisher(ZERO, PAIR, fishers=[{"model.w": torch.ones(2)}] * 2)
    base, experts = {**ZERO, "b": torch.zeros(1)}, [{**p, "b": torch.ones(1)} for p in PAIR]
    with pytest.raises(ValueError, match=r"'b' is in fishers\[0\] but not in fishers\[1\]"):
        fisher(base, experts, fishers=[{**FISHERS[0], "b": torch.ones(1)}, FISHERS[1]])
    for weights in ([1.0, -0.5], [0.0, 0.0]):
        with pytest.raises(ValueError, match="weights must be at least 0 and not all 0"):
            fisher(ZERO, PAIR, fishers=FISHERS, weights=weights)
    with pytest.raises(ValueError, match=r"fisher_floor must be in \[1e-12, 0.01\], got 1 \(fisher\)"):
        fisher(ZERO, PAIR, fishers=FISHERS, fisher_floor=1)
    with pytest.raises(ValueError, match="tensor 'w' of experts"):
        fisher(ZERO, [PAIR[0], one([float("nan"), 0.0])], fishers=FISHERS)
    with untyped(), pytest.raises(TypeError, match="fishers must be a sequence of mappings"):
        fisher(ZERO, PAIR, fishers=FISHERS[0])


# ---------------------------------------------------------------- the search
def test_two_experts_are_weighed_on_a_grid():
    found = search_weights(average, ZERO, PAIR, score=lambda merged: -abs(float(merged["w"][0]) - 0.3))
    assert len(found.trials) == 51
    assert found.weights == pytest.approx([0.3, 0.7])
    assert found.trials[0][0] == [1.0, 0.0]
    assert found.trials[-1][0] == [0.0, 1.0]
    assert found.score == max(score for _, score in found.trials)


def test_more_are_weighed_by_even_draws():
    experts = [*PAIR, one([5.0, 5.0])]
    fishers = [*FISHERS, one([1.0, 2.0])]
    search = {"score": lambda merged: float(merged["w"].sum()), "n_points": 300}
    found = search_weights(fisher, ZERO, experts, fishers=fishers, **search)
    shares = torch.tensor([weights for weights, _ in found.trials])
    close(shares.sum(1), torch.ones(300))
    close(shares.mean(0), torch.full((3,), 1 / 3), rtol=0, atol=0.04)
    close(shares.var(0), torch.full((3,), 1 / 18), rtol=0.25, atol=0)  # Dirichlet(1, 1, 1)
    assert found == search_weights(fisher, ZERO, experts, fishers=fishers, **search)
    assert found.weights[2] > 0.8
    other = search_weights(fisher, ZERO, experts, fishers=fishers, seed=1, **search | {"n_points": 2})
    assert other.trials[0] != found.trials[0]


def test_a_search_needs_something_to_weigh():
    with pytest.raises(ValueError, match="needs two experts or more, got 1"):
        search_weights(average, ZERO, PAIR[:1], score=lambda merged: 0.0)
    with pytest.raises(ValueError, match="n_points must be in"):
        search_weights(average, ZERO, PAIR, score=lambda merged: 0.0, n_points=1)
    with pytest.raises(ValueError, match=r"score .* gave NaN"):
        search_weights(average, ZERO, PAIR, score=lambda merged: float("nan"))
