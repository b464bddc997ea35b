"""Numbers about curvature: fronts, who decides, what grafting keeps, and curvatures compared."""

import numpy as np
import pytest
import torch

from notebook_kit.diagnostics.curvature import (
    SPAN,
    curvature_cosine,
    decision_view,
    density_map,
    front_view,
    graft_curves,
    graft_view,
    log_pairs,
    weight_fronts,
)
from notebook_kit.merging import average, fast_fisher_graft, fisher, graft_masks, ota
from notebook_kit.zoo import Score

BASE = {"w": torch.zeros(2, 3), "b": torch.zeros(4)}
G = torch.Generator().manual_seed(0)
EXPERTS = [{k: torch.randn(t.shape, generator=G) for k, t in BASE.items()} for _ in range(2)]
MOMENTS = [{k: torch.rand(t.shape, generator=G) for k, t in BASE.items()} for _ in range(2)]
NAMES = ["first", "second"]


def score(weights):
    gaps = [sum(float((weights[k] - e[k]).square().sum()) for k in BASE) for e in EXPERTS]
    return Score({name: 1 / (1 + gap) for name, gap in zip(NAMES, gaps, strict=True)})


def test_fronts_start_and_end_at_the_experts():
    ways = {"average": (average, {}), "Fisher": (fisher, {"fishers": MOMENTS})}
    fronts = weight_fronts(BASE, EXPERTS, ways, score=score, tasks=NAMES, n_points=5)
    assert len(fronts) == 10
    for _, rows in fronts.groupby("merge"):
        assert rows["weight"].tolist() == [0, 0.25, 0.5, 0.75, 1]
        assert rows["b"].iloc[0] == rows["a"].iloc[-1] == pytest.approx(1)
        assert rows["mean"].tolist() == pytest.approx(((rows["a"] + rows["b"]) / 2).tolist())
    middle = fronts[(fronts["merge"] == "average") & (fronts["weight"] == 0.25)].iloc[0]
    assert middle["a"] == pytest.approx(score(average(BASE, EXPERTS, weights=[0.25, 0.75])).tasks["first"])
    view = front_view(fronts, weight=0.3)
    assert view.weight == 0.25
    assert view.here["merge"].tolist() == ["average", "Fisher"]


def test_who_decides():
    one = {"w": torch.tensor([[1.0, 1e-6, 0.0], [10.0, 0.0, 1.0]]), "b": torch.ones(2)}
    other = {"w": torch.tensor([[0.1, 1.0, 0.0], [10.0, 1.0, 0.0]]), "b": torch.ones(2)}
    view = decision_view([one, other], NAMES, tensor="w")
    expected = [[1, -SPAN, np.nan], [0, -SPAN, SPAN]]
    np.testing.assert_allclose(view.ratio, expected, atol=1e-6)
    assert view.share == pytest.approx(2 / 5)
    np.testing.assert_allclose(view.logs[0], [[0, -6, np.nan], [1, np.nan, 0]], atol=1e-6)
    louder = decision_view([one, other], NAMES, tensor="w", weight=0.9)
    assert louder.ratio[1, 0] == pytest.approx(np.log10(9))
    assert louder.share == pytest.approx(3 / 5)
    assert decision_view([one, other], NAMES).tensor == "w"
    assert decision_view([one, other], NAMES, tensor="b").ratio.shape == (1, 2)
    nobody = {"w": torch.zeros(2, 2)}
    assert np.isnan(decision_view([nobody, nobody], NAMES).share)
    with pytest.raises(ValueError, match="no tensor is called 'x'; there are w, b"):
        decision_view([one, other], NAMES, tensor="x")


def test_density_map_is_the_mean_of_the_masks():
    masks = graft_masks(BASE, EXPERTS, moments=MOMENTS, density=0.4)
    frame = density_map(masks, NAMES)
    assert list(frame.index) == ["w", "b"]
    assert list(frame) == NAMES
    assert (6 * frame.loc["w"] + 4 * frame.loc["b"]).tolist() == pytest.approx([4, 4])


def test_graft_curves_and_views_are_the_merges_themselves():
    curves = graft_curves(BASE, EXPERTS, MOMENTS, score=score, names=NAMES, densities=(0.3, 1.0))
    table = curves.pivot(index="density", columns="curve", values="score")
    assert table.loc[1.0, "graft: FFG"] == table.loc[1.0, "graft: magnitude"] == pytest.approx(1)
    own = [
        score(fast_fisher_graft(BASE, [e], moments=[v], density=0.3)).tasks[n]
        for n, e, v in zip(NAMES, EXPERTS, MOMENTS, strict=True)
    ]
    assert table.loc[0.3, "graft: FFG"] == pytest.approx(sum(own) / 2)
    assert table.loc[0.3, "merge: OTA + FFG"] == pytest.approx(score(ota(BASE, EXPERTS, moments=MOMENTS, density=0.3)))
    view = graft_view(BASE, EXPERTS, MOMENTS, score, NAMES, curves, density=0.3)
    assert view.scores == pytest.approx({"grafts": sum(own) / 2, "merge": table.loc[0.3, "merge: OTA + FFG"]})
    rank1 = graft_view(BASE, EXPERTS, MOMENTS, score, NAMES, curves, density=0.3, curvature="rank1", power=1.0)
    expected = score(ota(BASE, EXPERTS, moments=MOMENTS, density=0.3, curvature="rank1", power=1.0))
    assert rank1.scores["merge"] == pytest.approx(expected)


def test_curvatures_compared():
    cosine = curvature_cosine([MOMENTS[0], {k: 9 * v for k, v in MOMENTS[0].items()}, MOMENTS[1]])
    assert cosine.shape == (3, 3)
    np.testing.assert_allclose(cosine.diagonal(), 1, atol=1e-6)
    assert cosine[0, 1] == pytest.approx(1)
    a, b = (torch.cat([v.reshape(-1) for v in m.values()]).sqrt() for m in MOMENTS)
    assert cosine[0, 2] == pytest.approx(float(a @ b / (a.norm() * b.norm())), abs=1e-6)


def test_log_pairs():
    one = {"w": torch.tensor([[1.0, 10.0], [0.0, 100.0]]), "b": torch.tensor([1.0])}
    squared = {key: v**2 for key, v in one.items()}
    frame, correlation = log_pairs(one, squared)
    assert correlation == pytest.approx(1)
    assert len(frame) == 4  # the zero has no logarithm
    np.testing.assert_allclose(frame["other"], 2 * frame["one"], atol=1e-6)
    assert sorted(frame["tensor"]) == ["b", "w", "w", "w"]
    assert len(log_pairs(one, squared, n_points=2)[0]) == 2
