"""Routing numbers by hand, and against the zoo's own measure."""

import math

import pytest
import torch

from notebook_kit.diagnostics import routing as numbers
from notebook_kit.routers import NullExperts, TopK, reroute
from notebook_kit.routing import RoutingTrace
from notebook_kit.zoo.specialisation import window_information


def labelled_trace(best, labels, length, n_experts=4, names=("a", "b")):
    """A trace whose best expert of each token is given, in sequences of one label."""
    best = torch.as_tensor(best)
    trace = RoutingTrace(["layer"], k=2)
    logits = torch.randn(len(best), n_experts).clamp(-2, 2)
    logits[torch.arange(len(best)), best] = 5
    routing = TopK(1, n_experts).eval().route(logits)
    n = len(labels)
    trace.append(
        [(routing.logits, routing.weights, routing.experts)],
        tokens=torch.zeros(len(best), dtype=torch.int64),
        positions=torch.arange(length).repeat(n),
        sequences=torch.arange(n).repeat_interleave(length),
        labels=[names[label] for label in labels for _ in range(length)],
    )
    return trace


def test_max_violation_and_entropy():
    assert numbers.max_violation(torch.tensor([5.0, 3, 2, 2])) == pytest.approx(2 / 3)
    assert numbers.max_violation(torch.zeros(4)) == 0
    probs = torch.tensor([[0.25] * 4, [1.0, 0, 0, 0], [0.5, 0.5, 0, 0]])
    torch.testing.assert_close(numbers.entropy(probs), torch.tensor([2.0, 0, 1]))
    torch.testing.assert_close(numbers.entropy(probs * 3), torch.tensor([2.0, 0, 1]))  # sigmoid scores do not sum to 1


def test_information_is_one_bit_when_experts_are_labels():
    labels = [0, 1] * 20
    trace = labelled_trace([label for label in labels for _ in range(5)], labels, 5)
    information = numbers.mutual_information(trace.layer(0), trace)
    assert information.bits == pytest.approx(1.0, abs=1e-6)
    assert information.chance_mean < information.chance_99 < 0.3
    table = numbers.specialisation(trace.layer(0), trace)
    assert table.loc["a", 0] >= 0.5
    torch.testing.assert_close(torch.tensor(table.sum(axis=1).values), torch.ones(2))


def test_information_by_chance_is_not_above_chance():
    labels = torch.randint(0, 2, (60,)).tolist()
    trace = labelled_trace(torch.randint(0, 4, (60 * 8,)), labels, 8)
    information = numbers.mutual_information(trace.layer(0), trace)
    assert 0 <= information.bits < information.chance_99 * 2
    assert information.chance_mean > 0


def test_information_agrees_with_the_zoos_measure():
    labels = torch.randint(0, 2, (30,))
    best = torch.randint(0, 4, (30, 8))
    trace = labelled_trace(best.reshape(-1), labels.tolist(), 8)
    theirs = window_information(labels, best, n_shuffles=300)
    ours = numbers.mutual_information(trace.layer(0), trace, n_shuffles=300)
    assert ours.bits == pytest.approx(theirs["bits"], abs=1e-6)
    assert ours.chance_mean == pytest.approx(theirs["chance_mean"], rel=0.15)


def test_shared_information():
    a = torch.tensor([0, 0, 1, 1, -1])
    assert numbers.shared_information(a, a) == pytest.approx(1.0)
    assert numbers.shared_information(a, torch.tensor([0, 1, 0, 1, 0])) == pytest.approx(0.0)
    assert numbers.shared_information(a - 5, a) == 0


def test_co_activation_and_transitions():
    z = torch.tensor([[3.0, 2, 0], [3, 2, 0], [0, 3, 2], [3, 0, 2]])
    routing = TopK(1, 3).eval().route(z)
    together = numbers.co_activation(routing)
    torch.testing.assert_close(together, torch.tensor([[0.75, 0.5, 0.25], [0.5, 0.75, 0.25], [0.25, 0.25, 0.5]]))
    after = TopK(1, 3).eval().route(z.flip(1))
    assert numbers.transitions(routing, after)[0].tolist() == pytest.approx([0, 0, 1.0])


def test_summary_counts_what_capacity_cut():
    trace = labelled_trace([0] * 8, [0, 1], 4)
    plain, cut = reroute(trace, TopK, layer=0, k=1, convention="switch"), None
    cut = reroute(trace, TopK, layer=0, k=1, convention="switch", capacity_factor=1.0)
    table = numbers.routing_summary([plain, cut], ["plain", "cut"])
    assert table.loc["plain", "max_violation"] == table.loc["cut", "max_violation"] == 3
    assert table.loc["cut", "dropped"] == table.loc["cut", "unserved"] == 0.75
    assert table.loc["plain", "dead_experts"] == 3
    assert 0 < table.loc["plain", "entropy_bits"] < math.log2(4)
    assert numbers.load_table([plain, cut]).shape == (2, 4)
    assert len(numbers.recorded(trace)) == 1


