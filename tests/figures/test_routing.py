"""Every picture with every router, and text from data that stays text."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from notebook_kit import models
from notebook_kit.diagnostics import routing as numbers
from notebook_kit.figures.routing import ROUTERS, Rules, _route, label_of_token, routing_view, token_figure
from notebook_kit.figures.routing_flow import LETTERS, expert_colours, flow_figure, text_figure
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
    settings = {"layer": 1, "capacity_factor": 1.0, "temperature": 0.5}
    figure = routing_view(trace, other=trace, picture=picture, router=router, **settings)
    if picture != "flow":  # has no axes
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


def route(trace, router, layer=0, temperature=1.0, **rules):
    return _route(trace, layer, router, Rules(**rules), temperature, None)


def test_every_rule_does_what_its_router_does(trace):
    p = trace.layer(0).probs.sort(1, descending=True).values
    enough = (p.cumsum(1) - p < 0.6 - 1e-6).sum(1)
    served = (route(trace, "top-p", threshold=0.6).experts >= 0).sum(1)
    assert torch.equal(served, enough)
    above = (p[:, :3] >= 0.2).sum(1)  # a null has 0.2; a pick of less computes nothing
    assert torch.equal((route(trace, "null experts", k=3, threshold=0.2).experts >= 0).sum(1), above)
    dense = (route(trace, "dense to sparse", threshold=0.1).experts >= 0).sum(1)
    assert torch.equal(dense, (p > 0.1).sum(1).clamp_min(1))
    plain, evened = (numbers.max_violation(route(trace, "loss-free bias", bias=b).load) for b in (0.0, 1.0))
    assert evened < 0.6 * plain
    assert torch.equal(route(trace, "loss-free bias", bias=0.0).experts, route(trace, "sigmoid").experts)
    hashed = route(trace, "hash").experts[:, 0]
    assert all(len(hashed[trace.tokens == token].unique()) == 1 for token in range(0, 120, 7))
    assert not torch.equal(hashed, route(trace, "hash", layer=1).experts[:, 0])
    assert not torch.equal(route(trace, "by lot").experts, route(trace, "by lot", layer=1).experts)
    assert route(trace, "null experts").logits.shape == (240, 8)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("rules", [{"k": 1, "threshold": 0.0, "bias": 0.0}, {"k": 8, "threshold": 1.0, "bias": 1.0}])
def test_the_ends_of_the_sliders(trace, router, rules):
    for temperature in (0.1, 10.0):
        routing = route(trace, router, temperature=temperature, **rules)
        assert routing.probs.isfinite().all()
        assert int(routing.experts.max()) < 8


def test_the_text_is_coloured_by_expert(trace):
    figure = routing_view(trace, picture="text", start=64)
    leaders = numbers.leading(trace.layer(0))[64 : 64 + 176]
    bars = [each for each in figure.data if each.type == "bar"]
    assert [len(bar.y) for bar in bars] == torch.bincount(leaders, minlength=8).tolist()
    words = figure.data[-1]
    assert "&lt;" in words.text
    assert len(words.text) == 176
    line = np.asarray(words.y)
    assert (np.diff(line) >= 0).all()
    assert float((np.asarray(words.x))[-1]) < LETTERS
    # A cut token has no colour, and the title says so.
    cut = routing_view(trace, picture="text", router="switch", capacity_factor=0.25)
    assert "have none" in cut.layout.title.text
    assert sum(len(bar.y) for bar in cut.data if bar.type == "bar") < len(cut.data[-1].text)


def test_long_words_are_cut_and_lines_broken_between_tokens():
    routing = TopK(1, 12).eval().route(torch.randn(40, 12))
    figure = text_figure(routing, ["<script>"] * 20 + ["a" * 99] * 20)
    assert figure.data[-1].text[0] == "&lt;script&gt;"
    assert len(figure.data[-1].text[-1]) == 24
    for bar in figure.data[:-1]:
        assert (np.asarray(bar.base) + np.asarray(bar.x) <= LETTERS).all()
    assert len({bar.marker.color for bar in figure.data[:-1]}) == 12
    assert len(set(expert_colours(24))) == 24


def test_the_flow_adds_up(trace):
    figure = routing_view(trace, picture="flow")
    (sankey,) = figure.data
    assert float(np.sum(sankey.link.value)) == pytest.approx(1.0)
    assert len(sankey.node.label) == 16
    table = numbers.flows(trace.layer(0), trace.layer(1))
    links = dict(zip(zip(sankey.link.source, sankey.link.target, strict=True), sankey.link.value, strict=True))
    assert links == {(i, 8 + j): pytest.approx(float(table[i, j])) for i, j in table.nonzero().tolist()}
    # Nodes of a layer stand in order and do not overlap.
    assert (np.diff(np.asarray(sankey.node.y)[:8]) > 0).all()
    assert [note.text for note in figure.layout.annotations] == ["layer 0", "layer 1"]
    assert routing_view(trace, picture="flow", layer=1).to_json() == figure.to_json()  # the last layer has no next


def test_a_flow_of_many_experts_shows_the_busiest():
    routings = [TopK(1, 40).eval().route(torch.randn(500, 40)) for _ in range(3)]
    (sankey,) = flow_figure(routings).data
    assert len(sankey.node.label) == 36
    assert sankey.node.label[11] == "others"
    share = np.mean([numbers.flows(a, b).max(1).values.sum() for a, b in pairwise(routings)])
    assert (
        f"{share:.0%} of tokens go on" in flow_figure(routings).layout.title.text
    )  # of all experts, not of those shown
    assert float(np.sum(sankey.link.value)) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="two layers at least, got 1"):
        flow_figure(routings[:1])


def test_drift_of_a_checkpoint_from_itself_is_none(trace):
    figure = routing_view(trace, other=trace, picture="drift")
    assert "0.0% of tokens" in figure.layout.title.text
    assert (np.asarray(figure.data[0].y) == 0).all()
    z = np.asarray(routing_view(trace, other=trace, picture="confusion").data[0].z)
    assert (z == np.diag(z.diagonal())).all()
    with pytest.raises(ValueError, match="'drift' needs other="):
        routing_view(trace, picture="drift")


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
