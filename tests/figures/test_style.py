"""The house style: titles on axes, colours that can be told apart, signed maps centred on zero."""

import numpy as np
import pytest

from notebook_kit.figures.style import DIVERGING, PALETTE, SEQUENTIAL, figure, heatmap


def test_axes_titles_and_what_is_merged_into_them():
    plot = figure([], title="T", x="step", y="loss, nats", height=200, yaxis={"range": [0, 1]}, xaxis2={"anchor": "y"})
    assert (plot.layout.xaxis.title.text, plot.layout.yaxis.title.text) == ("step", "loss, nats")
    assert tuple(plot.layout.yaxis.range) == (0, 1)
    assert plot.layout.yaxis.gridcolor
    assert plot.layout.xaxis2.title.text == ""
    assert (plot.layout.title.text, plot.layout.height) == ("T", 200)
    assert plot.layout.template.to_plotly_json() == {}
    assert tuple(plot.layout.colorway) == PALETTE
    assert plot.layout.font.color is None  # the theme's


def test_room_for_title_and_legend():
    bare = figure([{"type": "scatter", "y": [1]}]).layout.margin.t
    titled = figure([{"type": "scatter", "y": [1]}], title="T").layout.margin.t
    legend = figure([{"type": "scatter", "y": [1], "name": n} for n in "ab"], title="T").layout.margin.t
    assert bare < titled < legend


def test_signed_heatmaps_are_centred():
    trace = heatmap([[-3, 1], [2, 0]], signed=True)
    assert (trace["zmin"], trace["zmax"]) == (-3, 3)
    assert trace["colorscale"] is DIVERGING
    assert DIVERGING[len(DIVERGING) // 2][0] == 0.5
    assert heatmap([[0, 0]], signed=True)["zmax"] == 1
    assert heatmap([[1, 2]], signed=True, limit=5)["zmin"] == -5


def test_plain_heatmaps_and_their_limits():
    trace = heatmap([[1, 4]], x=["a", "b"], y=["r"], label="probability")
    assert (trace["zmin"], trace["zmax"]) == (0, 4)
    assert trace["colorscale"] is SEQUENTIAL
    assert trace["colorbar"]["title"]["text"] == "probability"
    assert (trace["x"], trace["y"]) == (["a", "b"], ["r"])
    assert heatmap([[-2, 4]])["zmin"] == -2
    assert heatmap([[1, 2]], limit=(1, 2))["zmin"] == 1
    assert heatmap([[1, 2]], limit=9)["zmax"] == 9
    assert heatmap([[1]], showscale=False)["showscale"] is False


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("z", [np.full((2, 2), np.nan), np.zeros((0, 3)), np.array([[np.inf, 1.0]])])
def test_odd_numbers_give_a_finite_scale(z, signed):
    trace = heatmap(z, signed=signed)
    assert np.isfinite([trace["zmin"], trace["zmax"]]).all()
    assert trace["zmin"] < trace["zmax"]
    figure([trace])


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_the_sequential_map_grows_lighter_all_the_way():
    light = [luminance(colour) for _, colour in SEQUENTIAL]
    assert light == sorted(light)
    assert light[-1] - light[0] > 0.6
    ends = [luminance(colour) for _, colour in DIVERGING]
    assert ends[2] == max(ends)
    assert len(set(PALETTE)) == len(PALETTE)
