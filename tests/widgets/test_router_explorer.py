"""RouterExplorer: limits from the trace, live re-routing, the line of Python."""

import pytest
import torch

from notebook_kit import models
from notebook_kit.figures.routing import routing_view
from notebook_kit.routers import record_routing
from notebook_kit.routing import RoutingTrace
from notebook_kit.widgets import RouterExplorer


@pytest.fixture(scope="module")
def traces():
    model = models.tiny_mixtral()
    ids = torch.arange(200).reshape(5, 40)
    with torch.no_grad(), record_routing(model) as plain:
        model(ids)
    with torch.no_grad(), record_routing(model) as labelled, labelled.labelled(list("abcde")):
        model(ids)
    return plain, labelled


def control(explorer, name):
    return next(control for control in explorer.controls if control["name"] == name)


def test_limits_come_from_the_trace(traces):
    plain, labelled = traces
    explorer = RouterExplorer(labelled)
    assert control(explorer, "layer")["high"] == 1
    assert control(explorer, "k")["high"] == 8
    assert control(explorer, "start")["high"] == 200 - 64
    assert "labels" in control(explorer, "picture")["options"]
    assert "labels" not in control(RouterExplorer(plain), "picture")["options"]
    with pytest.raises(ValueError, match="picture must be one of"):
        RouterExplorer(plain, picture="labels")


def test_moving_it_redraws_and_tells_the_line(traces):
    trace = traces[1]
    explorer = RouterExplorer(trace, picture="load")
    before = explorer.value.layout.title.text
    explorer.settings = {"router": "top-k", "k": 3, "capacity_factor": 1.0}
    assert explorer.value.layout.title.text != before
    assert explorer.code == "routing_view(trace, picture='load', router='top-k', k=3, capacity_factor=1.0)"
    assert eval(explorer.code, {"routing_view": routing_view, "trace": trace}).to_json() == explorer.value.to_json()
    explorer.settings = {"picture": "layers"}
    assert "all layers" in explorer.value.layout.title.text


def test_a_bad_setting_changes_nothing(traces):
    explorer = RouterExplorer(traces[1])
    with pytest.raises(ValueError, match=r"k must be in \[1, 8\], got 9"):
        explorer.settings = {"k": 9}
    assert explorer.settings["k"] == 2


def test_an_empty_trace():
    with pytest.raises(ValueError, match="the trace is empty"):
        RouterExplorer(RoutingTrace(["a"], k=2))
