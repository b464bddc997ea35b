"""What the merges against interference all promise: base's looks, rounding once, one expert, ten, and files."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from notebook_kit.checkpoints import load, save
from notebook_kit.merging import (
    IncompatibleWeights,
    breadcrumbs,
    consensus,
    della,
    merge_files,
    pcb,
    ranks,
    selection,
    task_arithmetic,
    ties,
)

CASES = [
    (breadcrumbs, {"density": 0.6, "gamma": 0.1}),
    (breadcrumbs, {"density": 0.5, "gamma": 0.1, "scope": "model", "rescale": "norm"}),
    (breadcrumbs, {"elect": "mass", "normalize": True, "weights": [1.0, 0.5]}),
    (della, {"density": 0.5}),
    (della, {"rescale": "norm", "elect": "none", "normalize": False, "seed": 3}),
    (della, {"scope": "tensor", "elect": "count", "weights": [1.0, 0.5]}),
    (pcb, {"density": 0.4}),
    (pcb, {"density": 0.4, "inter": "votes", "intra": "softmax", "weights": [1.0, 0.5], "clip": 0.0}),
    (pcb, {"inter": "pairwise_softmax", "density": 0.9}),
    (pcb, {"scope": "tensor", "density": 0.9, "clip": 0.02}),
    (consensus, {"k": 1}),
    (consensus, {"base_merge": "ties", "density": 0.5, "k": 1, "thresholds": [0.2, 0.6]}),
    (ties, {"elect": "normmass", "density": 0.5}),
    (ties, {"elect": "normfrac", "scope": "tensor", "density": 0.5, "combine": "average"}),
]
NAMES = [f"{fn.__name__}-{'-'.join(map(str, kwargs.values()))}" for fn, kwargs in CASES]
every = pytest.mark.parametrize(("fn", "kwargs"), CASES, ids=NAMES)


def model(seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=g).to(dtype)

    weights = {"layer.weight": draw(6, 5), "bias": draw(7), "scalar": draw(), "conv": draw(3, 2, 2, 2)}
    return {**weights, "empty": torch.zeros(0, 3, dtype=dtype), "steps": torch.tensor([seed, 7])}


def experts_of(count, dtype=torch.float32):
    return [model(seed, dtype) for seed in range(1, count + 1)]


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_result_looks_like_base_and_inputs_stay(fn, kwargs, dtype):
    base, experts = model(dtype=dtype), experts_of(2, dtype)
    before = [{key: tensor.clone() for key, tensor in weights.items()} for weights in (base, *experts)]
    merged = fn(base, experts, **kwargs)
    assert type(merged) is dict
    assert list(merged) == list(base)
    for key, tensor in base.items():
        assert (merged[key].shape, merged[key].dtype) == (tensor.shape, tensor.dtype)
        assert torch.isfinite(merged[key].float()).all()
    assert torch.equal(merged["steps"], base["steps"])
    assert any(not torch.equal(merged[key], base[key]) for key in base)
    for tensor in merged.values():
        tensor.zero_()
    for weights, copy in zip((base, *experts), before, strict=True):
        assert all(torch.equal(weights[key], copy[key]) for key in copy)


@every
def test_low_precision_is_rounded_once_at_the_end(fn, kwargs):
    base, experts = model(dtype=torch.bfloat16), experts_of(2, torch.bfloat16)

    def widen(weights):
        return {k: v.float() if v.is_floating_point() else v for k, v in weights.items()}

    wide, merged = fn(widen(base), [widen(e) for e in experts], **kwargs), fn(base, experts, **kwargs)
    for key in ("layer.weight", "bias", "scalar", "conv"):
        assert torch.equal(merged[key], wide[key].bfloat16())


@every
@pytest.mark.parametrize("count", [1, 10])
def test_one_expert_or_ten(fn, kwargs, count):
    kwargs = {key: value for key, value in kwargs.items() if key not in ("weights", "thresholds")}
    merged = fn(model(), experts_of(count), **kwargs)
    assert all(torch.isfinite(tensor.float()).all() for tensor in merged.values())


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_give_what_memory_gives(fn, kwargs, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(selection, "CHUNK", 8)
    monkeypatch.setattr(ranks, "SAMPLE", 8)
    models = [model(seed, dtype) for seed in range(3)]
    paths = [save(weights, tmp_path / f"m{i}.safetensors") for i, weights in enumerate(models)]
    out = merge_files(fn, paths[0], paths[1:], tmp_path / "out.safetensors", progress=False, **kwargs)
    whole, streamed = fn(models[0], models[1:], **kwargs), load(out)
    assert all(torch.equal(streamed[key], whole[key]) for key in whole)


@every
def test_incompatible_inputs_are_named(fn, kwargs):
    base, experts = model(), experts_of(2)
    with pytest.raises(IncompatibleWeights, match=r"'scalar': shape \[\] in base, \[1\] in experts\[1\]"):
        fn(base, [experts[0], {**experts[1], "scalar": torch.zeros(1)}], **kwargs)
    with pytest.raises(ValueError, match=r"tensor 'scalar' of experts\[0\] holds NaN"):
        fn(base, [{**experts[0], "scalar": torch.tensor(float("nan"))}, experts[1]], **kwargs)


@pytest.mark.parametrize(
    ("fn", "bad", "text"),
    [
        (breadcrumbs, {"gamma": 0.7}, r"gamma must be in \[0, 0.5\], got 0.7 \(breadcrumbs\)"),
        (breadcrumbs, {"normalize": 1}, "normalize must be True or False"),
        (della, {"epsilon": -0.1}, "epsilon must be in"),
        (della, {"rescale": "l2"}, "rescale must be one of 'inverse', 'norm', 'none'"),
        (della, {"weights": [1.0]}, "one entry per expert, 2, got 1"),
        (della, {"weights": [1.0, -1.0], "elect": "none"}, "weights sum to 0, .* set normalize=False"),
        (pcb, {"inter": "cosine"}, "inter must be one of"),
        (pcb, {"clip": 0.5}, "clip must be in"),
        (consensus, {"k": 1.5}, "k must be an integer"),
        (consensus, {"thresholds": [0.4]}, "thresholds must have one entry per expert, 2, got 1"),
        (consensus, {"thresholds": [0.4, -1.0]}, "thresholds must be finite and not negative"),
    ],
)
def test_bad_hyperparameters(fn, bad, text):
    with pytest.raises(ValueError, match=text):
        fn(model(), experts_of(2), **bad)


ORDER_FREE = {
    "breadcrumbs": functools.partial(breadcrumbs, density=0.5, gamma=0.1),
    "pcb": functools.partial(pcb, density=0.5),
    "pcb pairs": functools.partial(pcb, density=0.5, inter="pairwise_softmax"),
    "consensus": consensus,
    "normmass": functools.partial(ties, elect="normmass", density=0.5),
    "normfrac": functools.partial(ties, elect="normfrac", density=0.5),
}


@given(st.permutations(range(5)), st.sampled_from(sorted(ORDER_FREE)))
@settings(deadline=None, max_examples=40)
def test_the_order_of_the_experts_does_not_matter(order, name):
    experts = experts_of(5)
    merged = ORDER_FREE[name](model(), experts)
    shuffled = ORDER_FREE[name](model(), [experts[i] for i in order])
    for key in merged:
        torch.testing.assert_close(merged[key], shuffled[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fn", [breadcrumbs, della])
def test_density_one_without_election_is_task_arithmetic(fn):
    base, experts = model(), experts_of(3)
    weights = [1.0, -0.5, 2.0]
    options = {"density": 1.0, "elect": "none", "normalize": False, "weights": weights, "scale": 0.7}
    ours, plain = fn(base, experts, **options), task_arithmetic(base, experts, scale=0.7, weights=weights)
    for key in base:
        torch.testing.assert_close(ours[key], plain[key], rtol=1e-5, atol=1e-5)
