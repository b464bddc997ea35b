"""Metrics-weighted averaging: weights worked by hand, and what no choice of metric or form may break."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from notebook_kit.merging import IncompatibleWeights, average, checkpoint_weights, metrics_weighted, select_checkpoints
from tests.untyped import untyped

LOSSES, STEPS = (0.8, 0.5, 0.4), (10, 20, 30)
losses = st.lists(st.floats(0.01, 100), min_size=1, max_size=12)
forms = st.sampled_from(["linear", "power", "softmax"])


@pytest.mark.parametrize(
    ("metrics", "metric", "form", "penalty", "expected"),
    [
        (LOSSES, "loss", "power", 1, (0.21739, 0.34783, 0.43478)),
        (LOSSES, "loss", "power", 2, (0.13228, 0.33862, 0.52910)),
        (LOSSES, "loss", "linear", 0.5, (0.21053, 0.36842, 0.42105)),
        (LOSSES, "loss", "linear", 1, (0, 0.42857, 0.57143)),
        (LOSSES, "loss", "linear", 4, (0, 0, 1)),
        (LOSSES, "loss", "softmax", 1, (0.19692, 0.41686, 0.53530)),
        (STEPS, "steps", "power", 1, (1 / 6, 1 / 3, 1 / 2)),
        (STEPS, "steps", "power", 2, (1 / 14, 4 / 14, 9 / 14)),
        (STEPS, "steps", "linear", 1, (0, 1 / 3, 2 / 3)),
    ],
)
def test_weights_worked_by_hand(metrics, metric, form, penalty, expected):
    if form == "softmax":
        u = [math.exp(-z) for z in (1, 0.25, 0)]
        expected = [value / sum(u) for value in u]
    found = checkpoint_weights(metrics, metric=metric, form=form, penalty=penalty)
    assert found == pytest.approx(expected, abs=1e-5)


@given(losses, forms, st.floats(0, 10), st.sampled_from(["loss", "steps"]))
@settings(deadline=None, max_examples=60)
def test_weights_are_weights_and_the_better_has_no_less(metrics, form, penalty, metric):
    w = checkpoint_weights(metrics, metric=metric, form=form, penalty=penalty)
    assert min(w) >= 0
    assert sum(w) == pytest.approx(1)
    order = sorted(range(len(w)), key=lambda c: metrics[c] if metric == "loss" else -metrics[c])
    assert all(w[a] >= w[b] - 1e-12 for a, b in pairwise(order))
    backwards = checkpoint_weights(metrics[::-1], metric=metric, form=form, penalty=penalty)
    assert backwards[::-1] == pytest.approx(w)
    assert checkpoint_weights(metrics, metric=metric, form=form, penalty=0) == pytest.approx([1 / len(w)] * len(w))


@given(losses, st.floats(0, 10), st.floats(0.1, 10), st.floats(0, 5))
@settings(deadline=None, max_examples=40)
def test_what_each_form_does_not_see(metrics, penalty, unit, offset):
    power = checkpoint_weights(metrics, form="power", penalty=penalty)
    assert checkpoint_weights([unit * m for m in metrics], form="power", penalty=penalty) == pytest.approx(power)
    spread = max(metrics) - min(metrics)
    if spread == 0 or spread > 0.01:  # else rounding decides
        for form in ("linear", "softmax"):
            plain = checkpoint_weights(metrics, form=form, penalty=penalty)
            moved = checkpoint_weights([unit * m + offset for m in metrics], form=form, penalty=penalty)
            assert moved == pytest.approx(plain, abs=1e-6)


def test_equal_losses_and_one_checkpoint():
    for form in ("linear", "power", "softmax"):
        for metric in ("loss", "steps"):
            assert checkpoint_weights([0.5] * 4, metric=metric, form=form, penalty=9) == pytest.approx([0.25] * 4)
            assert checkpoint_weights([3.0], metric=metric, form=form, penalty=9) == [1]
    assert checkpoint_weights([1e-30, 1.0], form="power", penalty=10) == pytest.approx([1, 0])


def test_selection_counts_back_from_the_last():
    assert select_checkpoints(30, n_last=10) == list(range(20, 30))
    assert select_checkpoints(30, n_last=4, stride=3) == [20, 23, 26, 29]
    assert select_checkpoints(3, n_last=10) == [0, 1, 2]
    assert select_checkpoints(3, n_last=10, stride=2) == [0, 2]
    assert select_checkpoints(1, n_last=1, stride=20) == [0]


def checkpoints(values):
    return [{"w": torch.full((2, 3), value), "n": torch.tensor(i)} for i, value in enumerate(values)]


def test_the_merge_is_the_weighted_average_of_those_selected():
    cks = checkpoints([100.0, 1.0, 2.0, 4.0])
    base = {"w": torch.zeros(2, 3), "n": torch.tensor(9)}
    merged = metrics_weighted(base, cks, metrics=[0.0, *LOSSES], form="linear", penalty=1.0, n_last=3)
    torch.testing.assert_close(merged["w"], torch.full((2, 3), 3 / 7 * 2.0 + 4 / 7 * 4.0))
    assert merged["n"] == 9
    strided = metrics_weighted(base, cks, metrics=[1, 2, 3, 4], metric="steps", form="power", penalty=1.0, stride=2)
    torch.testing.assert_close(strided["w"], torch.full((2, 3), 1 / 3 * 1.0 + 2 / 3 * 4.0))
    same = metrics_weighted(base, cks[1:2] * 5, metrics=[0.1, 0.2, 0.3, 0.4, 0.5], penalty=0.9)
    torch.testing.assert_close(same["w"], cks[1]["w"])
    uniform = metrics_weighted(base, cks, metrics=[1, 2, 3, 4], penalty=0.0)
    torch.testing.assert_close(uniform["w"], average(base, cks)["w"], rtol=0, atol=1e-5)


def test_bad_input_is_named():
    base, cks = {"w": torch.zeros(2, 3), "n": torch.tensor(0)}, checkpoints([1.0, 2.0])
    with pytest.raises(ValueError, match="metrics must have one entry per checkpoint, 2, got 3"):
        metrics_weighted(base, cks, metrics=[1, 2, 3])
    with pytest.raises(ValueError, match=r"metrics must hold a finite loss for each checkpoint, got .*nan"):
        metrics_weighted(base, cks, metrics=[1, float("nan")])
    with pytest.raises(ValueError, match="power form needs losses above 0, got 0: use form='linear'"):
        metrics_weighted(base, cks, metrics=[1, 0], form="power")
    with pytest.raises(ValueError, match="form must be one of 'linear', 'power', 'softmax', got 'cubic'"):
        checkpoint_weights([1.0], form="cubic")
    with pytest.raises(ValueError, match=r"penalty must be in \[0, 10\], got -1"):
        checkpoint_weights([1.0], penalty=-1.0)
    with pytest.raises(ValueError, match=r"stride must be in \[1, 20\], got 0 \(select_checkpoints\)"):
        select_checkpoints(5, stride=0)
    with pytest.raises(ValueError, match=r"n_last must be in \[1, 100\], got -1"):
        select_checkpoints(5, n_last=-1)
    with pytest.raises(IncompatibleWeights, match="in base but not in"):
        metrics_weighted(base, [{"n": torch.tensor(0)}], metrics=[1])
    with pytest.raises(ValueError, match="no LoRA factors to multiply among w, n"):
        metrics_weighted(base, cks, metrics=[1, 2], space="product")
    with untyped(), pytest.raises(TypeError, match="one mapping"):
        metrics_weighted(base, base, metrics=[1])
