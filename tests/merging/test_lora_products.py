"""LoRA adapters merged by their products: the covariance between factors, gauges, ranks, and both name schemes."""

import pytest
import torch
from torch import nn

from notebook_kit.adapters import LoRA, adapter_weights, attach, fold, load_adapter_weights
from notebook_kit.merging import average, average_products, lora_pairs, metrics_weighted, product_of_pairs
from notebook_kit.merging.lora_products import refactor

RANK, D_IN, D_OUT = 3, 7, 5
W = [0.5, 0.3, 0.2]


def adapter(seed=0, names=("layers.0.A", "layers.0.B"), rank=RANK):
    g = torch.Generator().manual_seed(seed)
    shapes = ((rank, D_IN), (D_OUT, rank))
    return {name: torch.randn(shape, generator=g) for name, shape in zip(names, shapes, strict=True)}


@pytest.fixture
def run():
    """Three checkpoints that differ little, as late ones of a run do."""
    first = adapter()
    return [{key: tensor + 0.1 * adapter(seed)[key] for key, tensor in first.items()} for seed in (1, 2, 3)]


def delta(weights):
    return weights["layers.0.B"] @ weights["layers.0.A"]


def test_products_and_factors_differ_by_the_covariance(run):
    mean = average(run[0], run, weights=W)
    whole = product_of_pairs(run, weights=W, scale=2.0)["layers.0"]
    torch.testing.assert_close(whole, 2 * sum(w * delta(c) for w, c in zip(W, run, strict=True)))
    covariance = sum(
        w * (c["layers.0.B"] - mean["layers.0.B"]) @ (c["layers.0.A"] - mean["layers.0.A"])
        for w, c in zip(W, run, strict=True)
    )
    torch.testing.assert_close(whole - 2 * delta(mean), 2 * covariance, rtol=1e-5, atol=1e-5)


def test_with_b_frozen_factors_and_products_are_one(run):
    same_b = [{**c, "layers.0.B": run[0]["layers.0.B"]} for c in run]
    products = average_products(run[0], same_b, weights=W)
    torch.testing.assert_close(delta(products), delta(average(run[0], same_b, weights=W)), rtol=1e-5, atol=1e-5)


def test_a_gauge_leaves_products_alone_and_wrecks_factors(run):
    gauge = 0.3 * torch.randn(RANK, RANK) - torch.eye(RANK)
    turned = {"layers.0.A": gauge.inverse() @ run[0]["layers.0.A"], "layers.0.B": run[0]["layers.0.B"] @ gauge}
    torch.testing.assert_close(delta(turned), delta(run[0]), rtol=1e-4, atol=1e-4)
    plain, moved = (product_of_pairs(list(c))["layers.0"] for c in (run, [turned, *run[1:]]))
    torch.testing.assert_close(plain, moved, rtol=1e-4, atol=1e-4)
    low = [delta(average_products(run[0], c)) for c in (run, [turned, *run[1:]])]
    torch.testing.assert_close(*low, rtol=1e-4, atol=1e-4)
    fine, wrecked = (delta(average(run[0], c)) for c in (run, [turned, *run[1:]]))
    assert (fine - plain).norm() < 0.03 * plain.norm()
    assert (wrecked - plain).norm() > 0.5 * plain.norm()


def test_refactoring_is_the_nearest_matrix_of_that_rank(run):
    whole = product_of_pairs(run, weights=W)["layers.0"]
    found = average_products(run[0], run, weights=W)
    assert {key: tuple(t.shape) for key, t in found.items()} == {key: tuple(t.shape) for key, t in run[0].items()}
    u, s, v = torch.linalg.svd(whole)
    nearest = u[:, :RANK] * s[:RANK] @ v[:RANK]
    torch.testing.assert_close(delta(found), nearest, rtol=1e-4, atol=1e-4)
    b, a = refactor(torch.randn(5, 2), torch.randn(2, 7), 4)  # more room than rank: filled with zeros
    assert (b[:, 2:] == 0).all()
    assert (a[2:] == 0).all()


