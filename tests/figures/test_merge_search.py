import numpy as np
import pytest

from notebook_kit.diagnostics.merge_search import (
    adamerging_view,
    frank_wolfe_view,
    loss_triangle,
    niche_view,
    pool_growth,
    pool_merges,
)
from notebook_kit.figures.merge_search import (
    adamerging_figure,
    frank_wolfe_figure,
    niche_figure,
    search_figure,
    triangle_figure,
)
from tests.diagnostics.test_merge_search import BOWL, CORNERS, coefficients, evolution, nearness


def axes(figure):
    return {key: figure.layout[key].title.text for key in figure.layout if key.startswith(("xaxis", "yaxis"))}


def test_coefficients_and_two_curves_on_one_time_axis():
    figure = adamerging_figure(adamerging_view({"entropy": coefficients()}, step=4), y="weight")
    loss, ring, score, _, cells = figure.data
    assert list(loss.x) == list(range(8))
    assert (list(ring.x), list(score.x)) == ([4], [0, 3, 6, 7])
    assert cells.zmin == -cells.zmax
    assert cells.z.shape == (2, 3)
    assert figure.layout.title.text.startswith("entropy: step 4, entropy ")
    assert axes(figure)["yaxis"] == "entropy (nats)"
    assert all(axes(figure).values())


@pytest.mark.parametrize("granularity", ["task", "layer"])
def test_frank_wolfe_shows_where_every_step_went(granularity):
    curve = pool_growth(CORNERS[2], CORNERS[:2], pool_merges(**BOWL), nearness)
    options = {"names": ["a", "b"], "measure": nearness, "curve": curve, "init": "base", "steps": 5, **BOWL}
    view = frank_wolfe_view(CORNERS[2], CORNERS[:2], pool=2, granularity=granularity, **options)
    figure = frank_wolfe_figure(view, y="score")
    dots, cells = figure.data[-1], figure.data[-2]
    assert list(dots.x) == [1, 2, 1, 2, 1]  # column 0 is the start
    assert list(dots.y) == [1, 2, 3, 4, 5]
    np.testing.assert_allclose(cells.z[-1], [0, 0.6, 0.4], atol=1e-6)
    assert list(figure.layout.xaxis3.ticktext) == ["start", "a", "b"]
    assert all(axes(figure).values())
    assert [trace.name for trace in figure.data if trace.legend == "legend2"] == ["loss (nats)", "gap"]
    still = frank_wolfe_figure(
        frank_wolfe_view({"x": CORNERS[0]["x"] / 2 + CORNERS[1]["x"] / 2}, CORNERS[:2], **options)
    )
    assert len(still.data[-1].x) == 0  # nothing was better than the start


def test_a_triangle_has_its_corners_named():
    ground = loss_triangle(CORNERS, nearness, divisions=3)
    figure = triangle_figure(*ground, np.eye(3), names=("a", "b", "c"))
    assert [note.text for note in figure.layout.annotations] == ["a", "b", "c"]
    np.testing.assert_allclose(np.stack([figure.data[1].x, figure.data[1].y], 1), [[0, 0], [1, 0], [0.5, 0.75**0.5]])
    assert figure.data[0].marker.colorbar.title.text == "loss (nats)"


@pytest.mark.parametrize("picture", [0, 1, 99])
def test_an_archive_at_one_moment(picture):
    lives = {"M2N2": evolution(), "plain GA": evolution(alpha=0.0, matchmaker=False)}
    view = niche_view(lives, variant="plain GA", picture=picture)
    figure = niche_figure(view)
    cells, bars = figure.data[:2]
    assert cells.z.shape == (5, 30)
    np.testing.assert_allclose(bars.x, view.snapshot.fitness)
    assert list(figure.layout.xaxis.ticktext) == ["0", "1", "2"]
    assert [key for key, title in axes(figure).items() if not title] == ["yaxis2"]  # shares the rows
    assert [trace.name for trace in figure.data if trace.showlegend] == ["M2N2", "plain GA"]
    title = figure.layout.title.text
    assert title.startswith("plain GA, ")
    assert ("only the experts" in title) == (picture == 0)
    if view.snapshot.birth is not None:
        mixture = figure.data[-1]
        assert list(mixture.x) == [0, view.snapshot.birth.split, view.snapshot.birth.split, 30]
        assert mixture.y[0] == pytest.approx(1 - mixture.y[-1])


def test_searches_side_by_side():
    figure = search_figure({"a": [0.1, 0.2], "b": [0.3]}, title="t")
    assert [list(line.x) for line in figure.data] == [[1, 2], [1]]
    assert len({line.line.dash for line in figure.data}) == 2
    assert (figure.layout.xaxis.title.text, figure.layout.yaxis.title.text) == ("evaluations", "best score so far")
