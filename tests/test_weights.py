"""Weights are compared before they are combined, and the errors say what does not fit and where."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from notebook_kit.weights import (
    IncompatibleWeights,
    at_least_float32,
    check,
    expert_weights,
    flatten,
    float_keys,
    preflight,
    save,
    task_vector,
    unflatten,
)
from tests.untyped import untyped


@pytest.fixture
def base():
    return {"a.weight": torch.randn(3, 2), "a.bias": torch.randn(3), "steps": torch.tensor(5)}


def like(base, **changes):
    return {**{key: tensor.clone() for key, tensor in base.items()}, **changes}


def test_matching_weights_pass_quietly(base):
    assert check(base, [like(base), like(base, steps=torch.tensor(7))]) is None


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"a.bias": torch.zeros(4)}, r"'a.bias': shape \[3\] in base, \[4\] in experts\[1\]"),
        ({"a.bias": torch.zeros(3, 1)}, r"'a.bias': shape \[3\] in base, \[3, 1\] in experts\[1\]"),
        (
            {"a.bias": torch.zeros(3).half()},
            r"'a.bias': dtype torch.float32 in base, torch.float16 in experts\[1\]; cast",
        ),
        ({"extra": torch.zeros(1)}, r"'extra': in experts\[1\] but not in base"),
        ({"steps": torch.zeros(2, dtype=torch.int64)}, r"'steps': shape \[\] in base, \[2\] in experts\[1\]"),
    ],
)
def test_a_difference_names_tensor_models_and_both_sides(base, change, text):
    with pytest.raises(IncompatibleWeights, match=text):
        check(base, [like(base), like(base, **change)])
    with pytest.raises(IncompatibleWeights, match=text.replace(r"experts\[1\]", "spanish")):
        check(base, [like(base), like(base, **change)], names=["french", "spanish"])


def test_a_missing_tensor_is_named(base):
    expert = like(base)
    del expert["a.bias"]
    with pytest.raises(IncompatibleWeights, match=r"1 of 3 tensors .*preflight.*\n  'a.bias': in base but not in exp"):
        check(base, [expert])


def test_only_the_first_five_are_listed():
    base = {f"t{i}": torch.zeros(2) for i in range(9)}
    with pytest.raises(IncompatibleWeights) as caught:
        check(base, [{key: torch.zeros(3) for key in base}])
    text = str(caught.value)
    assert text.startswith("9 of 9 tensors cannot be merged")
    assert text.count("shape [2] in base") == 5
    assert text.endswith("and 4 more")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_nan_and_inf_are_named_with_tensor_and_model(bad, dtype):
    base = {"w": torch.zeros(2, 3, dtype=dtype), "b": torch.zeros(1, dtype=dtype)}
    expert = like(base)
    expert["w"][1, 2] = bad
    kind = "NaN" if bad != bad else "Inf"
    with pytest.raises(ValueError, match=rf"tensor 'w' of experts\[1\] holds {kind}"):
        check(base, [base, expert])
    with pytest.raises(ValueError, match=rf"tensor 'w' of base holds {kind}"):
        check(expert, [base])


def test_large_but_finite_entries_pass():
    big = {"w": torch.full((1000,), 6e4, dtype=torch.float16), "v": torch.full((9,), 3e38)}
    check(big, [big])


def test_infinities_that_cancel_are_found():
    with pytest.raises(ValueError, match="holds Inf"):
        check({"w": torch.zeros(2)}, [{"w": torch.tensor([float("inf"), -float("inf")])}])


def test_float8_is_checked_too():
    check({"w": torch.ones(3).to(torch.float8_e4m3fn)}, [{"w": torch.ones(3).to(torch.float8_e4m3fn)}])


def test_wrong_kinds_of_input(base):
    with pytest.raises(ValueError, match="at least one state dict"):
        check(base, [])
    with pytest.raises(ValueError, match="names must have one entry per expert, 1, got 2"):
        check(base, [base], names=["a", "b"])
    with untyped():
        with pytest.raises(TypeError, match=r"sequence of state dicts, got one mapping; write \[expert\]"):
            check(base, base)
        with pytest.raises(TypeError, match=r"'a.bias' of experts\[0\] must be a tensor, got list"):
            check(base, [like(base, **{"a.bias": [1.0, 2.0, 3.0]})])
        with pytest.raises(TypeError, match=r"experts\[0\] must map tensor names to tensors, got Linear"):
            check(base, [torch.nn.Linear(2, 3)])
        with pytest.raises(TypeError, match="base must map"):
            check(None, [base])
        with pytest.raises(TypeError, match="got one dict"):
            preflight(base, base)
        with pytest.raises(TypeError, match="got one str"):
            preflight(base, "model.safetensors")


def test_preflight_says_what_would_happen(base, tmp_path):
    other = like(base, **{"a.bias": torch.zeros(4), "new": torch.zeros(2)})
    del other["steps"]
    path = save(like(base), tmp_path / "expert.safetensors")
    frame = preflight(base, [path, other], names=["file", "other"])
    assert list(frame.columns) == ["tensor", "base", "file", "other", "dtype", "verdict"]
    rows = frame.set_index("tensor")
    assert rows.loc["a.weight"].tolist() == ["3 x 2", "3 x 2", "3 x 2", "float32", "merge"]
    assert rows.loc["a.bias", "verdict"] == "error: shape [3] in base, [4] in other"
    assert rows.loc["steps"].tolist() == ["scalar", "scalar", "missing", "int64", "error: in base but not in other"]
    assert rows.loc["new", "verdict"] == "error: in other but not in base"
    assert preflight(base, [base])["verdict"].tolist() == ["merge", "merge", "copy from base"]
    mixed = preflight({"w": torch.zeros(1)}, [{"w": torch.zeros(1).half()}])
    assert mixed["dtype"].tolist() == ["float32, float16"]
    assert mixed["verdict"].item().startswith("error: dtype")


def test_preflight_and_check_agree(base):
    for change in ({}, {"a.bias": torch.zeros(4)}, {"a.bias": torch.zeros(3).double()}, {"x": torch.zeros(1)}):
        verdicts = preflight(base, [like(base, **change)])["verdict"]
        refused = verdicts.str.startswith("error").any()
        if refused:
            with pytest.raises(IncompatibleWeights):
                check(base, [like(base, **change)])
        else:
            check(base, [like(base, **change)])


def test_a_task_vector_is_the_difference_in_float32():
    base = {"w": torch.tensor([1.0, 2.0]).bfloat16(), "d": torch.zeros(1).double(), "n": torch.tensor(1)}
    expert = {"w": torch.tensor([1.5, 1.0]).bfloat16(), "d": torch.ones(1).double(), "n": torch.tensor(2)}
    tau = task_vector(base, expert)
    assert list(tau) == ["w", "d"]
    assert tau["w"].dtype == torch.float32
    assert tau["d"].dtype == torch.float64
    assert tau["w"].tolist() == [0.5, -1.0]
    with pytest.raises(IncompatibleWeights):
        task_vector(base, {"w": expert["w"]})


DTYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.int64, torch.bool])
SHAPES = st.lists(st.integers(0, 3), max_size=3)


@given(st.lists(st.tuples(SHAPES, DTYPES), max_size=4))
@settings(deadline=None, max_examples=40)
def test_flatten_and_unflatten_are_inverse(parts):
    weights = {f"t{i}": (torch.randn(shape) * 3).to(dtype) for i, (shape, dtype) in enumerate(parts)}
    vector = flatten(weights)
    assert vector.ndim == 1
    assert vector.numel() == sum(weights[key].numel() for key in float_keys(weights))
    back = unflatten(vector, weights)
    assert list(back) == list(weights)
    for key, tensor in weights.items():
        assert back[key].dtype == tensor.dtype
        assert torch.equal(back[key], tensor)


def test_unflatten_counts():
    with pytest.raises(ValueError, match="vector must have 6 entries, got 5"):
        unflatten(torch.zeros(5), {"w": torch.zeros(2, 3), "n": torch.zeros(4, dtype=torch.int32)})


def test_at_least_float32():
    for dtype, wide in [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float64),
    ]:
        assert at_least_float32(torch.zeros(1, dtype=dtype)).dtype == wide
    same = torch.zeros(1)
    assert at_least_float32(same) is same


def test_expert_weights():
    assert expert_weights(None, 3) == [1.0, 1.0, 1.0]
    assert expert_weights(None, 2, 0.5) == [0.5, 0.5]
    assert expert_weights((1, -2), 2) == [1.0, -2.0]
    with pytest.raises(ValueError, match="one entry per expert, 3, got 2"):
        expert_weights([1.0, 2.0], 3)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="weights must be finite"):
            expert_weights([bad], 1)
