"""What every merge promises, for the four in subspaces and their variants."""

import functools

import pytest
import torch

from notebook_kit.catalog import _methods
from notebook_kit.merging import (
    IncompatibleWeights,
    doge,
    isotropic,
    load,
    merge_files,
    opcm,
    save,
    task_singular_vectors,
)

MERGES = {
    "tsv": task_singular_vectors,
    "tsv by fraction": functools.partial(task_singular_vectors, rank_fraction=0.5),
    "iso-c": isotropic,
    "iso-cts": functools.partial(isotropic, common=0.5),
    "opcm": opcm,
    "opcm cross": functools.partial(opcm, block="cross", alpha=0.3, matrices="all"),
    "opcm shuffled": functools.partial(opcm, shuffle_order=True, seed=4),
    "doge": functools.partial(doge, steps=10),
    "doge of each": functools.partial(doge, steps=10, shared_delta=False, density=1.0, project="step"),
}
every = pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES)
FLOATS = ("layer.weight", "thin.weight", "mlp.experts.up", "scalar", "bias")


def model(dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=g).to(dtype)

    return {
        "layer.weight": draw(6, 4),
        "thin.weight": draw(1, 5),
        "wte.weight": draw(7, 4),
        "mlp.experts.up": draw(2, 5, 4),
        "conv.weight": draw(3, 2, 2, 2),
        "bias": draw(6),
        "scalar": draw(),
        "empty": torch.zeros(0, 3, dtype=dtype),
        "steps": torch.tensor([seed, 7]),
    }


def experts_of(count, dtype=torch.float32):
    return [model(dtype, seed) for seed in range(1, count + 1)]


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 2, 10])
def test_the_result_looks_like_base_and_inputs_stay(merge, dtype, count):
    base, experts = model(dtype), experts_of(count, dtype)
    before = [{key: tensor.clone() for key, tensor in weights.items()} for weights in (base, *experts)]
    merged = merge(base, experts)
    assert type(merged) is dict
    assert list(merged) == list(base)
    for key, tensor in base.items():
        assert (merged[key].shape, merged[key].dtype) == (tensor.shape, tensor.dtype)
        assert torch.isfinite(merged[key].float()).all()
    assert torch.equal(merged["steps"], base["steps"])
    for tensor in merged.values():
        tensor.zero_()  # no result shares memory with an input
    for weights, copy in zip((base, *experts), before, strict=True):
        assert all(torch.equal(weights[key], copy[key]) for key in copy)


@every
def test_low_precision_is_rounded_once_at_the_end(merge):
    base, experts = model(torch.bfloat16), experts_of(2, torch.bfloat16)

    def wide(weights):
        return {k: v.float() if v.is_floating_point() else v for k, v in weights.items()}

    merged, reference = merge(base, experts), merge(wide(base), [wide(expert) for expert in experts])
    for key in FLOATS:
        assert torch.equal(merged[key], reference[key].bfloat16())


@every
def test_non_contiguous_tensors_merge_as_they_look(merge):
    g = torch.Generator().manual_seed(0)
    tensors = [torch.randn(6, 4, generator=g).T for _ in range(3)]
    merged = merge({"w": tensors[0]}, [{"w": t} for t in tensors[1:]])["w"]
    again = merge({"w": tensors[0].contiguous()}, [{"w": t.contiguous()} for t in tensors[1:]])["w"]
    torch.testing.assert_close(merged, again, rtol=1e-3, atol=1e-3)


@every
def test_experts_that_never_moved_give_the_base(merge):
    base = model()
    merged = merge(base, [base, base])
    for key in FLOATS:
        torch.testing.assert_close(merged[key], base[key])


@every
def test_incompatible_inputs_are_named(merge):
    base, experts = model(), experts_of(2)
    with pytest.raises(IncompatibleWeights, match=r"'scalar': shape \[\] in base, \[1\] in experts\[\d\]"):
        merge(base, [experts[0], {**experts[1], "scalar": torch.zeros(1)}])
    with pytest.raises(ValueError, match=r"tensor 'scalar' of experts\[0\] holds NaN"):
        merge(base, [{**experts[0], "scalar": torch.tensor(float("nan"))}, experts[1]])
    with pytest.raises(ValueError, match="at least one state dict"):
        merge(base, [])


@pytest.mark.parametrize(
    ("merge", "bad", "text"),
    [
        (task_singular_vectors, {"scale": 4.0}, r"scale must be in \[0, 3\], got 4.0 \(task_singular_vectors\)"),
        (task_singular_vectors, {"rank_fraction": 1.1}, "rank_fraction must be in"),
        (isotropic, {"common": -0.1}, "common must be in"),
        (isotropic, {"matrices": "most"}, "matrices must be one of 'all', 'linear'"),
        (opcm, {"alpha": 1.1}, "alpha must be in"),
        (opcm, {"block": "row"}, "block must be one of 'corner', 'cross'"),
        (doge, {"eta": 0.0}, "eta must be in"),
        (doge, {"project": True}, "project must be one of 'grad', 'step', 'none'"),
    ],
)
def test_hyperparameters_out_of_range(merge, bad, text):
    with pytest.raises(ValueError, match=text):
        merge(model(), experts_of(2), **bad)


@every
def test_merge_files_streams_the_same(merge, tmp_path):
    base, experts = model(), experts_of(3)
    paths = [save(weights, tmp_path / f"{i}.safetensors") for i, weights in enumerate((base, *experts))]
    method, options = (merge.func, merge.keywords) if isinstance(merge, functools.partial) else (merge, {})
    out = merge_files(method, paths[0], paths[1:], tmp_path / "out.safetensors", progress=False, **options)
    for key, tensor in merge(base, experts).items():
        torch.testing.assert_close(load(out)[key], tensor, rtol=1e-4, atol=1e-5)


def test_all_four_are_in_the_catalogue():
    for name in ("task_singular_vectors", "isotropic", "opcm", "doge"):
        assert _methods[name].family == "merging"
