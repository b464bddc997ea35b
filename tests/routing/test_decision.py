"""What a `Routing` refuses: NaN, and infinite logits that a softmax cannot weigh."""

import pytest
import torch

from notebook_kit.routers import (
    BalancedAssignment,
    DenseToSparse,
    ExpertChoice,
    LossFreeBias,
    NoisyTopK,
    NullExperts,
    RandomRouter,
    TopK,
    TopP,
)

BY_SOFTMAX = {
    "top-k": lambda: TopK(1, 4),
    "top-p": lambda: TopP(1, 4),
    "null": lambda: NullExperts(1, 4, n_null=0, k=2),
    "choice": lambda: ExpertChoice(1, 4, k=1),
    "random": lambda: RandomRouter(1, 4, k=2),
    "noisy": lambda: NoisyTopK(1, 4).eval(),
    "dense to sparse": lambda: DenseToSparse(1, 4),
}
softmaxes = pytest.mark.parametrize("name", BY_SOFTMAX)


def logits(*rows):
    z = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    for row, values in rows:
        z[row] = torch.tensor(values)
    return z


@softmaxes
@pytest.mark.parametrize("bad", [[0.0, torch.inf, 0, 0], [-torch.inf] * 4])
def test_an_overflow_is_named_and_not_passed_on(name, bad):
    with pytest.raises(ValueError, match=r"probabilities \(of infinite logits\) hold NaN, first at token 3"):
        BY_SOFTMAX[name]().route(logits((3, bad)))


@softmaxes
def test_minus_infinity_forbids_an_expert(name):
    routing = BY_SOFTMAX[name]().route(logits((2, [0.5, -torch.inf, 0.2, 0.1])))
    assert torch.isfinite(routing.weights).all()
    assert 1 not in routing.experts[2].tolist() or routing.weights[2][routing.experts[2] == 1] == 0


@pytest.mark.parametrize("router", [lambda: LossFreeBias(1, 4), lambda: BalancedAssignment(1, 4).eval()])
def test_a_sigmoid_weighs_an_infinite_score_by_one(router):
    routing = router().route(logits((1, [0.0, torch.inf, 0, 0])))
    assert routing.experts[1, 0] == 1
    assert torch.isfinite(routing.weights).all()


@softmaxes
def test_nan_comes_first(name):
    with pytest.raises(ValueError, match="the router's logits hold NaN, first at token 4"):
        BY_SOFTMAX[name]().route(logits((1, [torch.inf, 0.0, 0, 0]), (4, [torch.nan, 0.0, 0, 0])))


def test_large_half_precision_logits_whose_sum_overflows_are_sound():
    routing = TopK(1, 4).route(torch.full((50, 4), 6e4, dtype=torch.float16))
    assert not torch.isfinite(routing.logits.sum())
    assert routing.weights.unique().tolist() == [0.5]
