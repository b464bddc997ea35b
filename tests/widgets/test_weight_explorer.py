"""WeightExplorer: every setting draws, the line of Python is true, bad input is refused."""

import numpy as np
import pytest
import torch

from notebook_kit.diagnostics.weights import METRICS
from notebook_kit.figures.weights import WHOLE, weight_view
from notebook_kit.weights import IncompatibleWeights
from notebook_kit.widgets import WeightExplorer


@pytest.fixture
def weights():
    g = torch.Generator().manual_seed(0)
    base = {"a.weight": torch.randn(8, 6, generator=g), "a.bias": torch.randn(8, generator=g)}
    return base, [{k: t + 0.1 * torch.randn(t.shape, generator=g) for k, t in base.items()} for _ in range(3)]


def test_every_setting_draws(weights):
    widget = WeightExplorer(*weights, ["x", "y", "<b>z</b>"])
    controls = {control["name"]: control for control in widget.controls}
    assert controls["tensor"]["options"] == [WHOLE, "a.weight"]
    assert controls["rank"]["high"] == 6
    for metric in METRICS:
        for tensor in (WHOLE, "a.weight"):
            widget.settings = {"metric": metric, "tensor": tensor, "rank": 2}
            assert not widget.error
    widget.pin()
    assert len(widget.pins) == 1


def test_the_line_of_python_gives_the_same_picture(weights):
    base, experts = weights
    names = ["x", "y", "z"]
    widget = WeightExplorer(base, experts, names)
    widget.settings = {"metric": "sign agreement", "density": 0.3, "tensor": "a.weight"}
    scope = {"weight_view": weight_view, "base": base, "experts": experts, "names": names}
    figure = eval(widget.code, scope)
    np.testing.assert_array_equal(figure.data[0].z, widget.value.data[0].z)


def test_bad_input(weights):
    base, experts = weights
    with pytest.raises(IncompatibleWeights):
        WeightExplorer(base, [{"a.weight": torch.zeros(2, 2)}])
    widget = WeightExplorer(base, experts)
    with pytest.raises(ValueError, match="metric must be one of"):
        widget.settings = {"metric": "angle"}
    vectors_only = {"b": torch.zeros(3)}
    assert WeightExplorer(vectors_only, [{"b": torch.ones(3)}]).settings["tensor"] == WHOLE
