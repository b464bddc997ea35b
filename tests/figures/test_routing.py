"""Every picture with every router, and text from data that stays text."""

import numpy as np
import pytest
import torch

from notebook_kit import models
from notebook_kit.figures.routing import ROUTERS, label_of_token, routing_view, token_figure
from notebook_kit.hyperparameters import hyperparameters
from notebook_kit.routers import TopK, record_routing
from notebook_kit.routing import RoutingTrace

OPTIONS = hyperparameters(routing_view)


@pytest.fixture(scope="module")
def trace():
    model = models.tiny_mixtral()
    with torch.no_grad(), record_routing(model) as trace:
        for label in ("eng", "<b>bold</b>"):
            with trace.labelled(label):
                model(torch.arange(120).reshape(4, 30))
    return trace


@pytest.mark.parametrize("picture", OPTIONS["picture"].options)
@pytest.mark.parametrize("router", OPTIONS["router"].options)
def test_every_picture(trace, picture, router):
    figure = routing_view(trace, picture=picture, router=router, layer=1, capacity_factor=1.0, temperature=0.5)
    assert figure.layout.xaxis.title.text
    assert figure.layout.yaxis.title.text
    assert figure.data
    assert "<b>" not in figure.to_json()


def test_the_window_and_the_marks(trace):
    figure = routing_view(trace, start=200)
    z = np.asarray(figure.data[0].z)
    assert z.shape == (8, 40)
    assert "tokens 200 to 239 of 240" in figure.layout.title.text
    served = set(zip(figure.data[1].x.tolist(), figure.data[1].y.tolist(), strict=True))
    expected = {(t, e) for t, row in enumerate(trace.layer(0).experts[200:240].tolist()) for e in row}
    assert served == expected
    assert len(routing_view(trace, start=10**6).layout.xaxis.ticktext) == 1


def test_dropped_claims_are_crossed_out(trace):
    figure = routing_view(trace, router="switch", capacity_factor=0.25, start=180)
    assert len(figure.data[2].x) > 0
    assert "claims dropped" in figure.layout.title.text


def test_temperature_and_k_change_the_picture(trace):
    sure = routing_view(trace, router="top-k", temperature=0.1).data[0].z
    even = routing_view(trace, router="top-k", temperature=10.0).data[0].z
    assert sure.max() > even.max()
    assert len(routing_view(trace, router="top-k", k=3).data[1].x) == 3 * 64


@pytest.mark.parametrize(
    ("text", "label"),
    [
        (" ", "␣"),
        ("\n", "⏎"),
        ("<b>", "&lt;b&gt;"),
        ("\x00", "\\x00"),
        ("a\tb", "a⇥b"),
        ("averylongword", "averylo…"),
        ("é", "é"),
        ("", ""),
    ],
)
def test_labels_of_tokens(text, label):
    assert label_of_token(text) == label


def test_a_long_trace_is_routed_again_and_drawn():
    generator = torch.Generator().manual_seed(0)
    trace = RoutingTrace(["layer"], k=2)
    routing = TopK(1, 8).eval().route(torch.randn(20_000, 8, generator=generator))
    tokens = torch.randint(0, 128, (20_000,), generator=generator)
    ramp = torch.arange(20_000)
    labels = [("eng", "deu")[i // 100 % 2] for i in range(20_000)]
    parts = [(routing.logits, routing.weights, routing.experts)]
    trace.append(parts, tokens=tokens, positions=ramp % 100, sequences=ramp // 100, labels=labels)
    for picture in ("tokens", "labels", "load"):
        for k in (1, 2, 3):
            assert routing_view(trace, picture=picture, router="top-k", k=k, capacity_factor=1.25).data


def test_bad_input(trace):
    with pytest.raises(ValueError, match=r"layer must be in \[0, 1\], got 7"):
        routing_view(trace, layer=7)
    with pytest.raises(ValueError, match="k must be at most n_experts=8, got 9"):
        routing_view(trace, router="top-k", k=9)
    with pytest.raises(ValueError, match="the trace is empty"):
        routing_view(RoutingTrace(["a"], k=2))
    assert set(ROUTERS) < set(OPTIONS["router"].options)


def test_all_tokens_up_to_512():
    routing = TopK(1, 4).eval().route(torch.randn(600, 4))
    assert np.asarray(token_figure(routing, ["x"] * 600).data[0].z).shape == (4, 512)
