"""What every router of the baselines promises, on one interface."""

import copy

import pytest
import torch

from notebook_kit.routers import (
    BalancedAssignment,
    DenseToSparse,
    ExpertChoice,
    HashRouter,
    LossFreeBias,
    NoisyTopK,
    NullExperts,
    RandomRouter,
    StableMoE,
    StochasticExperts,
    TopK,
    TopP,
)

N = 4
MAKERS = {
    "mixtral": lambda n: TopK(6, n, k=min(2, n)),
    "switch": lambda n: TopK(6, n, k=1, convention="switch", capacity_factor=1.25),
    "gshard": lambda n: TopK(6, n, k=min(2, n), convention="gshard", capacity_factor=1.0),
    "noisy": lambda n: NoisyTopK(6, n, k=min(2, n)),
    "expert choice": lambda n: ExpertChoice(6, n, k=1),
    "base": lambda n: BalancedAssignment(6, n),
    "hash": lambda n: HashRouter(6, n, vocab_size=9),
    "stable": lambda n: StableMoE(6, n, vocab_size=9),
    "bias": lambda n: LossFreeBias(6, n, k=min(2, n)),
    "groups": lambda n: LossFreeBias(6, n, k=min(2, n), n_group=min(2, n), topk_group=1),
}
LEARNED = [name for name in MAKERS if name != "hash"]
every = pytest.mark.parametrize("name", MAKERS)
modes = pytest.mark.parametrize("training", [True, False])


def run(router, x, **more):
    if router.needs_tokens:
        more["tokens"] = torch.arange(len(x)) % 9
    return router(x, **more)


def route(router, z):
    return router.route(z, **({"tokens": torch.arange(len(z)) % 9} if router.needs_tokens else {}))


@every
@modes
@pytest.mark.parametrize("n_tokens", [0, 1, 2, 13])
@pytest.mark.parametrize("n_experts", [1, N])
def test_shapes_slots_and_unused_slots(name, training, n_tokens, n_experts):
    router = MAKERS[name](n_experts).train(training)
    routing = run(router, torch.randn(n_tokens, 6))
    assert routing.logits.shape == routing.probs.shape == (n_tokens, n_experts)
    assert routing.weights.shape == routing.experts.shape == (n_tokens, routing.experts.shape[1])
    assert routing.weights.dtype == routing.probs.dtype == torch.float32
    assert (routing.weights[routing.experts < 0] == 0).all()
    assert routing.aux_loss.shape == ()
    assert torch.isfinite(routing.aux_loss)
    for row in routing.experts.tolist():
        used = [expert for expert in row if expert >= 0]
        assert len(used) == len(set(used))
        assert all(expert < n_experts for expert in used)


@every
@modes
def test_padding_changes_nothing(name, training):
    router = MAKERS[name](N).train(training)
    x, mask = torch.randn(13, 6), torch.arange(13) < 8
    torch.manual_seed(0)
    whole = run(copy.deepcopy(router), x, mask=mask)
    assert (whole.experts[8:] == -1).all()
    assert (whole.weights[8:] == 0).all()
    if not (name == "noisy" and training):  # other noise is drawn for another number of tokens
        alone = run(copy.deepcopy(router), x[:8])
        assert torch.equal(whole.experts[:8], alone.experts)
        torch.testing.assert_close(whole.aux_loss, alone.aux_loss)


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weighs_in_float32(name, dtype):
    routing = run(MAKERS[name](N).to(dtype), torch.randn(13, 6, dtype=dtype))
    assert routing.weights.dtype == torch.float32
    assert torch.isfinite(routing.weights).all()


@every
def test_nan_is_refused(name):
    z = torch.zeros(5, N)
    z[3, 1] = torch.nan
    with pytest.raises(ValueError, match="NaN, first at token 3"):
        route(MAKERS[name](N), z)


ALL = MAKERS | {
    "top-p": lambda n: TopP(6, n),
    "null": lambda n: NullExperts(6, n),
    "random": lambda n: RandomRouter(6, n),
    "stochastic": lambda n: StochasticExperts(6, n),
    "dense to sparse": lambda n: DenseToSparse(6, n),
}


