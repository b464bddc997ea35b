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


@given(st.floats(0, 1), st.integers(0, 10**6), st.sampled_from(["tensor", "row", "model"]))
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


def test_rows_have_their_own_angles():
    a, b = torch.tensor([[1.0, 0.0], [1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 2.0], [2.0, 4.0], [2.0, 0.0]])
    ours = slerp({"w": torch.zeros(3, 2)}, [{"w": a}, {"w": b}], scope="row")["w"]
    expected = torch.tensor([[0.7071, 1.4142], [1.5, 3.0], [1.0, 0.0]])  # an arc, and two lines
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
    kernels = [{"w": torch.randn(3, 2, 2, 2)} for _ in range(3)]
    whole = slerp(kernels[0], kernels[1:], t=0.3, scope="row")["w"]
    for i in range(3):  # a row of a kernel is an output unit
        row = slerp({"w": kernels[0]["w"][i]}, [{"w": k["w"][i]} for k in kernels[1:]], t=0.3)["w"]
        torch.testing.assert_close(whole[i], row)


@pytest.mark.parametrize("scope", ["tensor", "row", "model"])
def test_between_task_vectors_the_base_is_the_centre(scope):
    base, *experts = ({"w": torch.randn(4, 5), "b": torch.randn(4)} for _ in range(3))
    ours = slerp(base, experts, t=0.3, scope=scope, space="task_vectors")
    zero = {name: torch.zeros_like(tensor) for name, tensor in base.items()}
    taus = [{name: expert[name] - base[name] for name in base} for expert in experts]
    for name, change in slerp(zero, taus, t=0.3, scope=scope).items():
        torch.testing.assert_close(ours[name], base[name] + change, rtol=1e-4, atol=1e-5)
    for end, expert in ((0, experts[0]), (1, experts[1])):
        reached = slerp(base, experts, t=end, scope=scope, space="task_vectors")
        torch.testing.assert_close(reached["w"], expert["w"], rtol=1e-4, atol=1e-5)
    lone = slerp(base, [base, experts[1]], t=0.25, scope=scope, space="task_vectors")["w"]  # no angle: the line
    torch.testing.assert_close(lone, base["w"] + 0.25 * taus[1]["w"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_two_experts_and_no_other_number(count):
    with pytest.raises(ValueError, match=f"slerp needs exactly two experts, got {count}"):
        slerp({"w": torch.zeros(1)}, [{"w": torch.ones(1)}] * count)


def test_incompatible_models_are_named_before_the_angle_is_sought():
    with pytest.raises(IncompatibleWeights, match=r"'w': shape \[2\] in base, \[3\] in experts\[1\]"):
        slerp({"w": torch.zeros(2)}, [{"w": torch.ones(2)}, {"w": torch.ones(3)}], scope="model")
    with pytest.raises(IncompatibleWeights, match="in base but not in"):
        slerp({"w": torch.zeros(2)}, [{"w": torch.ones(2)}, {}], scope="model")
