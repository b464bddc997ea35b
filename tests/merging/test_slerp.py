"""SLERP: the arc between two models, its ends, its norms, and the places where there is no arc."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from notebook_kit.merging import IncompatibleWeights, slerp
from notebook_kit.merging.slerp import model_cosine


def arc(a, b, **settings):
    a, b = torch.tensor(a), torch.tensor(b)
    return slerp({"w": torch.zeros_like(a)}, [{"w": a}, {"w": b}], **settings)["w"]


def test_the_hand_worked_example():
    torch.testing.assert_close(arc([1.0, 0.0], [0.0, 2.0]), torch.tensor([0.7071, 1.4142]), rtol=0, atol=1e-4)
    angle = math.pi / 8
    expected = torch.tensor([math.cos(angle), 2 * math.sin(angle)])
    torch.testing.assert_close(arc([1.0, 0.0], [0.0, 2.0], t=0.25), expected)


def test_where_there_is_no_arc_the_line_is_taken():
    assert arc([1.0, 2.0], [-1.0, -2.0]).tolist() == [0, 0]
    assert arc([1.0, 2.0], [-2.0, -4.0], t=0.25).tolist() == [0.25, 0.5]
    assert arc([1.0, 2.0], [1.0, 2.0], t=0.3).tolist() == pytest.approx([1, 2])
    assert arc([0.0, 0.0], [2.0, 4.0], t=0.5).tolist() == [1, 2]
    assert arc([0.0], [0.0]).tolist() == [0]
    near = arc([1.0, 0.0], [1.0, 1e-4], t=0.5)
    torch.testing.assert_close(near, torch.tensor([1.0, 5e-5]))


@given(st.floats(0, 1), st.integers(0, 10**6), st.sampled_from(["tensor", "model"]))
@settings(deadline=None, max_examples=40)
def test_ends_norms_and_the_way_back(t, seed, scope):
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 40, generator=g)
    b *= a.norm() / b.norm()
    base = {"w": torch.zeros(40)}
    there = slerp(base, [{"w": a}, {"w": b}], t=t, scope=scope)["w"]
    back = slerp(base, [{"w": b}, {"w": a}], t=1 - t, scope=scope)["w"]
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(there, back, **close)
    torch.testing.assert_close(there.norm(), a.norm(), **close)
    for end, expected in ((0, a), (1, b)):
        torch.testing.assert_close(slerp(base, [{"w": a}, {"w": b}], t=end, scope=scope)["w"], expected, **close)
    # the angle walked is t times the whole
    whole = torch.arccos((a @ b) / (a.norm() * b.norm()))
    walked = torch.arccos(((a @ there) / (a.norm() * there.norm())).clamp(-1, 1))
    torch.testing.assert_close(walked, t * whole, rtol=1e-3, atol=2e-3)


def test_one_angle_for_the_model_or_one_for_each_tensor():
    base = {"x": torch.zeros(2), "y": torch.zeros(2), "n": torch.tensor(3)}
    a = {"x": torch.tensor([1.0, 0.0]), "y": torch.tensor([1.0, 0.0]), "n": torch.tensor(1)}
    b = {"x": torch.tensor([0.0, 1.0]), "y": torch.tensor([1.0, 0.0]), "n": torch.tensor(2)}
    by_tensor = slerp(base, [a, b])
    by_model = slerp(base, [a, b], scope="model")
    half = math.sqrt(0.5)
    torch.testing.assert_close(by_tensor["x"], torch.tensor([half, half]))
    torch.testing.assert_close(by_tensor["y"], torch.tensor([1.0, 0.0]))
    # cos Ω = 1/2, so both factors are sin 30° / sin 60°
    factor = math.sin(math.pi / 6) / math.sin(math.pi / 3)
    torch.testing.assert_close(by_model["x"], torch.tensor([factor, factor]))
    torch.testing.assert_close(by_model["y"], torch.tensor([2 * factor, 0.0]))
    assert model_cosine(base, [a, b], scope="model") == {"cos_omega": pytest.approx(0.5)}
    assert model_cosine(base, [a, b], scope="tensor") == {}
    given_angle = slerp({"x": base["x"]}, [{"x": a["x"]}, {"x": b["x"]}], scope="model", cos_omega=0.5)
    torch.testing.assert_close(given_angle["x"], by_model["x"])


@pytest.mark.parametrize("count", [0, 1, 3])
def test_two_experts_and_no_other_number(count):
    with pytest.raises(ValueError, match=f"slerp needs exactly two experts, got {count}"):
        slerp({"w": torch.zeros(1)}, [{"w": torch.ones(1)}] * count)


def test_incompatible_models_are_named_before_the_angle_is_sought():
    with pytest.raises(IncompatibleWeights, match=r"'w': shape \[2\] in base, \[3\] in experts\[1\]"):
        slerp({"w": torch.zeros(2)}, [{"w": torch.ones(2)}, {"w": torch.ones(3)}], scope="model")
    with pytest.raises(IncompatibleWeights, match="in base but not in"):
        slerp({"w": torch.zeros(2)}, [{"w": torch.ones(2)}, {}], scope="model")
