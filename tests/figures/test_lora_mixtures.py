"""The pictures at the ends of their controls."""

import numpy as np
import pytest
import torch

from notebook_kit.diagnostics.lora_mixtures import RankUse
from notebook_kit.figures.lora_mixtures import (
    AllocationRun,
    GroupRun,
    allocation_view,
    gate_view,
    group_view,
    rank_view,
)
from notebook_kit.routing import RoutingTrace


@pytest.mark.parametrize("weights", [(1, 1, 1), (1, 5, 10), (10, 1, 1)])
def test_the_total_is_locked(weights):
    runs = {(2, 2, 2): AllocationRun([0.8, 0.9], [1, 2, 3]), (1, 2, 3): AllocationRun([0.7], [float("nan"), 2, 1])}
    picture = allocation_view(runs, [10, 20, 30], **dict(zip(("bottom", "middle", "top"), weights, strict=True)))
    assert sum(picture.data[0].x) == 6
    assert picture.layout.title.text.startswith("-".join(map(str, picture.data[0].x)))
    nearest = "1-2-3" if weights == (1, 5, 10) else "2-2-2"
    assert f"nearest trained: {nearest}" in picture.layout.title.text


def test_groups_with_and_without_an_optimum():
    runs = {
        "off": GroupRun(([0.5, 0.6], [0.4, 0.5]), 0.9, 0.8),
        "on": GroupRun(([0.3, 0.3], [0.7, 0.7]), 0.9, 0.8, (0.25, 0.75)),
        "LoRA": GroupRun(((), ()), 0.7, 0.9),
    }
    assert len(group_view(runs, loss="off").data) == 2 + 3
    picture = group_view(runs, loss="on")
    assert len(picture.data) == 4 + 3
    assert "knowledge 0.900" in picture.layout.title.text


@pytest.mark.parametrize("rows", ["tasks", "tokens"])
@pytest.mark.parametrize("k", [1, 3, 99])
def test_ranks(rows, k):
    scores = np.random.default_rng(0).random((10, 6)).astype(np.float32)
    use = RankUse([scores], np.arange(10) % 2, ["a", "b"], {1: 0.5, 3: 0.7, 6: 0.6}, 3)
    picture = rank_view(use, k=k, rows=rows)
    z = np.array(picture.data[0].z)
    np.testing.assert_allclose(z.sum(1), min(k, 6), rtol=1e-5)
    assert z.shape == ((2, 6) if rows == "tasks" else (10, 6))


@pytest.mark.parametrize(("k", "temperature", "start"), [(1, 0.1, 0), (2, 50.0, 40), (9, 1.0, 10_000)])
def test_gates_along_a_text(k, temperature, start):
    trace = RoutingTrace(["model.layers.0.q_proj"], k=2)
    n, z = 100, torch.randn(100, 3)
    best = z.topk(2, dim=1)
    part = torch.arange(n)
    trace.append([(z, best.values.softmax(1), best.indices)], tokens=part % 100, positions=part, sequences=0 * part)
    labels = ["a"] * 50 + ["<none>"] * 50
    picture = gate_view(trace, ["a", "b", "c"], labels, k=k, temperature=temperature, start=start)
    shown = np.array(picture.data[0].z)
    np.testing.assert_allclose(shown.sum(0), 1, rtol=1e-5)
    assert ((shown > 0).sum(0) <= k).all()
    right = float((best.indices[:50, 0] == 0).float().mean())
    assert f"right adapter first: {right:.0%}" in picture.layout.title.text
