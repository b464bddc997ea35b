"""The pictures of balance: titles, axes, what is drawn, and text that stays text."""

import numpy as np
import pandas as pd
import torch

from notebook_kit.diagnostics.balance import BiasStream
from notebook_kit.figures.balance import bias_figure, history_figure, id_figure
from notebook_kit.routers import TopK


def test_a_bias_at_work():
    routing = TopK(1, 10).route(torch.randn(20, 10))
    stream = BiasStream(np.linspace(1, 0, 6), np.arange(60.0).reshape(6, 10), routing, 0.01)
    figure = bias_figure(stream)
    assert len(figure.data) == 2 + 10
    assert figure.data[3].y.tolist() == stream.bias[:, 1].tolist()
    assert len({(trace.line.color, trace.line.dash) for trace in figure.data[2:]}) == 10
    assert "bias rate 0.01" in figure.layout.title.text
    assert figure.layout.yaxis.title.text == "MaxVio of the batch"
    assert figure.layout.yaxis2.title.text == "bias of each expert"
    assert figure.layout.xaxis.title.text == "batches seen"


def test_histories_are_means_over_seeds_and_smooth():
    rows = [{"router": name, "step": s, "value": s + seed} for name in "ab" for seed in (0, 2) for s in range(4)]
    figure = history_figure(pd.DataFrame(rows), y="share", title="t", smooth=2)
    assert [trace.name for trace in figure.data] == ["a", "b"]
    assert figure.data[0].y.tolist() == [1.0, 1.5, 2.5, 3.5]
    assert figure.layout.yaxis.title.text == "share"
    assert figure.layout.xaxis.title.text == "training step"


def test_ids_side_by_side():
    table = pd.DataFrame(np.eye(3), index=["<b>", " ", "a"])
    figure = id_figure({"one": table, "two": table}, title="t")
    assert len(figure.data) == 2
    assert [note.text for note in figure.layout.annotations] == ["one", "two"]
    assert figure.layout.yaxis.ticktext == ("&lt;b&gt;", "␣", "a")
    assert figure.layout.xaxis.title.text == figure.layout.xaxis2.title.text == "expert"