def test_without_labels():
    trace = labelled_trace([0] * 8, [0, 0], 4, names=("", ""))
    for use in (numbers.mutual_information, numbers.specialisation):
        with pytest.raises(ValueError, match="no labels: record inside"):
            use(trace.layer(0), trace)
    one = labelled_trace([0] * 4, [0], 4)
    with pytest.raises(ValueError, match="2 sequences"):
        numbers.mutual_information(one.layer(0), one)


def test_variation_and_dead_experts():
    assert numbers.variation(torch.tensor([4.0, 4, 4])) == 0
    assert numbers.variation(torch.tensor([0.0, 0, 0, 8])) == pytest.approx(2.0)  # sqrt(N)
    assert numbers.dead_experts(torch.tensor([0.5, 0, 0.5, 0])) == 2


def test_how_many_tokens_changed_their_expert():
    z = torch.tensor([[3.0, 0], [3, 0], [0, 3], [0, 3]])
    first, then = (TopK(1, 2, k=1, convention="switch").eval().route(scores) for scores in (z, z[[2, 1, 2, 3]]))
    assert numbers.changed(first, then) == 0.25
    assert numbers.changed(first, first) == 0
    nobody = TopK(1, 2).eval().route(z, mask=torch.zeros(4, dtype=torch.bool))
    assert numbers.changed(first, nobody) == 0


def test_the_leading_expert_is_the_heaviest_that_serves():
    z = torch.tensor([[2.0, 1, 0], [2, 1, 0], [2, 1, 0]])
    routing = TopK(1, 3, capacity_factor=0.5).eval().route(z)  # one slot an expert: the first token has both
    assert numbers.leading(routing).tolist() == [0, -1, -1]
    nulls = NullExperts(1, 2, n_null=1, k=2, balance_coef=0.0).eval().route(torch.tensor([[1.0, 0.0, 2.0]]))
    assert nulls.experts.tolist() == [[-1, 0]]
    assert numbers.leading(nulls).tolist() == [0]


def test_flows_are_shares_of_all_tokens():
    a, b = (
        TopK(1, 2, k=1, convention="switch").eval().route(z)
        for z in (torch.eye(2)[[0, 0, 1, 1]], torch.eye(2)[[0, 1, 1, 1]])
    )
    assert numbers.flows(a, b).tolist() == [[0.25, 0.25], [0, 0.5]]
    assert numbers.transitions(a, b).tolist() == [[0.5, 0.5], [0, 1]]


def test_drift_by_hand():
    """Token 0 keeps both experts in another order, token 1 one of two, token 2 everything."""
    z = torch.tensor([[3.0, 2, 0, 0], [3, 2, 0, 0], [0, 0, 3, 2]])
    then = torch.tensor([[2.0, 3, 0, 0], [3, 0, 2, 0], [0, 0, 3, 2]])
    first, other = (TopK(1, 4).eval().route(logits) for logits in (z, then))
    row = numbers.drift_table([first], [other]).loc[0]
    assert row["best_changed"] == pytest.approx(1 / 3)
    assert row["set_changed"] == pytest.approx(1 / 3)
    assert row["replaced"] == pytest.approx(1 / 6)
    assert (numbers.drift_table([first, other], [first, other], ["a", "b"]) == 0).all(axis=None)
    with pytest.raises(ValueError, match="1 layers of 3 tokens and 2 layers"):
        numbers.drift_table([first], [first, first])


def test_two_traces_must_be_of_the_same_text():
    one, two = (labelled_trace([0] * 8, [0, 1], 4) for _ in range(2))
    numbers.same_text(one, two)
    with pytest.raises(ValueError, match="same text in the same order; they have 8 and 4 tokens"):
        numbers.same_text(one, labelled_trace([0] * 4, [0], 4))
    with pytest.raises(ValueError, match="equally many layers, got 1 and 2"):
        numbers.same_text(one, RoutingTrace(["a", "b"], k=2))


def test_null_columns_are_left_out():
    routing = NullExperts(1, 3, n_null=6).eval().route(torch.randn(5, 9))
    shown = numbers.true_experts(routing, 3)
    assert shown.logits.shape == shown.probs.shape == (5, 3)
    assert torch.equal(shown.experts, routing.experts)
    assert len(shown.load) == 3
    assert numbers.true_experts(shown, 3) is shown
