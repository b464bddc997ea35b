"""The pictures show the numbers they were given, have titled axes, and are made in milliseconds."""

import numpy as np
import pandas as pd
import pytest
import torch

from notebook_kit.diagnostics.merge_arrivals import ArrivalView, ProjectionView
from notebook_kit.diagnostics.merge_subspaces import doge_path, doge_view
from notebook_kit.figures.merge_subspaces import (
    arrival_figure,
    bars_figure,
    doge_figure,
    order_figure,
    projection_figure,
)


def titled(picture):
    return picture.layout.xaxis.title.text


def test_arrivals():
    table = pd.DataFrame([[0.9, 0.8], [0.45, 0.7]], index=["a", "<b>"], columns=[1, 2])
    picture = arrival_figure(ArrivalView(table, np.array([1.0, 1.4])))
    heat, edge, ours, root = picture.data
    np.testing.assert_allclose(heat.z, table.to_numpy(), rtol=1e-6)
    assert (heat.zmin, heat.zmax) == (0.4, 1.0)
    assert "0.750" in picture.layout.title.text  # the mean over both tasks at the end
    assert list(edge.x) == [0.5, 1.5, 1.5, 2.5]
    assert list(edge.y) == [0.5, 0.5, 1.5, 1.5]
    np.testing.assert_allclose(root.y, [1, 2**0.5])
    assert list(ours.y) == [1.0, 1.4]
    assert titled(picture)


@pytest.mark.parametrize(("block", "rank", "lines"), [("corner", 2, 2), ("cross", 2, 3), ("corner", 0, 1)])
def test_what_is_removed_is_outlined(block, rank, lines):
    view = ProjectionView(np.arange(16.0).reshape(4, 4), rank, 0.25, block, "w")
    picture = projection_figure(view)
    assert len(picture.data) == 1 + lines
    assert "25%" in picture.layout.title.text
    if rank and block == "corner":
        assert list(picture.data[2].x) == [0.5, 2.5, 2.5]
    assert titled(picture)
    assert picture.layout.yaxis.title.text
    assert projection_figure(ProjectionView(np.zeros((2, 2)), 0, 0.0, "corner", "w")).data[0].zmax == 1


def test_orders_and_bars():
    study = pd.DataFrame({"variant": ["x", "x", "y"], "order": [0, 1, 0], "mean": [0.2, 0.4, 0.5]})
    picture = order_figure(study)
    np.testing.assert_allclose(picture.data[1].x, [0.3, 0.5])
    assert "2 orders" in picture.layout.title.text
    bars = bars_figure({"one": 0.5, "two": 0.25}, start=0.1)
    assert list(bars.data[0].y) == [0.5, 0.25]
    assert list(bars.data[1].x) == ["one", "two"]
    assert len(bars_figure({"one": 0.5}).data) == 1
    assert list(bars_figure({"one": 0.5}, start=0.1).data[1].x) == ["one"]


@pytest.mark.parametrize("count", [1, 3])
def test_doge(count):
    base = {"layers.0.weight": torch.zeros(6, 8), "layers.1.weight": torch.zeros(4, 6)}
    experts = [{name: torch.randn(tensor.shape) for name, tensor in base.items()} for _ in range(count)]
    path = doge_path(base, experts, lambda weights: 0.5, grid=(0, 4), lr=1e-2)
    for steps in (0, 4):
        picture = doge_figure(doge_view(path, steps=steps))
        lines = [trace for trace in picture.data if trace.type == "scatter" and trace.mode == "lines"]
        assert [trace.name for trace in lines] == ["layers.0", "layers.1"]
        assert all(len(trace.y) == 5 for trace in lines)
        assert picture.data[1].x[0] == steps
        matrices = doge_figure(doge_view(path, steps=steps, show="matrices", tensor="layers.1.weight"))
        assert [trace.z.shape for trace in matrices.data] == [(4, 6)] * 4
        assert all(trace.zmin == -trace.zmax for trace in matrices.data)
        one, _, delta, merged = (torch.from_numpy(trace.z) for trace in matrices.data)
        if steps == 0:
            assert not delta.any()
        if count == 1:
            torch.testing.assert_close(merged, one + delta, rtol=1e-4, atol=1e-5)