def test_copies_and_one_checkpoint_come_back(run):
    for group in ([run[0]], [run[0]] * 4):
        torch.testing.assert_close(delta(average_products(run[0], group)), delta(run[0]), rtol=1e-4, atol=1e-5)
    zero = {key: torch.zeros_like(tensor) for key, tensor in run[0].items()}
    assert (delta(average_products(zero, [zero, zero])) == 0).all()


def test_pefts_names_other_tensors_and_precisions():
    names = tuple(f"base_model.model.layers.0.lora_{letter}.weight" for letter in "AB")
    weights = {**adapter(1, names), "head.bias": torch.ones(2), "steps": torch.tensor(3)}
    assert lora_pairs(weights) == {"base_model.model.layers.0": names}
    assert lora_pairs(adapter(1, ("x.lora_A.default.weight", "x.lora_B.default.weight"))).keys() == {"x"}
    assert lora_pairs(adapter(1, ("e.lora_embedding_A", "e.lora_embedding_B"))).keys() == {"e"}
    assert lora_pairs(adapter(1, ("A", "B"))).keys() == {""}
    assert lora_pairs({"block.A.weight": torch.ones(2, 2), "block.B.weight": torch.ones(2, 2)}) == {}
    merged = average_products(weights, [weights, {**weights, "head.bias": 3 * torch.ones(2)}])
    assert merged["head.bias"].tolist() == [2, 2]
    assert merged["steps"] == 3
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        cast = {key: tensor.to(dtype) for key, tensor in adapter(2).items()}
        out = average_products(cast, [cast, cast])
        assert {t.dtype for t in out.values()} == {dtype}
        torch.testing.assert_close(delta(out).float(), delta(cast).float(), rtol=0.05, atol=0.1)


def test_bad_factors_are_named(run):
    with pytest.raises(ValueError, match=r"factor 'layers\.0\.A' has no partner"):
        average_products({"layers.0.A": torch.ones(2, 2)}, [{"layers.0.A": torch.ones(2, 2)}])
    odd = {"x.A": torch.ones(3, 4), "x.B": torch.ones(4, 2)}
    with pytest.raises(ValueError, match=r"factors of 'x' must be A .* got \[3, 4\] and \[4, 2\]"):
        lora_pairs(odd)
    dora = {**run[0], "layers.0.lora_magnitude_vector": torch.ones(5)}
    with pytest.raises(ValueError, match="DoRA's magnitude"):
        lora_pairs(dora)
    with pytest.raises(ValueError, match="no LoRA factors to multiply among no adapter"):
        product_of_pairs([])


def test_the_kits_lora_merged_and_loaded_is_the_folded_average():
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))

    model, x = net(), torch.randn(9, 6)
    attach(model, LoRA, targets=r"^\d$", rank=2, alpha=6)
    g = torch.Generator().manual_seed(1)
    shapes = {key: tensor.shape for key, tensor in adapter_weights(model).items()}
    cks = [{key: torch.randn(shape, generator=g) for key, shape in shapes.items()} for _ in range(2)]
    before = {key: tensor.clone() for key, tensor in model.state_dict().items() if "host" in key}
    folded = []
    for ck in cks:
        other = net()
        attach(other, LoRA, targets=r"^\d$", rank=2, alpha=6)
        load_adapter_weights(other, ck)
        folded.append(fold(other).state_dict())
    whole = average(folded[0], folded)
    deltas = product_of_pairs(cks, scale=3.0)
    for name in ("0", "2"):
        base = before[f"{name}.host.weight"]
        torch.testing.assert_close(base + deltas[name], whole[f"{name}.weight"], rtol=1e-4, atol=1e-4)
    load_adapter_weights(model, metrics_weighted(cks[0], cks, metrics=[1.0, 1.0], space="product"))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items() if key in before)
    rank_two = model(x)
    torch.testing.assert_close(fold(model)(x), rank_two, rtol=1e-4, atol=1e-4)
