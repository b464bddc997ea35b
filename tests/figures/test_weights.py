"""Figures of weights: what they draw is what was measured; axes say what they are."""

import numpy as np
import plotly.graph_objects as go
import pytest
import torch

from notebook_kit.diagnostics.weights import METRICS, TaskVectors
from notebook_kit.figures.weights import WHOLE, spectra_figure, weight_view
from notebook_kit.zoo import digit_labels


@pytest.fixture
def weights():
    g = torch.Generator().manual_seed(0)
    base = {"a.weight": torch.randn(8, 6, generator=g), "a.bias": torch.randn(8, generator=g)}
    return base, [{k: t + 0.1 * torch.randn(t.shape, generator=g) for k, t in base.items()} for _ in range(3)]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("tensor", [WHOLE, "a.weight"])
def test_every_view_has_titles_and_data(weights, metric, tensor):
    figure = weight_view(*weights, metric=metric, tensor=tensor, rank=2, density=0.5, names=["x", "y", "z"])
    assert isinstance(figure, go.Figure)
    assert figure.layout.xaxis.title.text
    assert figure.layout.yaxis.title.text
    trace = figure.data[0]
    values = np.asarray(trace.z if trace.type == "heatmap" else trace.y, dtype=float)
    assert np.isfinite(values).all()


def test_the_heatmaps_hold_what_was_measured(weights):
    vectors = TaskVectors(*weights)
    np.testing.assert_allclose(weight_view(*weights).data[0].z, vectors.norms())
    pairs = weight_view(*weights, metric="cosine", tensor="a.weight").data[0]
    np.testing.assert_allclose(pairs.z, vectors.cosine("a.weight"))
    assert (pairs.zmin, pairs.zmax) == (-1, 1)
    bars = weight_view(*weights, metric="norm", tensor="a.bias").data[0]
    np.testing.assert_allclose(bars.y, vectors.norms()[1])


def test_bad_input(weights):
    with pytest.raises(ValueError, match="metric must be one of"):
        weight_view(*weights, metric="angle")
    with pytest.raises(ValueError, match=r"no floating tensor is called 'b'; there are a\.weight"):
        weight_view(*weights, tensor="b")
    with pytest.raises(ValueError, match="has no singular values"):
        weight_view(*weights, metric="spectrum", tensor="a.bias")


def test_rank_is_marked():
    figure = spectra_figure({"x": np.array([3.0, 2.0, 1.0])}, rank=2)
    assert figure.data[-1].name == "rank 2"
    assert figure.data[-1].x.tolist() == [2.5, 2.5]


def test_every_metric_draws_on_the_digit_bed():
    bed = digit_labels()
    for metric in METRICS:
        for density in (0.2, 0.6):
            assert weight_view(bed.base, bed.experts, metric=metric, density=density, names=bed.names).data
