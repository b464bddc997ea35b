"""Pictures of interference: they hold what was measured, and every axis says what it is."""

import numpy as np
import pytest

from notebook_kit.diagnostics.interference import conflict_view, owners, patch_view, pcb_view, tall_view
from notebook_kit.figures.interference import (
    conflict_figure,
    kept_figure,
    owners_figure,
    patch_figure,
    pcb_figure,
    search_figure,
    tall_figure,
)
from notebook_kit.merging import tall_masks
from notebook_kit.zoo import digit_labels


@pytest.fixture(scope="module")
def bed():
    return digit_labels()


def titled(figure):
    layout = figure.to_plotly_json()["layout"]
    return [layout[key]["title"]["text"] for key in layout if key.startswith(("xaxis", "yaxis"))]


def test_conflicts(bed):
    view = conflict_view(bed.base, bed.experts, density=0.3, n_experts=5)
    figure = conflict_figure(view)
    assert all(titled(figure))
    assert list(figure.data[0].x) == list(bed.base)
    np.testing.assert_allclose(figure.data[0].y, view.frame["conflict"][:-1])
    np.testing.assert_allclose(figure.data[1].y, view.curve["conflict"])
    assert figure.layout.title.text == "5 experts, largest 30 % of each task vector"


def test_a_patch_shares_one_scale_and_the_sign_has_its_own(bed):
    view = patch_view(bed.base, bed.experts, names=("one", "two"))
    figure = patch_figure(view)
    assert [np.shape(trace.z) for trace in figure.data] == [(8, 8)] * 4
    tops = [trace.zmax for trace in figure.data]
    assert tops[0] == tops[1] == tops[3]
    assert tops[2] == 1
    assert [note.text for note in figure.layout.annotations] == ["one", "two", "elected sign", "merged"]
    assert [trace.showscale for trace in figure.data] == [False, False, False, True]


@pytest.mark.parametrize("scored", [True, False])
@pytest.mark.parametrize("inter", ["sum", "none"])
def test_who_keeps_what(bed, scored, inter):
    view = pcb_view(bed.base, bed.experts, bed.score if scored else None, names=bed.names, inter=inter)
    figure = pcb_figure(view, y="accuracy")
    scatter = figure.data[:9]
    assert sum(len(trace.x) for trace in scatter) == 2000
    assert len(scatter[0].x) == int((~view.kept).sum())
    assert all(np.abs(trace.y).max(initial=0) <= 1 for trace in scatter)
    assert [trace.name for trace in scatter] == ["dropped", *bed.names]
    assert list(figure.data[9].marker.color) == [trace.marker.color for trace in scatter[1:]]
    assert float(np.sum(figure.data[10].y)) == pytest.approx(1)
    assert ("merged: mean 0." in figure.layout.title.text) is scored


def test_nothing_kept_nothing_breaks(bed):
    assert pcb_figure(pcb_view(bed.base, [bed.base] * 2, names=["a", "b"])).data


@pytest.mark.parametrize("k", [0, 2, 9])
def test_masks_and_claims(bed, k):
    view = tall_view(bed.base, bed.experts, bed.score, k=k)
    figure = tall_figure(view)
    assert all(titled(figure))
    assert [trace.name for trace in figure.data[:4]] == ["masked", "its expert", "no mask", "consensus"]
    bars = figure.data[4]
    np.testing.assert_allclose(bars.y, view.claims / view.claims.sum())
    assert [opacity == 1 for opacity in bars.marker.opacity] == [n >= k for n in range(9)]
    assert [(note.x, note.text.strip()) for note in figure.layout.annotations] == [(0, "catastrophic"), (1, "selfish")]


def test_one_expert_has_two_bars(bed):
    one = [bed.experts[0]]
    masked = tall_masks(bed.base, one, threshold=0.4)
    assert set(np.unique(owners(masked))) <= {-1, 0}


def test_owners_have_a_colour_each(bed):
    masked = tall_masks(bed.base, bed.experts, names=bed.names)
    owner = owners(masked)
    figure = owners_figure(owner, bed.names, title="whose")
    trace = figure.data[0]
    np.testing.assert_array_equal(trace.z, owner)
    assert (trace.zmin, trace.zmax) == (-1.5, 8.5)
    assert list(trace.colorbar.ticktext) == ["nobody", *bed.names, "several"]
    assert len({colour for _, colour in trace.colorscale}) == 10


def test_curves():
    figure = kept_figure({"a": {0.1: 0.5, 1.0: 0.9}, "b": {0.5: 0.7}}, title="kept")
    assert list(figure.layout.xaxis.tickvals) == [0.1, 0.5, 1.0]
    assert list(figure.layout.xaxis.ticktext) == ["0.1", "0.5", "1"]
    figure = search_figure({"seed 0": [0.1, 0.1, 0.4]}, y="validation accuracy")
    assert list(figure.data[0].x) == [1, 2, 3]
    assert titled(figure) == ["merges scored", "validation accuracy"]
