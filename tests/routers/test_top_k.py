"""Top-k by hand-worked examples, and what holds for any logits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from notebook_kit.routers import TopK
from notebook_kit.routers._claims import best_first, capacity, top_k, within_capacity


def route(logits, **hyperparameters):
    logits = torch.as_tensor(logits, dtype=torch.float32)
    return TopK(1, logits.shape[1], **hyperparameters).eval().route(logits)


def test_mixtral_weights_are_the_softmax_over_the_picked_logits():
    routing = route([[2.0, 1.0, 0.0]], k=2)
    torch.testing.assert_close(routing.probs, torch.tensor([[0.6652, 0.2447, 0.0900]]), atol=1e-4, rtol=0)
    torch.testing.assert_close(routing.weights, torch.tensor([[2.0, 1.0]]).softmax(1))
    assert routing.experts.tolist() == [[0, 1]]


def test_switch_weight_is_the_raw_probability():
    routing = route([[2.0, 1.0, 0.0]], k=1, convention="switch")
    assert routing.weights.item() == pytest.approx(0.6652, abs=1e-4)


def logits_of(first):
    """Two experts; p of expert 0 as given."""
    return [[math.log(p), math.log(1 - p)] for p in first]


@pytest.mark.parametrize("priority", ["token", "batch"])
def test_capacity_drops_the_third_claim(priority):
    # p_0 = .9 .8 .7 .4, C = 2: token 2 finds expert 0 full.
    rules = {"k": 1, "convention": "switch", "capacity_factor": 1.0, "priority": priority}
    routing = route(logits_of([0.9, 0.8, 0.7, 0.4]), **rules)
    assert routing.experts.reshape(-1).tolist() == [0, 0, -1, 1]
    assert routing.weights.reshape(-1).tolist() == pytest.approx([0.9, 0.8, 0, 0.6], abs=1e-6)
    assert routing.dropped == 0.25
    backwards = route(logits_of([0.4, 0.7, 0.8, 0.9]), **rules).experts.reshape(-1).tolist()
    assert backwards == ([1, 0, 0, -1] if priority == "token" else [1, -1, 0, 0])


def test_first_choices_queue_before_second_choices():
    # Tokens 0 and 1 claim expert 0 second; tokens 2 and 3 first, and there are 2 slots.
    z = [[1.0, 2.0, -9], [1.0, 2.0, -9], [2.0, -9, 1.0], [2.0, -9, 1.0]]
    routing = route(z, k=2, capacity_factor=0.75)
    assert capacity(4, 3, 2, 0.75) == 2
    assert routing.experts.tolist() == [[1, -1], [1, -1], [0, 2], [0, 2]]


def test_gshard_hands_a_dropped_weight_to_the_other_expert():
    z = [[1.0, 2.0, -9], [1.0, 2.0, -9], [2.0, -9, 1.0], [2.0, -9, 1.0]]
    mixtral = route(z, k=2, capacity_factor=0.75)
    gshard = route(z, k=2, capacity_factor=0.75, convention="gshard")
    assert mixtral.weights[0, 0].item() == pytest.approx(torch.tensor([2.0, 1.0]).softmax(0)[0].item())
    assert gshard.weights[0].tolist() == [1.0, 0.0]
    assert gshard.experts.tolist() == mixtral.experts.tolist()


def test_gshard_without_capacity_is_mixtral():
    z = torch.randn(50, 6)
    torch.testing.assert_close(route(z, convention="gshard").weights, route(z).weights)


@pytest.mark.parametrize(("policy", "share"), [("all", 1.0), ("random", 0.4), ("sampling", 1.0)])
def test_second_policies_in_training(policy, share):
    # w = (.8, .2): "random" keeps the second with probability 2 * .2; "sampling" draws it from the rest.
    z = torch.tensor([[math.log(0.8), math.log(0.2), math.log(0.1)]]).repeat(4000, 1)
    router = TopK(1, 3, convention="gshard", second_policy=policy).train()
    experts = router.route(z).experts
    assert (experts[:, 0] == 0).all()
    assert (experts[:, 1] >= 0).float().mean().item() == pytest.approx(share, abs=0.03)
    drawn = (experts[:, 1] == 2).float().mean().item()
    assert drawn == pytest.approx(1 / 3 if policy == "sampling" else 0, abs=0.03)
    assert (router.eval().route(z).experts == torch.tensor([0, 1])).all()


def test_jitter_only_in_training():
    router, x = TopK(4, 3, jitter=0.3), torch.randn(5, 4)
    assert not torch.equal(router.train().logits(x), router.logits(x))
    assert torch.equal(router.eval().logits(x), router.logits(x))


def test_padding_gets_nothing_and_counts_nowhere():
    z = torch.randn(8, 4)
    mask = torch.tensor([1, 1, 1, 1, 1, 0, 0, 0]).bool()
    router = TopK(1, 4, capacity_factor=1.0, z_coef=0.1).eval()
    whole, alone = router.route(z, mask=mask), router.route(z[:5])
    assert (whole.experts[5:] == -1).all()
    assert (whole.weights[5:] == 0).all()
    assert torch.equal(whole.experts[:5], alone.experts)
    torch.testing.assert_close(whole.aux_loss, alone.aux_loss)
    torch.testing.assert_close(whole.load, alone.load)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_softmax_in_float32_whatever_comes(dtype):
    router = TopK(8, 4).to(dtype)
    routing = router(torch.randn(6, 8, dtype=dtype))
    assert routing.probs.dtype == routing.weights.dtype == torch.float32
    torch.testing.assert_close(routing.probs.sum(1), torch.ones(6))


@pytest.mark.parametrize("n_tokens", [0, 1])
@pytest.mark.parametrize("capacity_factor", [None, 1.0])
def test_small_batches(n_tokens, capacity_factor):
    routing = TopK(8, 4, capacity_factor=capacity_factor, z_coef=0.01)(torch.randn(n_tokens, 8))
    assert routing.experts.shape == (n_tokens, 2)
    assert torch.isfinite(routing.aux_loss)
    assert routing.load.sum() == pytest.approx(float(n_tokens > 0))
    assert "Routing(" in repr(routing)


def test_one_expert_and_all_experts():
    assert TopK(8, 1, k=1)(torch.randn(3, 8)).weights.tolist() == [[1.0]] * 3
    routing = route(torch.randn(5, 4), k=4)
    assert routing.experts.sort(1).values.tolist() == [[0, 1, 2, 3]] * 5


def test_ties_go_to_the_lowest_index():
    assert route(torch.zeros(7, 9), k=3).experts.tolist() == [[0, 1, 2]] * 7
    assert route([[0.0, 5, 1, 5, 5]], k=2).experts.tolist() == [[1, 3]]


def test_constant_weights_are_refused_with_the_reason():
    with pytest.raises(ValueError, match="no gradient"):
        TopK(8, 4, k=1)
    TopK(8, 4, k=1, normalize=False)
    with pytest.raises(ValueError, match="Switch routes to k=1"):
        TopK(8, 4, k=2, convention="switch")


@pytest.mark.parametrize(
    ("hyperparameters", "text"),
    [
        ({"k": 5}, "k must be at most n_experts=4, got 5"),
        ({"k": 0}, r"k must be in \[1, 512\], got 0"),
        ({"convention": "swich"}, "convention must be one of"),
        ({"capacity_factor": -1.0}, "capacity_factor must be in"),
        ({"balance_coef": float("nan")}, "balance_coef must be in"),
    ],
)
def test_bad_hyperparameters(hyperparameters, text):
    with pytest.raises(ValueError, match=text):
        TopK(8, 4, **hyperparameters)


def test_bad_input():
    with pytest.raises(ValueError, match="NaN, first at token 1"):
        route([[0.0, 1.0], [float("nan"), 0.0]])
    with pytest.raises(ValueError, match="width d_model=8, got 7"):
        TopK(8, 4)(torch.randn(3, 7))
    with pytest.raises(ValueError, match="at least 1"):
        TopK(0, 4)


def test_the_router_learns_from_the_task():
    router = TopK(8, 4, balance_coef=0.0)
    router(torch.randn(20, 8)).weights[:, 0].sum().backward()
    assert router.weight.grad.abs().sum() > 0


logit_rows = st.integers(0, 12).flatmap(
    lambda n: st.lists(st.lists(st.integers(-3, 3), min_size=5, max_size=5), min_size=n, max_size=n)
)


@settings(deadline=None, max_examples=40)
@given(rows=logit_rows, k=st.integers(1, 5), factor=st.sampled_from([None, 0.5, 1.0, 2.0]), batch=st.booleans())
def test_what_holds_for_any_logits(rows, k, factor, batch):
    z = torch.tensor(rows, dtype=torch.float32).reshape(len(rows), 5)
    priority = "batch" if batch else "token"
    routing = route(z, k=k, normalize=k > 1, capacity_factor=factor, priority=priority)
    used = routing.experts >= 0
    assert (routing.weights[~used] == 0).all()
    for row in routing.experts.tolist():
        served = [expert for expert in row if expert >= 0]
        assert len(served) == len(set(served))
    counts = torch.bincount(routing.experts[used], minlength=5)
    if factor is not None:
        assert counts.max() <= capacity(len(rows), 5, k, factor)
    elif k > 1 and len(rows):
        torch.testing.assert_close(routing.weights.sum(1), torch.ones(len(rows)))


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000))
def test_renaming_experts_renames_the_answer(seed):
    generator = torch.Generator().manual_seed(seed)
    z, order = torch.randn(12, 6, generator=generator), torch.randperm(6, generator=generator)
    plain, renamed = route(z, k=3), route(z[:, order], k=3)
    assert torch.equal(order[renamed.experts], plain.experts)
    torch.testing.assert_close(renamed.weights, plain.weights)
    torch.testing.assert_close(renamed.aux_loss, plain.aux_loss)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), k=st.integers(1, 6))
def test_top_k_is_the_stable_sort(seed, k):
    scores = torch.randint(0, 4, (20, 6), generator=torch.Generator().manual_seed(seed)).float()
    expected = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(top_k(scores, k), expected)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), slots=st.integers(0, 6), batch=st.booleans())
def test_the_queue_against_a_loop(seed, slots, batch):
    generator = torch.Generator().manual_seed(seed)
    claimed = torch.randint(-1, 3, (9, 2), generator=generator)
    priority = torch.rand(9, generator=generator) if batch else None
    order = list(range(9)) if priority is None else priority.argsort(descending=True).tolist()
    waiting, expected = [0, 0, 0], torch.zeros(9, 2, dtype=torch.bool)
    for choice in range(2):
        for token in order:
            expert = int(claimed[token, choice])
            if expert >= 0:
                expected[token, choice] = waiting[expert] < slots
                waiting[expert] += 1
    assert torch.equal(within_capacity(claimed, 3, slots, priority), expected)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 7, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forbidden_experts_come_last_and_none_twice(k, dtype):
    scores = torch.randn(50, 12).to(dtype).masked_fill(torch.rand(50, 12) < 0.6, -torch.inf)
    picks = top_k(scores, k)
    assert torch.equal(picks, scores.sort(dim=1, descending=True, stable=True).indices[:, :k])


@pytest.mark.parametrize("threads", [1, 4])
def test_picks_do_not_depend_on_the_number_of_threads(threads):
    scores = torch.randn(300, 16).round(decimals=1)  # with ties
    expected, before = scores.sort(dim=1, descending=True, stable=True).indices, torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert all(torch.equal(top_k(scores, k), expected[:, :k]) for k in range(1, 17))
    finally:
        torch.set_num_threads(before)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), share=st.floats(0, 1), ties=st.booleans())
def test_what_is_used_stands_in_falling_order(seed, share, ties):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(9, 6, generator=generator)
    scores = scores.round(decimals=1) if ties else scores
    used = torch.rand(9, 6, generator=generator) < share
    experts = best_first(used, scores)
    for row, chosen, score in zip(experts.tolist(), used, scores, strict=True):
        expected = sorted(chosen.nonzero()[:, 0].tolist(), key=lambda e: -score[e].item())
        assert row == expected + [-1] * (len(row) - len(expected))
    assert experts.shape[1] == max(1, int(used.sum(1).max()))


def test_batch_priority_is_for_images():
    assert TopK(4, 4, priority="batch").causal
    assert not TopK(4, 4, priority="batch", capacity_factor=1.0).causal
    assert TopK(4, 4, capacity_factor=1.0).causal
    # A later token that is surer takes the place of an earlier one.
    router = TopK(1, 2, k=1, normalize=False, capacity_factor=1.0, priority="batch")
    z = torch.tensor([[1.0, 0], [0.5, 0], [0, 1], [0, 1]])
    assert router.route(z).experts[:, 0].tolist() == [0, 0, 1, 1]
    z[3] = torch.tensor([5.0, 0])
    assert router.route(z).experts[:, 0].tolist() == [0, -1, 1, 0]


def test_capacity_is_not_fooled_by_rounding():
    assert capacity(200, 10, 1, 1.1) == 22
    assert capacity(7, 4, 1, 1.0) == 2
    assert capacity(0, 4, 2, 1.0) == 0


def test_evaluation_may_have_more_room():
    router = TopK(1, 2, k=1, convention="switch", capacity_factor=0.5, eval_capacity_factor=2.0)
    z = torch.tensor([[1.0, 0]]).repeat(8, 1)
    assert router.train().route(z).load.tolist() == [1, 0]
    assert router.route(z).dropped == 0.75  # 2 slots of 8 claims
    assert router.eval().route(z).dropped == 0
