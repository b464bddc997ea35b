"""What every merge of the first five promises, whatever its rule: checked for all of them."""

import functools
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from notebook_kit.catalog import _methods
from notebook_kit.merging import IncompatibleWeights, average, dare, slerp, task_arithmetic, ties
from tests.untyped import untyped

MERGES = {
    "average": average,
    "task_arithmetic": task_arithmetic,
    "slerp": slerp,
    "slerp of the model": functools.partial(slerp, scope="model"),
    "slerp by row": functools.partial(slerp, scope="row"),
    "slerp of task vectors": functools.partial(slerp, space="task_vectors"),
    "ties": functools.partial(ties, density=0.5),
    "ties by tensor": functools.partial(ties, density=0.5, scope="tensor"),
    "ties by count": functools.partial(ties, density=0.5, elect="count", combine="max"),
    "ties without election": functools.partial(ties, density=0.5, elect="none", combine="sum"),
    "dare": dare,
    "dare with election": functools.partial(dare, elect="mass", rescale="norm"),
}
every = pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES)
order_free = {name: merge for name, merge in MERGES.items() if "slerp" not in name and "dare" not in name}


def model(dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "layer.weight": torch.randn(4, 3, generator=g).to(dtype),
        "scalar": torch.randn((), generator=g).to(dtype),
        "empty": torch.zeros(0, 3, dtype=dtype),
        "steps": torch.tensor([seed, 7]),
        "mask": torch.tensor([True, False]),
    }


def experts_of(count, dtype=torch.float32):
    return [model(dtype, seed) for seed in range(1, count + 1)]


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_result_looks_like_base_and_inputs_stay(merge, dtype):
    base, experts = model(dtype), experts_of(2, dtype)
    before = [{key: tensor.clone() for key, tensor in weights.items()} for weights in (base, *experts)]
    merged = merge(base, experts)
    assert type(merged) is dict
    assert list(merged) == list(base)
    for key, tensor in base.items():
        assert (merged[key].shape, merged[key].dtype) == (tensor.shape, tensor.dtype)
        assert torch.isfinite(merged[key].float()).all()
    for key in ("steps", "mask"):
        assert torch.equal(merged[key], base[key])
    for tensor in merged.values():
        tensor.zero_()  # no result shares memory with an input
    for weights, copy in zip((base, *experts), before, strict=True):
        assert all(torch.equal(weights[key], copy[key]) for key in copy)


@every
def test_low_precision_is_rounded_once_at_the_end(merge):
    base, experts = model(torch.bfloat16), experts_of(2, torch.bfloat16)
    wide = merge({k: v.float() if v.is_floating_point() else v for k, v in base.items()},
                 [{k: v.float() if v.is_floating_point() else v for k, v in e.items()} for e in experts])  # fmt: skip
    merged = merge(base, experts)
    for key in ("layer.weight", "scalar"):
        assert torch.equal(merged[key], wide[key].bfloat16())


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_pieces_change_nothing_but_rounding(merge, dtype, monkeypatch):
    base, experts = {"w": torch.randn(9, 7).to(dtype)}, [{"w": torch.randn(9, 7).to(dtype)} for _ in range(2)]
    whole = merge(base, experts)["w"]
    for module, size in (("contract", "PIECE"), ("slerp", "PIECE"), ("selection", "CHUNK")):
        monkeypatch.setattr(sys.modules[f"notebook_kit.merging.{module}"], size, 10)
    random = getattr(merge, "func", merge) is dare
    if not random:  # the same seed draws other numbers when it draws them ten at a time
        torch.testing.assert_close(merge(base, experts)["w"], whole)
    else:
        assert torch.equal(merge(base, experts)["w"], merge(base, experts)["w"])
        kept = merge(base, experts, density=1.0, seed=1)["w"]
        torch.testing.assert_close(kept, merge(base, experts, density=1.0, seed=2)["w"])


@every
def test_non_contiguous_tensors_merge_as_they_look(merge):
    base, experts = {"w": torch.randn(3, 4).T}, [{"w": torch.randn(3, 4).T} for _ in range(2)]
    merged = merge(base, experts)["w"]
    again = merge({"w": base["w"].contiguous()}, [{"w": expert["w"].contiguous()} for expert in experts])["w"]
    assert torch.equal(merged, again)


@every
def test_parameters_of_a_live_model_can_be_merged(merge):
    nets = [torch.nn.Linear(3, 2) for _ in range(3)]
    merged = merge(nets[0].state_dict(), [net.state_dict() for net in nets[1:]])
    before = {key: tensor.clone() for key, tensor in nets[1].state_dict().items()}
    nets[0].load_state_dict(merged)
    assert all(torch.equal(tensor, before[key]) for key, tensor in nets[1].state_dict().items())


