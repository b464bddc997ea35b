"""The promises that every merge makes (`test_contract`), for the merges of checkpoints and of runs of one task."""

import functools

import pytest
import torch

from notebook_kit.merging import average_checkpoints, greedy_soup, karcher, metrics_weighted, model_stock, sce
from tests.merging import test_contract as promises

MERGES = {
    "metrics_weighted": functools.partial(metrics_weighted, metrics=[0.5, 0.4]),
    "metrics_weighted by steps": functools.partial(metrics_weighted, metrics=[1, 2], metric="steps", form="power"),
    "average_checkpoints": average_checkpoints,
    "average_checkpoints, ema": functools.partial(average_checkpoints, rule="ema"),
    "greedy_soup": functools.partial(greedy_soup, score=lambda weights: 0.0),
    "model_stock": model_stock,
    "model_stock by row": functools.partial(model_stock, scope="row"),
    "model_stock of the model": functools.partial(model_stock, scope="model", mean_of="angles", clamp=False),
    "karcher": karcher,
    "sce": sce,
    "sce, half": functools.partial(sce, density=0.5),
}
every = pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES)


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_result_looks_like_base_and_inputs_stay(merge, dtype):
    promises.test_the_result_looks_like_base_and_inputs_stay(merge, dtype)


@every
def test_precision_layout_and_live_models(merge):
    promises.test_low_precision_is_rounded_once_at_the_end(merge)
    promises.test_non_contiguous_tensors_merge_as_they_look(merge)
    promises.test_parameters_of_a_live_model_can_be_merged(merge)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_pieces_change_nothing_but_rounding(merge, dtype, monkeypatch):
    promises.test_pieces_change_nothing_but_rounding(merge, dtype, monkeypatch)


@every
def test_incompatible_inputs_are_named(merge):
    promises.test_incompatible_inputs_are_named(merge)


@pytest.mark.parametrize("name", ["greedy_soup", "karcher", "model_stock", "model_stock of the model", "sce"])
def test_ten_experts_in_any_order(name):
    experts = promises.experts_of(10)
    merged = MERGES[name](promises.model(), experts)
    other = MERGES[name](promises.model(), experts[::-1])
    torch.testing.assert_close(merged["layer.weight"], other["layer.weight"], rtol=1e-4, atol=1e-5)