@pytest.mark.parametrize("name", ALL)
@modes
def test_logits_of_another_number_of_experts_and_a_mask_of_another_length_are_refused(name, training):
    router = ALL[name](N).train(training)
    with pytest.raises(ValueError, match=r"logits need 4 .*columns, one an expert, got 3"):
        route(router, torch.zeros(5, 3))
    with pytest.raises(ValueError, match="one entry a token, 5, got 4"):  # route's own shapes are checked here already
        router.check_logits(torch.zeros(5, N), torch.ones(4, dtype=torch.bool))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_in_float32_from_a_half_precision_router(name, dtype):
    """So transformers' DeepSeek gates score: what a router adds of its own must follow."""
    router = ALL[name](N).to(dtype).train()
    if router.weight is not None:
        router.weight.data = router.weight.data.float()
    routing = run(router, torch.randn(13, 6))
    assert torch.isfinite(routing.weights).all()


@every
@modes
def test_the_same_call_twice_is_the_same(name, training):
    router, z = MAKERS[name](N).train(training), torch.randn(30, N).round()  # with ties
    first, second = route(router, z), route(router, z)
    assert torch.equal(first.experts, second.experts)


@pytest.mark.parametrize("name", [name for name in LEARNED if name not in ("groups", "expert choice", "base")])
def test_ties_go_to_the_lowest_index(name):
    router = MAKERS[name](N)
    if hasattr(router, "capacity_factor"):
        router.capacity_factor = float(N)
    routing = route(router, torch.zeros(5, N))
    assert (routing.experts == torch.arange(routing.experts.shape[1])).all()


@pytest.mark.parametrize("name", [name for name in LEARNED if name not in ("stable", "groups")])
@modes
def test_renaming_experts_renames_the_answer(name, training):
    router = MAKERS[name](N).train(training)
    generator = torch.Generator().manual_seed(3)
    z, order = torch.randn(12, N, generator=generator), torch.randperm(N, generator=generator)
    if isinstance(router, LossFreeBias):
        router.bias.copy_(torch.linspace(-0.3, 0.3, N))
    plain = route(router, z)
    if isinstance(router, LossFreeBias):
        router.bias.copy_(router.bias[order])
    renamed = route(router, z[:, order])
    assert torch.equal(torch.where(renamed.experts < 0, -1, order[renamed.experts]), plain.experts)
    torch.testing.assert_close(renamed.weights, plain.weights)
    torch.testing.assert_close(renamed.aux_loss, plain.aux_loss)


@pytest.mark.parametrize("name", LEARNED)
def test_the_router_learns_from_the_task_alone(name):
    router = MAKERS[name](N).train()
    torch.nn.init.normal_(router.weight)
    run(router, torch.randn(30, 6)).weights[:, 0].square().sum().backward()
    assert router.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["mixtral", "noisy", "bias", "groups"])
def test_weights_sum_to_one_where_it_is_promised(name):
    torch.testing.assert_close(run(MAKERS[name](N), torch.randn(30, 6)).weights.sum(1), torch.ones(30))


@pytest.mark.parametrize("name", ["mixtral", "noisy", "bias", "expert choice"])
def test_every_expert_of_every_token(name):
    router = MAKERS[name](N)
    router.k = N
    routing = run(router.eval(), torch.randn(7, 6))
    assert routing.experts.sort(1).values.tolist() == [[0, 1, 2, 3]] * 7


@pytest.mark.parametrize(
    ("name", "slots"), [("switch", 10), ("gshard", 15), ("expert choice", 8), ("base", 8), ("stable", 15)]
)
def test_no_expert_is_over_full(name, slots):
    # 30 tokens that all like expert 0 best: 1.25 * 30/4 -> 10, 2 * 30/4 -> 15, 30/4 -> 8.
    router = MAKERS[name](N).train()
    routing = route(router, torch.tensor([[3.0, 2, 1, 0]]).repeat(30, 1) + 0.1 * torch.randn(30, N))
    counts = torch.bincount(routing.experts[routing.experts >= 0], minlength=N)
    assert counts.max() == slots
