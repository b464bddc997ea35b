import numpy as np
import pandas as pd
import pytest
import torch

from notebook_kit.figures.adapter_routing import (
    adaptation_figure,
    data_view,
    group_view,
    shots_figure,
    skills_view,
    vote_view,
)
from tests.diagnostics.test_adapter_routing import glider
from tests.mixtures.test_adapter_bank import E, X


def titles(figure):
    return {axis.title.text for axis in [*figure.select_xaxes(), *figure.select_yaxes()]} - {""}


def test_skills_view():
    torch.manual_seed(0)
    runs = {h: {"first": torch.rand(4, h, 3).softmax(-1), "second": torch.rand(4, h, 3).softmax(-1)} for h in (1, 2)}
    overlap = torch.rand(4, 4)
    figure = skills_view(runs, overlap, list("abcd"), n_splits=2, layer=1, head=1)
    square, dots = figure.data
    np.testing.assert_allclose(square.z, runs[2]["second"][:, 1])
    assert len(dots.x) == 6
    assert "second: head 1 of 2" in figure.layout.title.text
    assert {"skill", "task", "cosine of the tasks' w", "share of equal answers"} == titles(figure)
    ends = skills_view(runs, overlap, list("abcd"), layer=256, head=255)
    assert "second: head 0 of 1" in ends.layout.title.text


def test_adaptation_and_shots():
    table = pd.DataFrame({20: [0.8, 0.7], 100: [0.9, 0.85]}, index=["z", "full"])
    figure = adaptation_figure(table, title="x")
    assert [trace.name for trace in figure.data] == ["20 examples", "100 examples", "chance"]
    assert figure.data[0].y.tolist() == [0.8, 0.7]
    assert titles(figure) == {"what trains", "accuracy"}
    lines = shots_figure(table.T)
    assert lines.data[1].y.tolist() == [0.7, 0.85]
    assert list(lines.layout.xaxis.tickvals) == [20, 100]
    assert titles(lines) == {"shots K (log)", "accuracy"}


@pytest.mark.parametrize("weight", [0.01, 3.0, 10_000.0])
def test_vote_view(weight):
    curve = pd.DataFrame({"weight": [0.0, 1.0, 10.0, None], "held-in": [0.1, 0.2, 0.3, 0.4], "held-out": [0.0] * 4})
    ours = glider()
    figure = vote_view(ours, {"a": (X, E[0]), "b": (X, E[2])}, list("xyz"), curve, weight=weight, layer=256)
    square, held_in, held_out, mark = figure.data
    assert square.z.shape == (2, 3)
    np.testing.assert_allclose(square.z.sum(1), 1, atol=1e-5)
    assert held_in.x.tolist() == [1, 10]
    assert held_in.y.tolist() == [0.2, 0.3]
    assert held_out.name == "held-out"
    assert mark.x.tolist() == [weight, weight]
    assert ours.weight is None
    assert {"expert", "domain", "weight a (log)", "accuracy"} == titles(figure)


def test_group_view():
    accuracy, perplexity = {5: torch.tensor([0.9, 0.8, 0.7, 0.1])}, {5: torch.tensor([2.0, 3.0, 4.0, torch.inf])}
    similarity = torch.tensor([[2.0, 2, 0, 0], [2, 2, 0, 0], [0, 0, 2, 0], [0, 0, 0, 2]])
    figure = group_view(accuracy, perplexity, similarity, list("abcd"), size=3, n_experts=2)
    assert figure.layout.title.text == "chosen: a · c"
    chosen, listed, others, square, outline = figure.data
    assert (chosen.text, listed.text, others.text) == (("a", "c"), ("b",), ("d",))
    assert others.y.tolist() == [1e9]
    np.testing.assert_allclose(square.z[0], [1, 1, 0, 0])
    assert set(zip(outline.x, outline.y, strict=True)) == {(0, 0), (0, 2), (2, 0), (2, 2)}
    for values in ({"size": 1, "n_experts": 16}, {"size": 64, "n_experts": 1, "weight": 1.0, "diversity": "least"}):
        assert group_view(accuracy, perplexity, similarity, list("abcd"), **values).data


def test_data_view():
    torch.manual_seed(0)
    data, shots = torch.randn(50, 6), torch.randn(4, 6)
    figure = data_view(data, shots, n_shots=1000, n_data=24, dedup_distance=0.0)
    assert [trace.name for trace in figure.data][1:] == ["fetched: 20", "kept: 20", "shots: 4"]
    assert figure.layout.title.text == "0 near-duplicates dropped"
    assert len(data_view(data, shots, n_data=2000, dedup_distance=1.0).data[2].x) >= 1
    assert len(data_view(data, shots, n_shots=1, n_data=0).data[2].x) == 0
    assert {"first main direction", "second main direction"} == titles(figure)
