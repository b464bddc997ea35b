"""Hash routing: every table, bigrams in sequences and in a trace, and several hashes by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from notebook_kit import models
from notebook_kit.mixtures import MoE
from notebook_kit.models import MLP
from notebook_kit.routers import HashRouter, record_routing, reroute
from notebook_kit.routers.hash_tables import balanced_table, clustered_table, dispersed_table, random_table
from notebook_kit.routers.reroute import previous_ids
from notebook_kit.routing import RoutingTrace

IDS = torch.arange(60).reshape(3, 20) * 7 % 12


def test_the_same_id_goes_to_the_same_expert_anywhere():
    router = HashRouter(4, 5, vocab_size=12)
    experts = router(torch.randn(60, 4), tokens=IDS).experts[:, 0]
    assert torch.equal(experts, router.table[0, IDS.reshape(-1)])
    assert torch.equal(experts, HashRouter(4, 5, vocab_size=12)(torch.randn(60, 4), tokens=IDS).experts[:, 0])
    assert not torch.equal(router.table, HashRouter(4, 5, vocab_size=12, seed=1).table)


@settings(deadline=None, max_examples=30)
@given(counts=st.lists(st.integers(0, 50), min_size=1, max_size=40), n_experts=st.integers(1, 9))
def test_a_balanced_table_is_balanced_up_to_the_most_frequent_id(counts, n_experts):
    counts = torch.tensor(counts)
    table = balanced_table(counts, n_experts)
    load = torch.zeros(n_experts, dtype=torch.int64).index_add_(0, table, counts)
    assert load.max() - load.min() <= counts.max()


def test_balanced_by_hand():
    # 9 -> 0, 5 -> 1, 4 -> 1 (5 < 9), 3 -> 0 (9 = 9: the lower number)
    assert balanced_table(torch.tensor([4, 9, 3, 5]), 2).tolist() == [1, 0, 0, 1]


def test_clusters_share_an_expert_or_are_dealt_out():
    groups = torch.arange(40) % 4
    embeddings = 10 * torch.eye(4)[groups] + 0.01 * torch.randn(40, 4)
    seed = next(s for s in range(50) if clustered_table(embeddings, 4, s).unique().numel() == 4)  # a lucky start
    together = clustered_table(embeddings, 4, seed)
    assert all(together[groups == g].unique().numel() == 1 for g in range(4))
    apart = dispersed_table(embeddings, 4, seed)
    for g in range(4):
        counts = torch.bincount(apart[groups == g], minlength=4)
        assert counts.max() - counts.min() <= 1
    assert torch.bincount(apart).tolist() == [10] * 4
    assert clustered_table(embeddings[:2], 4).tolist() == clustered_table(embeddings[:2], 4).tolist()


def test_a_bigram_is_the_id_and_the_one_before_it():
    router = HashRouter(4, 7, table="bigram", vocab_size=12)
    twice = torch.tensor([[3, 5, 3, 5], [5, 3, 5, 9]])
    experts = router(torch.randn(8, 4), tokens=twice).experts.reshape(2, 4)
    assert experts[0, 1] == experts[0, 3] == experts[1, 2]
    assert experts[0, 2] == experts[1, 1]
    alone = [
        router(torch.randn(1, 4), tokens=torch.tensor([5]), previous=torch.tensor([p])).experts for p in range(-1, 12)
    ]
    assert len({int(e) for e in alone}) > 2
    assert alone[0] == experts[1, 0]
    assert torch.bincount(router(torch.randn(60, 4), tokens=IDS).experts[:, 0]).numel() <= 7


def test_bigrams_of_a_trace_know_their_sequences():
    trace = RoutingTrace(["a"], k=1)
    # Two sequences side by side, then generated on: interleaved.
    tokens, sequences, positions = [1, 2, 3, 4, 5, 6], [0, 0, 1, 1, 0, 1], [0, 1, 0, 1, 2, 2]
    z = torch.randn(6, 4)
    parts = [(z, torch.ones(6, 1), torch.zeros(6, 1, dtype=torch.int64))]
    trace.append(
        parts, tokens=torch.tensor(tokens), sequences=torch.tensor(sequences), positions=torch.tensor(positions)
    )
    assert previous_ids(trace).tolist() == [-1, 1, -1, 3, 2, 4]
    router = HashRouter(1, 4, table="bigram")
    expected = router.route(z, tokens=trace.tokens, previous=torch.tensor([-1, 1, -1, 3, 2, 4]))
    assert torch.equal(reroute(trace, router, layer=0).experts, expected.experts)
    assert torch.equal(reroute(trace, HashRouter, layer=0, table="bigram").experts, expected.experts)


@torch.no_grad()
def test_a_recorded_model_is_routed_again_by_its_ids():
    model = models.tiny_mixtral()
    with record_routing(model) as trace:
        model(IDS)
    counts = torch.bincount(IDS.reshape(-1), minlength=256)
    routing = reroute(trace, HashRouter(1, 8, table="balanced", counts=counts), layer=1)
    assert len({(int(i), int(e)) for i, e in zip(trace.tokens, routing.experts, strict=True)}) == 12
    with pytest.raises(ValueError, match="made already: seed cannot be set"):
        reroute(trace, HashRouter(1, 8), layer=0, seed=1)
    with pytest.raises(ValueError, match="for 4 experts, the trace has 8"):
        reroute(trace, HashRouter(1, 4), layer=0)


def test_several_hashes_take_segments_of_hidden_units_from_different_experts():
    # N = 3 experts of f = 4 hidden units, M = 2 segments of 2 units: y = sum_m B_m relu(A_m x) with expert h_m(id).
    n, m, d, half = 3, 2, 5, 2
    A, B = torch.randn(n, m * half, d), torch.randn(n, d, m * half)
    router = HashRouter(d, n * m, n_hashes=m, vocab_size=12)
    segments = []
    for j in range(m):
        for i in range(n):
            segment = MLP([d, half, d])
            first, last = (layer for layer in segment.modules() if isinstance(layer, torch.nn.Linear))
            rows = slice(j * half, (j + 1) * half)
            first.weight.data, last.weight.data = A[i, rows], B[i][:, rows]
            first.bias.data.zero_(), last.bias.data.zero_()
            segments.append(segment)
    ids, x = torch.arange(12), torch.randn(12, d)
    y = MoE(segments, router)(x, tokens=ids)
    h = router.table - torch.tensor([[0], [n]])
    assert ((h >= 0) & (h < n)).all()
    assert not torch.equal(h[0], h[1])
    for t in range(12):
        hidden = torch.cat([A[h[j, t], j * half : (j + 1) * half] @ x[t] for j in range(m)]).relu()
        W = torch.cat([B[h[j, t]][:, j * half : (j + 1) * half] for j in range(m)], 1)
        torch.testing.assert_close(y[t], W @ hidden)


def test_it_has_no_parameters_and_its_table_travels():
    router, other = HashRouter(4, 5, vocab_size=12), HashRouter(4, 5, vocab_size=12, seed=9)
    assert not list(router.parameters())
    other.load_state_dict(router.state_dict())
    assert torch.equal(other.table, router.table)
    assert "random" in repr(router)
    assert random_table(12, 5).tolist() == router.table[0].tolist()


def test_padding_may_have_any_id():
    tokens, mask = torch.tensor([1, -100, 2]), torch.tensor([True, False, True])
    for table in ("random", "bigram"):
        routing = HashRouter(4, 5, table=table)(torch.randn(3, 4), tokens=tokens, mask=mask)
        assert (routing.experts[:, 0] >= 0).tolist() == mask.tolist()
        assert routing.weights[:, 0].tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"table": "balanced"}, "'balanced' needs counts="),
        ({"table": "random", "counts": torch.ones(256, dtype=torch.int64)}, "'random' does not use counts="),
        ({"table": "clustered"}, "'clustered' needs embeddings="),
        ({"table": "dispersed", "embeddings": torch.randn(9, 2)}, "vocab_size=256 rows, got 9"),
        ({"n_hashes": 3}, "multiple of n_hashes=3, got 8"),
        ({"n_hashes": 2, "table": "dispersed", "embeddings": torch.randn(256, 2)}, "by lot, random or bigram"),
        ({"table": "perfect"}, "table must be one of"),
    ],
)
def test_bad_tables(arguments, text):
    with pytest.raises(ValueError, match=text):
        HashRouter(4, 8, **arguments)


def test_bad_ids():
    router, x = HashRouter(4, 8, vocab_size=12), torch.randn(3, 4)
    with pytest.raises(ValueError, match="call it with tokens=ids, one for each of 3 rows"):
        router(x)
    with pytest.raises(ValueError, match="one id a row, 3, got 2"):
        router(x, tokens=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"in \[0, 11\], got 12"):
        router(x, tokens=torch.tensor([1, 2, 12]))
    with pytest.raises(ValueError, match=r"in \[0, 11\], got -1"):
        router(x, tokens=torch.tensor([1, 2, -1]))
