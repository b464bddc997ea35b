"""A signature is read once, and every value is held against it with one error text."""

from typing import Annotated

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from notebook_kit.hyperparameters import Choice, Range, hyperparameters, validate
from notebook_kit.merging import ties


def example(
    base,
    experts,
    *,
    density: Annotated[float, Range(0, 1)] = 0.2,
    k: Annotated[int, Range(1, 512, log=True)] = 2,
    rank: Annotated[int | None, Range(1, 64)] = None,
    gain: Annotated[float | None, Range(0, 2, step=0.5)] = None,
    how: Annotated[str, Choice("mean", "sum")] = "mean",
    level: Annotated[int, Choice(1, 2)] = 1,
    normalize: bool = True,
    weights: list | None = None,
    untouched: float = 3.0,
):
    """Do nothing.

    Args:
        base: where it starts.
        density: share kept,
            of the whole model
            and not of a tensor.
        k (int): how many.
        how: mean or sum: as you like.

        normalize: after a blank line.

    Returns:
        density: this is not an argument's help.
    """


class Layer:
    """A layer.

    Args:
        width: of the layer.
        **rest: ignored.
    """

    def __init__(self, host, *, width: Annotated[int, Range(1, 8)] = 4, **rest):
        self.width = width


class Callable:
    def __call__(self, x, *, t: Annotated[float, Range(0, 1)] = 0.5):
        """Args:
        t: where.
        """


def test_the_signature_is_read_in_order():
    schema = hyperparameters(example)
    assert list(schema) == ["density", "k", "rank", "gain", "how", "level", "normalize"]
    assert schema.owner == "example"
    kinds = {name: row.kind for name, row in schema.items()}
    assert kinds == {
        "density": "float",
        "k": "int",
        "rank": "int",
        "gain": "float",
        "how": "choice",
        "level": "choice",
        "normalize": "bool",
    }
    density = schema["density"]
    assert (density.low, density.high, density.default, density.step) == (0, 1, 0.2, None)
    assert (schema["k"].step, schema["k"].log, schema["gain"].step) == (1, True, 0.5)
    assert schema["how"].options == ("mean", "sum")
    assert schema["rank"].default is None


def test_help_comes_from_the_args_block_with_its_continuation_lines():
    schema = hyperparameters(example)
    assert schema["density"].help == "share kept, of the whole model and not of a tensor."
    assert schema["k"].help == "how many."
    assert schema["how"].help == "mean or sum: as you like."
    assert schema["normalize"].help == "after a blank line."
    assert schema["rank"].help == ""


def test_classes_and_callable_objects_are_read_too():
    assert hyperparameters(Layer)["width"].help == "of the layer."
    assert hyperparameters(Layer).owner == "Layer"
    assert hyperparameters(Callable()).owner == "Callable"
    assert hyperparameters(Callable())["t"].default == 0.5


def test_the_error_text_is_exact():
    with pytest.raises(ValueError) as caught:
        validate(hyperparameters(ties), {"density": 1.4})
    assert str(caught.value) == "density must be in [0, 1], got 1.4 (ties)"
    with pytest.raises(ValueError) as caught:
        ties({}, [], density=1.4)
    assert str(caught.value) == "density must be in [0, 1], got 1.4 (ties)"


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("density", float("nan"), r"density must be in \[0, 1\], got nan \(example\)"),
        ("density", -1e-9, "density must be in"),
        ("density", float("inf"), "density must be in"),
        ("density", True, r"density must be a number in \[0, 1\], got True"),
        ("density", "0.5", "density must be a number"),
        ("density", None, "density must be a number"),
        ("k", 2.0, r"k must be an integer in \[1, 512\], got 2.0"),
        ("k", 0, r"k must be in \[1, 512\], got 0"),
        ("k", True, "k must be an integer"),
        ("k", None, "k must be an integer"),
        ("normalize", 1, "normalize must be True or False, got 1"),
        ("how", "max", r"how must be one of 'mean', 'sum', got 'max' \(example\)"),
        ("level", True, r"level must be one of 1, 2, got True"),
        ("level", 1.0, "level must be one of"),
        ("how", ["mean"], "how must be one of"),
        ("densty", 0.5, "example has no hyperparameter 'densty', only .*did you mean 'density'"),
    ],
)
def test_bad_values(name, value, text):
    with pytest.raises(ValueError, match=text):
        validate(hyperparameters(example), {name: value})


def test_a_name_far_from_all_gets_no_hint():
    with pytest.raises(ValueError, match=r"has no hyperparameter 'zzzz', only (?!.*did you mean)"):
        validate(hyperparameters(example), {"zzzz": 1})


def test_good_values_of_every_origin():
    good = {"density": 1, "k": np.int64(3), "rank": None, "gain": np.float32(0.5), "how": "sum", "normalize": False}
    validate(hyperparameters(example), good)
    validate(hyperparameters(example), {})


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_a_float_is_admitted_exactly_inside_the_closed_interval(value):
    schema = hyperparameters(example)
    if 0 <= value <= 1:
        validate(schema, {"density": value})
    else:
        with pytest.raises(ValueError, match="density must be in"):
            validate(schema, {"density": value})


def test_impossible_ranges_are_refused():
    with pytest.raises(ValueError, match="low <= high, got 2 and 1"):
        Range(2, 1)
    with pytest.raises(ValueError, match="low > 0, got 0"):
        Range(0, 1, log=True)
    with pytest.raises(ValueError, match="at least one option"):
        Choice()
