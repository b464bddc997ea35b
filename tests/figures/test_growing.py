import numpy as np
import pandas as pd
import pytest
import torch

from notebook_kit.figures.growing import (
    cache_view,
    channel_view,
    density_figure,
    gate_view,
    growth_figure,
    schedule_view,
    strip_view,
)

SNAPSHOTS = torch.stack([torch.zeros(80, 4), torch.tensor([[2.0, 0, -2, -4]]).expand(80, 4)])


def titles(figure):
    return {axis.title.text for axis in [*figure.select_xaxes(), *figure.select_yaxes()]} - {""}


def test_the_gate_thins_out():
    figure = gate_view(SNAPSHOTS, [0, 10], moment=1, temperature=0.5, noise=False)
    square, bars = figure.data
    assert square.z.shape == (4, 60)
    assert np.isfinite(square.z).sum(0).tolist() == [2] * 60
    np.testing.assert_allclose(square.z[0, 0], np.log10(0.9817), atol=1e-3)
    assert bars.y.tolist() == [0, 1, 0, 0]
    assert figure.layout.title.text == "step 10, temperature 0.5: 2.00 of 4 experts a token"
    assert {"token", "expert", "active experts of a token", "share of tokens"} <= titles(figure)
    assert "step 10, temperature 2: 4.00" in gate_view(SNAPSHOTS, [0, 10], moment=99, temperature=2.0).layout.title.text


@pytest.mark.parametrize("setting", [{"temperature": 0.05}, {"temperature": 5.0}, {"threshold": 0.5}, {"hard": True}])
def test_the_gate_at_the_ends(setting):
    bars = gate_view(SNAPSHOTS, [0, 10], **setting).data[1]
    assert bars.y.sum() == pytest.approx(1)
    if setting.get("hard") or setting.get("threshold"):
        assert bars.y[0] > 0.9


def test_the_schedule_and_what_it_leaves():
    figure = schedule_view(SNAPSHOTS, [0, 10], [4.0, 2.0, 1.5], duration=10, temperature=2.0, final_temperature=0.05)
    ran, experts, temperature = figure.data
    assert ran.y.tolist() == [4, 2, 1.5]
    assert experts.y[0] == 4
    assert experts.y[1] < 1.5
    np.testing.assert_allclose(temperature.y, [2, 0.05])
    assert {"training step", "active experts a token, mean", "temperature"} <= titles(figure)
    flat = schedule_view(SNAPSHOTS, [0, 10], [4.0], temperature=0.05, final_temperature=10.0)
    assert flat.data[2].y.tolist() == [0.05, 0.05]


def test_growth():
    figure = growth_figure({"a": [8.0, 2.0], "b": [1.0, 1.0]}, {"a": [0, 2], "b": [3, 3]}, 8)
    assert figure.data[0].x.tolist() == [1, 2]
    assert [trace.y[0] for trace in figure.data if trace.type == "bar"] == [1, 3]
    assert {"training step", "active experts a token, mean", "unused experts (dots: seeds)"} <= titles(figure)


def test_channels_are_sorted_by_how_many_keep_them():
    scores = torch.tensor([[[5.0, 4, 3, 1, 0, 2], [5, 0, 1, 4, 3, 2]]])
    figure = channel_view(scores, ["x", "y"], density=0.5)
    square, first, *_ = figure.data
    assert square.z.tolist() == [[2, 1, 1, 0, 0, 0], [2, 0, 0, 1, 1, 0]]
    np.testing.assert_allclose(first.y, [5 / 15, 9 / 15, 12 / 15, 14 / 15, 1, 1], rtol=1e-6)
    assert "17% of the channels are everyone's, 33% one expert's own, 83% are stored" in figure.layout.title.text
    assert {"domain", "share of the channels, the strongest first", "share of all |a|"} <= titles(figure)
    assert (channel_view(scores, ["x", "y"], density=1.0, layer=255).data[0].z == 2).all()
    assert channel_view(scores, ["x", "y"], density=0.01).data[0].z.sum() == 4
    many = torch.rand(1, 40, 6)
    assert channel_view(many, [str(i) for i in range(40)]).data[0].z.shape == (40, 6)


def test_quality_against_compute():
    curve = pd.DataFrame({"density": [0.5, 1.0], "domain": [-2.1, -2.0], "random": [-2.6, -2.0]})
    figure = density_figure(curve, -2.0, {"trained": (0.5, -2.05)})
    assert [trace.name for trace in figure.data] == ["the domain's channels", "random channels", "trained", "dense"]
    assert figure.data[2].y == (-2.05,)
    assert {"share of the MLP that runs for a token", "log-likelihood (nats per byte)"} <= titles(figure)
    assert len(density_figure(curve, -2.0).data) == 3


def test_strips_of_experts():
    before, after = torch.zeros(2, 120, dtype=torch.int64), torch.tensor([[0], [1]]).expand(2, 120)
    figure = strip_view(before, after, ["x", "y"])
    assert figure.data[0].z.shape == (2, 96)
    assert "trained router: 100% of the tokens" in figure.layout.title.text
    assert "untrained router: 50% of" in strip_view(before, after, ["x", "y"], trained=False).layout.title.text
    assert {"token", "language of the text"} <= titles(figure)


def test_a_cache_at_work():
    sequence = torch.tensor([*map("ABCD".index, "ABCABDABCABD")])
    figure = cache_view(sequence, 4, capacity=2, policy="belady")
    square, hit, load, lru, belady, mark = figure.data
    assert square.z.sum(0).tolist() == [1] + [2] * 11
    assert (len(hit.x), len(load.x)) == (3, 9)
    assert lru.y[1] == 0
    assert belady.y[1] == mark.y[0] == 3 / 12
    assert figure.layout.title.text == "belady, 64 tokens ahead, capacity 2: 25.0% hits, 9 loads"
    assert {"token (light: in the cache)", "expert", "capacity (experts)", "hit rate"} <= titles(figure)
    assert len(cache_view(sequence, 4, policy="lru", capacity=64, start=999).data) == 5
    assert cache_view(sequence, 4, capacity=2, lookahead=0).data[5].y[0] == 0
