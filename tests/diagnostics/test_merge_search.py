import numpy as np
import pytest
import torch

from notebook_kit.diagnostics.merge_search import (
    adamerging_view,
    frank_wolfe_view,
    label_heads,
    loss_triangle,
    niche_view,
    pool_growth,
    pool_merges,
    record_coefficients,
    record_evolution,
)
from notebook_kit.merging import NicheArchive, adamerging_path, average
from notebook_kit.zoo import digit_labels
from tests.merging.searching import Odd, Point, odd_data, odd_weights

CORNERS = [{"x": row} for row in torch.eye(3)]
CENTRE = torch.tensor([0.5, 0.5, 0.0])
BOWL = {
    "model": Point(),
    "batches": {"bowl": torch.zeros(1)},
    "task_loss": lambda x, batch, task: 0.5 * ((x - CENTRE) ** 2).sum(),
}


def nearness(weights):
    return -float(((weights["x"] - CENTRE) ** 2).sum())


def coefficients(steps=7):
    experts = [odd_weights(seed) for seed in (1, 2)]
    path = adamerging_path(odd_weights(0), experts, model=Odd(), batches=odd_data(), steps=steps, lr=0.05)

    def score(weights):
        return float(weights["weight"].sum())

    return record_coefficients(path, score, names=["one", "two"], every=3)


def evolution(evals=40, **how):
    base = {"w": torch.zeros(30)}
    halves = torch.full((2, 30), 0.01)
    halves[0, :15] = halves[1, 15:] = 1.0

    def score(weights):
        return (weights["w"] > 0.5).float()

    archive = NicheArchive(base, [{"w": row} for row in halves], score_points=score, pop_size=5, **how)
    labels = torch.arange(30) % 3
    return record_evolution(archive, evals, labels=labels, every=9, test=lambda weights: float(score(weights).mean()))


def test_heads_tile_the_logits_as_the_bed_reads_them():
    heads, bed = label_heads(), digit_labels()
    assert list(heads) == bed.names
    assert [heads[name].start for name in bed.names][1:] == [heads[name].stop for name in bed.names][:-1]
    x, y = bed.batches("val")["prime"]
    with torch.no_grad():
        right = (bed.model(x)[:, heads["prime"]].argmax(1) == y).float().mean()
    assert bed.score(bed.base, "val").tasks["prime"] == pytest.approx(float(right))


def test_a_path_is_scored_where_asked_and_at_its_end():
    record = coefficients()
    assert record.steps.tolist() == [0, 3, 6, 7]
    merged = record.path.merged(3)
    assert record.scores[1] == pytest.approx(float(merged["weight"].sum()))
    view = adamerging_view({"entropy": record}, step=5)
    assert (view.step, view.run) == (5, "entropy")
    assert adamerging_view({"entropy": record}, step=99).step == 7
    with pytest.raises(ValueError, match="no record is called 'cross_entropy', only entropy"):
        adamerging_view({"entropy": record}, run="cross_entropy")


def test_a_pool_that_grows():
    merges = {"average": average}
    frame = pool_growth(CORNERS[2], CORNERS, merges, nearness)
    assert frame["pool"].tolist() == [2, 3]
    assert frame["score"][0] == pytest.approx(0.0)
    assert frame["score"][1] == pytest.approx(-(1 / 36 + 1 / 36 + 1 / 9))
    three = pool_growth(CORNERS[2], CORNERS, pool_merges(**BOWL), nearness, sizes=(2,))
    assert three["method"].tolist() == ["average", "task arithmetic 0.3", "Frank-Wolfe"]
    view = frank_wolfe_view(
        CORNERS[2], CORNERS[:2], names=["a", "b"], measure=nearness, curve=frame, pool=9, steps=5, init="base", **BOWL
    )
    assert view.names == ("start", "a", "b")
    assert view.pool == 2
    assert view.score == pytest.approx(-0.02)


def test_a_triangle_of_losses():
    shares, losses = loss_triangle(CORNERS, lambda weights: -nearness(weights), divisions=4)
    assert shares.shape == (15, 3)
    np.testing.assert_allclose(shares.sum(1), 1)
    lowest = shares[losses.argmin()]
    assert lowest.tolist() == [0.5, 0.5, 0]
    assert losses.min() == pytest.approx(0)
    with pytest.raises(ValueError, match="a triangle has three corners, got 2"):
        loss_triangle(CORNERS[:2], nearness)


def test_the_life_of_an_archive():
    record = evolution(children=4)
    assert [s.evaluations for s in record.snapshots] == record.curves["evaluations"].tolist()
    assert record.curves["evaluations"].tolist() == [2, 11, 20, 29, 38, 40]
    assert record.snapshots[0].birth is None
    assert record.snapshots[0].scores.shape == (5, 30)
    assert record.labels.tolist() == sorted(record.labels.tolist())
    assert (record.curves["test"] >= 0.5).all()
    assert record.layers == {"w": 0}
    last = record.snapshots[-1]
    assert last.scores.mean(1).max() == pytest.approx(record.curves["best"].iloc[-1])
    assert niche_view({"M2N2": record}, picture=99).snapshot is last
    with pytest.raises(ValueError, match="no record is called 'plain GA', only M2N2"):
        niche_view({"M2N2": record}, variant="plain GA")
    archive = NicheArchive(CORNERS[0], CORNERS[:1], score_points=lambda weights: weights["x"])
    with pytest.raises(ValueError, match="labels must have one entry a point, 3, got 2"):
        record_evolution(archive, 5, labels=[0, 1])


def test_many_points_are_thinned_evenly():
    base = {"x": torch.zeros(3)}
    archive = NicheArchive(base, [base], score_points=lambda weights: torch.ones(2000), pop_size=2)
    record = record_evolution(archive, 2, labels=torch.arange(2000) % 10)
    assert len(record.points) == 480
    assert np.bincount(record.labels).tolist() == [48] * 10
