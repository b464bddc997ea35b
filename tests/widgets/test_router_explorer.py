"""RouterExplorer: limits from the trace, live re-routing, the line of Python."""

import json

import pytest
import torch
from torch import nn

from notebook_kit import models
from notebook_kit.figures.routing import routing_view
from notebook_kit.mixtures import MoE
from notebook_kit.routers import TopK, record_routing
from notebook_kit.routing import RoutingTrace
from notebook_kit.widgets import RouterExplorer
from notebook_kit.widgets.wire import encode


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


def test_two_checkpoints(traces):
    plain, labelled = traces
    explorer = RouterExplorer(plain, other=labelled, picture="drift")
    assert {"drift", "confusion"} <= set(control(explorer, "picture")["options"])
    assert not {"drift", "confusion"} & set(control(RouterExplorer(plain), "picture")["options"])
    assert "0.0% of tokens" in explorer.value.layout.title.text
    explorer.settings = {"picture": "confusion", "router": "hash"}
    assert explorer.code.startswith("routing_view(trace, other=other, picture='confusion', router='hash'")
    with pytest.raises(ValueError, match="equally many layers"):
        RouterExplorer(plain, other=RoutingTrace(["a"], k=2))


def test_what_a_trace_cannot_show_is_not_offered():
    net = nn.Sequential(MoE([nn.Linear(6, 6) for _ in range(3)], TopK(6, 3)))
    with torch.no_grad(), record_routing(net) as trace:
        net(torch.randn(5, 6))
    explorer = RouterExplorer(trace)
    assert "flow" not in control(explorer, "picture")["options"]
    assert "hash" not in control(explorer, "router")["options"]
    with pytest.raises(ValueError, match="'hash' needs token ids"):
        routing_view(trace, router="hash")


def test_a_sankey_crosses_the_wire(traces):
    frame = encode(routing_view(traces[0], picture="flow"))
    (sankey,) = frame["data"]
    for part in (sankey["link"]["source"], sankey["link"]["value"], sankey["node"]["y"]):
        assert "$array" in part
    assert json.loads(json.dumps(sankey)) == sankey
    assert RouterExplorer(traces[0], picture="flow")._repr_mimebundle_()[0]["image/png"]
