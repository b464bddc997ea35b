import numpy as np
import pandas as pd
import pytest
import torch

from notebook_kit import models
from notebook_kit.figures.dynamic_routing import compute_view, cut_view, null_view
from notebook_kit.hyperparameters import hyperparameters
from notebook_kit.routers import record_routing

P = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.97, 0.01, 0.01, 0.01], [0.25, 0.25, 0.25, 0.25]])
CURVE = pd.DataFrame({"threshold": [0.2, 0.8], "experts": [1.0, 3.0], "score": [0.8, 0.9]})


def titles(figure):
    return {axis.title.text for axis in [*figure.select_xaxes(), *figure.select_yaxes()]} - {""}


@pytest.fixture(scope="module")
def trace():
    model = models.tiny_mixtral()
    with torch.no_grad(), record_routing(model) as trace:
        model(torch.arange(128).reshape(2, 64) + 40)
    return trace


def test_the_cut_sorts_tokens_by_their_experts():
    figure = cut_view(P.log(), CURVE, threshold=0.6, y="accuracy")
    square, cut, experts, mark, score, _ = figure.data
    np.testing.assert_allclose(square.z[0], [0.97, 0.5, 0.25], rtol=1e-5)
    assert cut.y.tolist() == [1.5, 2.5, 3.5]
    assert experts.y.tolist() == [1, 3]
    assert score.y.tolist() == [0.8, 0.9]
    assert mark.x.tolist() == [0.6, 0.6]
    assert figure.layout.title.text == "p = 0.60: 2.00 experts a token, from 1 to 3"
    assert {"token, sorted", "rank of the expert", "threshold p", "experts, mean", "accuracy"} <= titles(figure)
    assert len(cut_view(P.log(), threshold=0.6).data) == 2
    assert "0.00 experts" in cut_view(torch.zeros(0, 4)).layout.title.text


def test_null_view_counts_true_experts_and_picks():
    z = torch.tensor([[2.0, 1, 0, -1, 1.5, 0.5, 0.5, 0.5], [2.0, 1.9, 1.8, 0, -1, -1, -1, -1]])
    figure = null_view(z, 4, k=3, n_null=4)
    histogram, mean, even, picks, _ = figure.data
    assert histogram.y.tolist() == [0, 0, 0.5, 0.5]
    assert mean.x.tolist() == [2.5, 2.5]
    assert even.x.tolist() == [1.5, 1.5]
    np.testing.assert_allclose(picks.y, [2 / 6, 2 / 6, 1 / 6, 0, 1 / 6])
    assert {"true experts of a token", "share of tokens", "expert"} <= titles(figure)
    assert null_view(z, 4, k=3, n_null=0).data[0].y.tolist() == [0, 0, 0, 1]
    assert null_view(z, 4, k=512, n_null=4096).layout.title.text == "4 experts, 4 nulls, k = 8"
    assert null_view(z[:0], 4).data[0].y.sum() == 0


@pytest.mark.parametrize("router", hyperparameters(compute_view)["router"].options)
def test_every_router_over_a_trace(trace, router):
    figure = compute_view(trace, router=router, start=3, k=4)
    strip, *bars = figure.data
    assert strip.z.shape == (2, 48)
    assert len(bars) == 2
    assert {"tokens 3 to 50", "layer", "class of the byte", "experts a token"} <= titles(figure)
    if router == "top-k":
        assert (strip.z == 4).all()
    if router == "null experts":  # 16 shadows: three of each, so 4 picks are 2 experts
        assert (strip.z == 2).all()


def test_compute_view_at_the_ends(trace):
    assert compute_view(trace, threshold=1.0).data[0].z.min() == 8
    assert compute_view(trace, threshold=0.0).data[0].z.max() == 1
    assert compute_view(trace, router="null experts", k=512, n_null=0, start=10_000_000).data[0].z.min() == 8
    assert "tokens 80 to 127" in titles(compute_view(trace, start=999))
