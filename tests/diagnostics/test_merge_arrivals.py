"""Tables of arrivals, backward transfer, orders, and the picture of a projection."""

import numpy as np
import pandas as pd
import pytest
import torch

from notebook_kit.diagnostics.merge_arrivals import (
    arrival_table,
    arrival_view,
    arrivals,
    backward_transfer,
    order_study,
    projection_view,
    seen_mean,
)
from notebook_kit.merging import average, opcm
from notebook_kit.zoo import Score

NAMES = ["a", "b", "c"]


@pytest.fixture
def bed():
    g = torch.Generator().manual_seed(0)
    base = {"w": torch.zeros(5, 6)}
    experts = [{"w": torch.randn(5, 6, generator=g)} for _ in NAMES]

    def score(weights):
        return Score({n: -float((weights["w"] - e["w"]).norm()) for n, e in zip(NAMES, experts, strict=True)})

    return base, experts, NAMES, score


def test_backward_transfer_by_hand():
    table = pd.DataFrame([[0.9, 0.8, 0.5], [0.1, 0.7, 0.6], [0.2, 0.3, 0.8]], index=NAMES, columns=[1, 2, 3])
    assert backward_transfer(table) == pytest.approx((-0.4 - 0.1) / 2)
    np.testing.assert_allclose(seen_mean(table), [0.9, 0.75, 1.9 / 3])
    assert backward_transfer(table.iloc[:1, :1]) == 0


def test_the_last_column_is_the_merge_of_all(bed):
    base, experts, _, score = bed
    for how, merged in (("opcm", opcm(base, experts)), ("average", average(base, experts))):
        table = arrival_table(*bed, how=how)
        assert table.shape == (3, 3)
        assert table.loc["a", 1] == pytest.approx(0, abs=1e-5)
        assert table.iloc[:, -1].to_dict() == pytest.approx(score(merged).tasks, abs=1e-5)
    *_, last = arrivals(base, experts, how="task_arithmetic", scale=0.1)
    torch.testing.assert_close(last["w"], 0.1 * sum(e["w"] for e in experts))


def test_orders(bed):
    study = order_study(*bed, {"average": {"how": "average"}, "OPCM": {"alpha": 0.3}}, orders=4)
    assert study.shape == (8, 4)
    spread = study.groupby("variant")["mean"].std()
    assert spread["average"] < 1e-6 < spread["OPCM"]


def test_a_view_holds_every_step(bed):
    view = arrival_view(*bed)
    pd.testing.assert_frame_equal(view.table, arrival_table(*bed))
    assert view.lambdas[0] == pytest.approx(1)
    shuffled = arrival_view(*bed, order=3)
    assert sorted(shuffled.table.index) == NAMES
    assert arrival_view(*bed, rescale=False).lambdas.tolist() == [1, 1, 1]


def test_a_projection_in_the_directions_of_the_merge():
    base = {"w": torch.zeros(2, 2)}
    m, d = torch.diag(torch.tensor([2.0, 1.0])), torch.tensor([[3.0, 1.0], [2.0, 4.0]])
    view = projection_view(base, [{"w": m}, {"w": d}], alpha=0.0)
    np.testing.assert_allclose(view.magnitudes, [[3, 1], [2, 4]], atol=1e-6)
    assert (view.rank, view.block) == (0, "corner")
    assert view.removed == pytest.approx(25 / 30)
    assert projection_view(base, [{"w": m}, {"w": d}], alpha=0.7).rank == 1
    with pytest.raises(ValueError, match="arrival must be at most the number of experts, 2, got 3"):
        projection_view(base, [{"w": m}, {"w": d}], arrival=3)
