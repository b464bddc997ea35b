"""A bias over a trace, step by step, and where ids go."""

import numpy as np
import pandas as pd
import pytest
import torch

from notebook_kit.diagnostics.balance import bias_stream, constancy, id_table
from notebook_kit.diagnostics.routing import max_violation
from notebook_kit.routers import HashRouter, LossFreeBias, TopK, reroute
from notebook_kit.routing import RoutingTrace


def trace_of(logits, tokens):
    trace, n = RoutingTrace(["layer"], k=2), len(logits)
    routing = TopK(1, logits.shape[1]).eval().route(logits)
    parts = [(routing.logits, routing.weights, routing.experts)]
    trace.append(parts, tokens=tokens, positions=torch.arange(n), sequences=torch.zeros(n, dtype=torch.int64))
    return trace


@pytest.fixture
def skewed():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(600, 4, generator=generator) + torch.tensor([1.0, 0.5, 0, -0.5])
    return trace_of(z, torch.randint(97, 103, (600,), generator=generator))


def test_the_first_step_by_hand(skewed):
    stream = bias_stream(skewed, updates=10, batch_size=64, bias_rate=0.05, seed=3)
    assert stream.bias.shape == (10, 4)
    assert stream.bias[0].tolist() == [0] * 4
    rows = torch.randint(600, (10, 64), generator=torch.Generator().manual_seed(3))[0]
    load = LossFreeBias(1, 4, scores="softmax").route(skewed.layer_logits(0)[rows]).load
    assert stream.max_violation[0] == pytest.approx(max_violation(load))
    np.testing.assert_allclose(stream.bias[1], 0.05 * np.sign(0.25 - load.numpy()), atol=1e-6)


def test_a_right_step_evens_and_a_large_one_jumps(skewed):
    late = {rate: bias_stream(skewed, bias_rate=rate).max_violation[75:].mean() for rate in (1e-4, 0.005, 0.5)}
    assert late[0.005] < 0.5 * min(late[1e-4], late[0.5])
    stream = bias_stream(skewed, bias_rate=0.005)
    assert max_violation(stream.routing.load) < max_violation(skewed.layer(0).load)
    assert "150 updates of 0.005" in repr(stream)
    assert bias_stream(skewed, k=1, scores="sigmoid").routing.experts.shape == (600, 1)


def test_ids_go_where_the_table_sends_them(skewed):
    router = HashRouter(1, 4)
    routing = reroute(skewed, router, layer=0)
    table = id_table(routing, skewed, n_ids=3)
    assert table.shape == (3, 4)
    for text, row in table.iterrows():
        assert row[int(router.table[0, ord(text)])] == 1
    counts = torch.bincount(skewed.tokens)
    assert sorted(counts[[ord(text) for text in table.index]].tolist()) == sorted(counts.topk(3).values.tolist())
    assert constancy(routing, skewed) == 1
    assert 0.25 < constancy(skewed.layer(0), skewed) < 1
    recorded = id_table(skewed.layer(0), skewed)
    pd.testing.assert_series_equal(recorded.sum(axis=1), pd.Series(1.0, recorded.index), check_dtype=False, atol=1e-5)


def test_constancy_by_hand():
    z = torch.tensor([[3.0, 0], [3, 0], [0, 3], [0, 3]])
    trace = trace_of(z, torch.tensor([5, 5, 5, 200]))
    assert constancy(trace.layer(0), trace) == 0.75
    assert id_table(trace.layer(0), trace).index.tolist() == ["\x05", "\\xc8"]
    trace.vocabulary = {5: "five"}
    assert id_table(trace.layer(0), trace).index.tolist() == ["five", "#200"]


def test_bad_input(skewed):
    with pytest.raises(ValueError, match="k must be at most n_experts=4, got 5"):
        bias_stream(skewed, k=5)
    with pytest.raises(ValueError, match=r"layer must be in \[0, 0\], got 3"):
        bias_stream(skewed, layer=3)
