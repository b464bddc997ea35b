"""Pictures of thin experts and unions: what is in them, at the ends of every control."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from notebook_kit.diagnostics.fine_grained import union_curve
from notebook_kit.figures.fine_grained import SHOWN, FineRun, fine_view, masking_figure, union_view
from notebook_kit.mixtures import SelectiveAttention, UnionOfExperts
from notebook_kit.models import MLP

SCORES = {"as trained": 0.2, "shared off": 0.8}


def run(tokens, routed, n_shared, width):
    weights = torch.zeros(tokens, routed)
    weights[:, 0] = 0.5
    return FineRun(weights, SCORES, n_shared, 2, width, 1234567)


RUNS = {(1, 0): run(70, 8, 0, 32), (4, 0): run(70, 32, 0, 8), (4, 2): run(70, 30, 2, 8)}
LABELS = [str(i // 10) for i in range(70)]


def titles(figure):
    return {axis.title.text for axis in [*figure.select_xaxes(), *figure.select_yaxes()]} - {""}


def test_shared_experts_are_a_band_on_top():
    figure = fine_view(RUNS, LABELS, granularity=4, n_shared=2, start=5)
    grid, bars = figure.data
    assert grid.z.shape == (32, SHOWN)
    assert (grid.z[:2] == 1).all()
    assert (grid.z[2] == 0.5).all()
    assert (grid.z[3:] == 0).all()
    np.testing.assert_allclose(bars.x, [0.2, 0.8], rtol=1e-6)
    assert bars.y == ("as trained", "shared off")
    assert figure.layout.title.text == "m = 4, width 8: 2 shared, 2 of 30 routed, 1,234,567 combinations"
    assert {"token, by label", "expert", "test loss (nats)"} <= titles(figure)
    assert figure.layout.shapes[0].y0 == 1.5
    assert figure.layout.xaxis.ticktext == ("0", "1", "2", "3", "4", "5")


@pytest.mark.parametrize(
    ("granularity", "n_shared", "rows"), [(1, 8, 8), (2, 0, 8), (8, 1, 32), (8, 8, 32), (4, 0, 32)]
)
def test_the_nearest_stored_run_below(granularity, n_shared, rows):
    assert fine_view(RUNS, LABELS, granularity=granularity, n_shared=n_shared, start=10**6).data[0].z.shape[0] == rows


def test_masking_has_a_line_for_each_layer():
    frame = pd.DataFrame({"layer": ["a", "a", "b"], "masked": [0, 0.5, 0.25], "score": [1.0, 2.0, 3.0]})
    figure = masking_figure(frame, y="loss (nats)")
    assert [trace.name for trace in figure.data] == ["a", "b"]
    assert figure.data[0].x.tolist() == [0, 50]
    assert {"loss (nats)", "each token's best routed experts masked (% of all routed)"} == titles(figure)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = SelectiveAttention(nn.MultiheadAttention(4, 2, batch_first=True), k=1)
        self.mlp = UnionOfExperts(MLP([4, 8, 4]), n_experts=4, k=2)

    def forward(self, x):
        h = x.reshape(-1, 2, 2, 2, 2).transpose(2, 3).reshape(-1, 4, 4)
        return self.mlp(h + self.attention(h)).mean(1)


@pytest.fixture
def model_and_curve():
    model = Model()
    layers = {"attention": model.attention, "feed-forward": model.mlp}
    images = torch.rand(3, 16)
    settings = [{"k": k} for k in (4, 2, 1)]
    return model, layers, images, union_curve(list(layers.values()), lambda: model(images).norm(), settings)


@pytest.mark.parametrize("layer", ["feed-forward", "attention"])
def test_patches_that_nobody_takes_are_empty(model_and_curve, layer):
    model, layers, images, curve = model_and_curve
    n = 4 if layer == "feed-forward" else 2
    figure = union_view(model, layers, images, curve, layer=layer, k=1, capacity_factor=4.0)
    panels = figure.data[0].z
    assert panels.shape == (4, n * 5 - 1)
    assert np.isfinite(panels).sum() == 16  # every patch by one expert
    assert figure.layout.title.text == "image 0, k = 1: all served"
    full = union_view(model, layers, images, curve, layer=layer, k=512, capacity_factor=4.0, image=99)
    np.testing.assert_allclose(full.data[0].z[:, :4], images[2].reshape(4, 4))
    assert np.isfinite(full.data[0].z).sum() == 16 * n
    tight = union_view(model, layers, images, curve, layer=layer, k=1, capacity_factor=0.25)
    assert np.isfinite(tight.data[0].z).sum() <= 4 * n
    assert "left to the residual" in tight.layout.title.text
    assert {"work (% of the dense layers)", "accuracy"} <= titles(figure)
    assert model.mlp.gate.k == 2