@every
def test_incompatible_inputs_are_named(merge):
    base, experts = model(), experts_of(2)
    with pytest.raises(IncompatibleWeights, match=r"'scalar': shape \[\] in base, \[1\] in experts\[1\]"):
        merge(base, [experts[0], {**experts[1], "scalar": torch.zeros(1)}])
    with pytest.raises(IncompatibleWeights, match=r"'scalar': dtype .* cast one of them first"):
        merge(base, [experts[0], {**experts[1], "scalar": torch.zeros(()).half()}])
    with pytest.raises(IncompatibleWeights, match=r"'extra': in experts\[0\] but not in base"):
        merge(base, [{**experts[0], "extra": torch.zeros(1)}, experts[1]])
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"tensor 'scalar' of experts\[0\] holds (NaN|Inf)"):
            merge(base, [{**experts[0], "scalar": torch.tensor(bad)}, experts[1]])
        with pytest.raises(ValueError, match=r"tensor 'scalar' of base holds (NaN|Inf)"):
            merge({**base, "scalar": torch.tensor(bad)}, experts)
    with pytest.raises(ValueError, match=r"at least one state dict|exactly two experts"):
        merge(base, [])
    with untyped(), pytest.raises(TypeError, match="got one mapping"):
        merge(base, experts[0])


@pytest.mark.parametrize("merge", [m for n, m in MERGES.items() if "slerp" not in n])
@pytest.mark.parametrize("count", [1, 10])
def test_one_expert_or_ten(merge, count):
    merged = merge(model(), experts_of(count))
    assert torch.isfinite(merged["layer.weight"]).all()


@pytest.mark.parametrize("merge", [average, task_arithmetic, ties, dare])
def test_expert_weights_are_checked(merge):
    with pytest.raises(ValueError, match="one entry per expert, 2, got 3"):
        merge(model(), experts_of(2), weights=[1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="weights must be finite"):
        merge(model(), experts_of(2), weights=[1.0, float("nan")])


@pytest.mark.parametrize(
    ("merge", "bad", "text"),
    [
        (ties, {"density": 1.4}, r"density must be in \[0, 1\], got 1.4 \(ties\)"),
        (ties, {"density": -0.1}, "density must be in"),
        (ties, {"scale": 4.0}, "scale must be in"),
        (ties, {"scope": "layer"}, "scope must be one of 'model', 'tensor'"),
        (ties, {"elect": "both"}, "elect must be one of"),
        (ties, {"combine": "median"}, "combine must be one of"),
        (dare, {"seed": 0.5}, "seed must be an integer"),
        (dare, {"rescale": "l2"}, "rescale must be one of"),
        (dare, {"density": float("nan")}, "density must be in"),
        (slerp, {"t": 1.1}, r"t must be in \[0, 1\], got 1.1 \(slerp\)"),
        (task_arithmetic, {"scale": 5}, "scale must be in"),
        (average, {"normalize": 1}, "normalize must be True or False"),
    ],
)
def test_hyperparameters_out_of_range(merge, bad, text):
    with pytest.raises(ValueError, match=text):
        merge(model(), experts_of(2), **bad)


@given(st.permutations(range(5)), st.sampled_from(sorted(order_free)))
@settings(deadline=None, max_examples=40)
def test_the_order_of_the_experts_does_not_matter(order, name):
    experts = experts_of(5)
    merged = order_free[name](model(), experts)
    shuffled = order_free[name](model(), [experts[i] for i in order])
    for key in ("layer.weight", "scalar"):
        torch.testing.assert_close(merged[key], shuffled[key], rtol=1e-5, atol=1e-6)


@given(st.integers(1, 6), st.integers(0, 1000))
@settings(deadline=None, max_examples=30)
def test_averages_and_task_vectors_are_one_algebra(count, seed):
    g = torch.Generator().manual_seed(seed)
    base = {"w": torch.randn(3, 4, generator=g)}
    experts = [{"w": torch.randn(3, 4, generator=g)} for _ in range(count)]
    close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
    mean = torch.stack([expert["w"] for expert in experts]).mean(dim=0)
    close(average(base, experts)["w"], mean)
    close(task_arithmetic(base, experts, scale=1 / count)["w"], mean)
    close(task_arithmetic(base, experts[:1], scale=1.0)["w"], experts[0]["w"])
    close(average(base, [experts[0]] * count)["w"], experts[0]["w"])
    assert torch.equal(task_arithmetic(base, experts, scale=0.0)["w"], base["w"])
    total = base["w"] + 0.4 * sum(expert["w"] - base["w"] for expert in experts)
    close(task_arithmetic(base, experts, scale=0.4)["w"], total)


def test_weights_and_normalization():
    base, a, b = ({"w": torch.tensor([value])} for value in (0.0, 1.0, 5.0))
    assert average(base, [a, b], weights=[3, 1])["w"].item() == pytest.approx(2.0)
    assert average(base, [a, b], weights=[3, 1], normalize=False)["w"].item() == pytest.approx(8.0)
    assert average(base, [a, b], weights=[2, -1])["w"].item() == pytest.approx(-3.0)
    with pytest.raises(ValueError, match=r"weights sum to 0, so they cannot be normalized \(average\)"):
        average(base, [a, b], weights=[1, -1])
    assert average(base, [a, b], weights=[1, -1], normalize=False)["w"].item() == pytest.approx(-4.0)
    # forgetting b, learning a
    assert task_arithmetic(base, [a, b], scale=0.5, weights=[1, -1])["w"].item() == pytest.approx(-2.0)
    assert task_arithmetic(base, [b], scale=-1.0)["w"].item() == pytest.approx(-5.0)


def test_all_five_are_in_the_catalogue():
    assert {_methods[name].family for name in ("average", "task_arithmetic", "slerp", "ties", "dare")} == {"merging"}
