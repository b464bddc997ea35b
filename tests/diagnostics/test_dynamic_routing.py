import pytest
import torch

from notebook_kit import models
from notebook_kit.diagnostics.dynamic_routing import (
    byte_classes,
    compute_share,
    experts_by_group,
    experts_per_token,
    threshold_curve,
)
from notebook_kit.mixtures import MoE
from notebook_kit.models import MLP
from notebook_kit.routers import TopK, TopP, record_routing, reroute

P = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.97, 0.01, 0.01, 0.01], [0.25, 0.25, 0.25, 0.25]])


def routing_at(threshold):
    return TopP(1, 4, threshold=threshold).route(P.log())


def byte_trace(ids):
    model = models.tiny_mixtral()
    with torch.no_grad(), record_routing(model) as trace:
        model(ids)
    return trace


def test_experts_and_their_share_of_the_work():
    routing = routing_at(0.6)
    assert experts_per_token(routing).tolist() == [2, 1, 3]
    assert compute_share(routing, 2) == 1.0
    assert compute_share(routing, 4) == 0.5
    padded = TopP(1, 4, threshold=0.6).route(P.log(), mask=torch.tensor([True, True, False]))
    assert experts_per_token(padded).tolist() == [2, 1, 0]


def test_groups_of_tokens():
    table = experts_by_group([routing_at(0.6), routing_at(1.0)], ["b", "a", "b"])
    assert list(table.index) == ["b", "a"]
    assert table["layer 0"].tolist() == [2.5, 1]
    assert table["layer 1"].tolist() == [4, 4]
    assert table["tokens"].tolist() == [2, 1]
    with pytest.raises(ValueError, match="each of the 3 tokens, got 2 names"):
        experts_by_group([routing_at(0.6)], ["a", "b"])


def test_classes_of_bytes():
    trace = byte_trace(torch.tensor([[*"Ab 9,\té".encode(), 0]]))
    names = ["letter", "letter", "space", "digit", "punctuation", "space", "first of several", "later of several"]
    assert byte_classes(trace) == [*names, "other"]
    trace.vocabulary = {}
    with pytest.raises(ValueError, match="has a vocabulary of its own"):
        byte_classes(trace)


def test_the_curve_runs_the_model_and_puts_the_threshold_back():
    torch.manual_seed(0)
    moe, x = MoE([MLP([4, 4]) for _ in range(6)], TopP(4, 6, threshold=0.7)), torch.randn(50, 4)
    moe.router.weight.data.normal_()
    curve = threshold_curve(moe, lambda model: float(model(x).square().mean()), [0.1, 0.5, 1.0])
    assert moe.router.threshold == 0.7
    assert curve["experts"].is_monotonic_increasing
    assert curve["experts"].iloc[-1] == 6
    moe.router.threshold = 0.5
    assert curve["score"].iloc[1] == pytest.approx(moe(x).square().mean().item())
    assert curve["experts"].iloc[1] == pytest.approx(experts_per_token(moe.routing).float().mean().item())
    with pytest.raises(ValueError, match="no TopP router in MLP"):
        threshold_curve(MLP([2, 2]), lambda model: 0.0, [0.5])


def test_rerouting_a_trace_is_what_top_p_does():
    trace = byte_trace(torch.arange(64)[None] + 32)
    table = experts_by_group(reroute(trace, TopP, threshold=0.5), byte_classes(trace))
    assert (table.drop(columns="tokens") >= 1).all().all()
    assert (experts_by_group(reroute(trace, TopK, k=2), byte_classes(trace))["layer 0"] == 2).all()
