import numpy as np
import pytest
import torch

from notebook_kit.diagnostics.checkpoint_merges import (
    length_table,
    length_view,
    penalty_view,
    stock_table,
    stock_view,
    task_grams,
)

RUN = [{"w": torch.full((2, 2), float(value))} for value in range(4)]
LOSSES, STEPS = [0.9, 0.8, 0.5, 0.4], [10, 20, 30, 40]
EYE = torch.eye(4)


def measure(weights):
    return float(weights["w"].mean())


def right_angles():
    base = {"w": torch.zeros(4), "s": torch.tensor(1.0)}
    return base, [{"w": EYE[i], "s": torch.tensor(1.0)} for i in range(4)]


def test_weights_curve_and_references_of_a_run():
    view = penalty_view(RUN, LOSSES, STEPS, measure, penalty=1.0, n_last=3, points=3)
    assert view.weights.tolist() == pytest.approx([0, 0, 3 / 7, 4 / 7])
    assert view.penalties.tolist() == [0, 1, 2]
    assert view.curve.tolist() == pytest.approx([2, 2 * 3 / 7 + 3 * 4 / 7, 2 * 1 / 3 + 3 * 2 / 3])
    assert view.value == pytest.approx(view.curve[1])
    assert view.references == {"last checkpoint": 3.0, "uniform average": pytest.approx(2.0)}
    by_age = penalty_view(RUN, LOSSES, STEPS, measure, metric="steps", form="power", penalty=10.0, points=2)
    assert by_age.weights.tolist() == sorted(by_age.weights)
    assert by_age.penalties[-1] == 10


def test_the_table_of_shares():
    base, experts = right_angles()
    table = stock_table(base, experts)
    assert table.to_dict("records") == [{"tensor": "w", "cosine": 0.0, "t": 0.0}]  # a scalar has no angle to show
    torch.testing.assert_close(task_grams(base, experts)["w"], EYE.double())


def test_places_in_the_picture_are_true():
    base, experts = right_angles()
    view = stock_view({"one task": (base, experts)}, n_experts=2)
    # mean (1/2, 1/2, 0, 0) of length √½; each expert lies at 1 along it and 1 away, in units of that length
    np.testing.assert_allclose(view.experts, [[1, 1], [1, -1]], atol=1e-6)
    np.testing.assert_allclose(view.centre, [0, 1], atol=1e-6)
    assert (view.t, view.tensor, view.tensors) == (0.0, "w", ("w",))
    assert stock_view({"one task": (base, experts)}, n_experts=4, layer=7).centre is None
    still = stock_view({"one task": (base, [base, base])})  # nothing learnt
    assert np.isfinite(still.experts).all()


def test_lengths():
    base, experts = right_angles()
    table = length_table(base, experts)
    assert table["tensor"].tolist() == ["w"]
    assert table["average"].item() == pytest.approx(0.5)
    assert table["karcher"].item() == pytest.approx(1.0)
    assert table["cosine"].item() == 0
    view = length_view({"trained apart": (base, experts)}, t=0.5)
    assert view.lengths["straight line"][10] == pytest.approx(np.sqrt(0.5))
    for rule in ("SLERP", "Karcher"):
        np.testing.assert_allclose(view.lengths[rule], 1, rtol=1e-5)


def test_unknown_groups_and_too_many_experts():
    base, experts = right_angles()
    with pytest.raises(ValueError, match="group must be one of one task, got 'eight tasks'"):
        stock_view({"one task": (base, experts)}, group="eight tasks")
    with pytest.raises(ValueError, match="'one task' has 2 experts, n_experts is 3"):
        stock_view({"one task": (base, experts[:2])}, n_experts=3)
    with pytest.raises(ValueError, match="group must be one of one base, got 'trained apart'"):
        length_view({"one base": (base, experts)})
