"""The bias: picks but does not weigh, moves against the load, lives outside autograd and inside the state dict."""

import pytest
import torch

from notebook_kit.routers import LossFreeBias, TopK

S = torch.tensor([[0.9, 0.8, 0.3, 0.2]])


def test_the_bias_picks_and_the_scores_weigh():
    router = LossFreeBias(1, 4)
    router.bias.copy_(torch.tensor([-0.2, -0.2, 0.0, 0.5]))
    routing = router.route(S.logit())
    assert routing.experts.tolist() == [[0, 3]]
    torch.testing.assert_close(routing.weights, torch.tensor([[0.9 / 1.1, 0.2 / 1.1]]))
    router.bias += 3
    assert router.route(S.logit()).experts.sort().values.tolist() == [[0, 3]]
    scaled = LossFreeBias(1, 4, routed_scaling_factor=2.5).route(S.logit())
    torch.testing.assert_close(scaled.weights.sum(), torch.tensor(2.5))


def test_without_bias_softmax_scores_are_the_plain_router():
    z = torch.randn(30, 6)
    ours, plain = LossFreeBias(1, 6, k=3, scores="softmax").route(z), TopK(1, 6, k=3).route(z)
    assert torch.equal(ours.experts, plain.experts)
    torch.testing.assert_close(ours.weights, plain.weights)


def test_one_update_by_hand():
    router = LossFreeBias(1, 4, bias_rate=0.001)
    router.counts.copy_(torch.tensor([5.0, 3, 2, 2]))
    router.update_bias()
    torch.testing.assert_close(router.bias, torch.tensor([-0.001, 0, 0.001, 0.001]))
    assert router.counts.tolist() == [0] * 4


def test_it_moves_in_training_only_and_only_between_calls():
    router, x = LossFreeBias(8, 4, bias_rate=0.1), torch.randn(50, 8) + 1
    router.eval()(x)
    assert router.bias.tolist() == [0] * 4
    first = router.train()(x)
    assert torch.equal(first.experts, LossFreeBias(8, 4).eval().route(first.logits).experts)  # decided before it moved
    counts = first.load * 100
    torch.testing.assert_close(router.bias, 0.1 * (25 - counts).sign())
    router.route(first.logits)
    torch.testing.assert_close(router.bias, 0.1 * (25 - counts).sign())  # `route` is pure


def test_accumulated_batches_count_together():
    router, x = LossFreeBias(8, 4, automatic=False).train(), torch.randn(50, 8)
    total = sum(router(part).load * 2 * len(part) for part in (x[:20], x[20:]))
    assert router.bias.tolist() == [0] * 4
    torch.testing.assert_close(router.counts, total)
    router.update_bias()
    torch.testing.assert_close(router.bias, 0.001 * (25 - total).sign())


def test_it_evens_the_load_of_a_skewed_router():
    torch.manual_seed(0)
    router, z = LossFreeBias(1, 8, bias_rate=0.02), torch.randn(2000, 8) + torch.linspace(-1, 1, 8)
    before = router.route(z).load
    for _ in range(200):
        router.counts += torch.bincount(router.route(z).experts.reshape(-1), minlength=8)
        router.update_bias()
    after = router.route(z).load
    assert before.max() * 8 > 1.7
    assert after.max() * 8 < 1.1


def test_no_gradient_reaches_the_bias_and_it_is_saved():
    router = LossFreeBias(8, 4)
    routing = router(torch.randn(20, 8))
    routing.weights[:, 0].sum().backward()
    assert router.weight.grad.abs().sum() > 0
    assert not router.bias.requires_grad
    assert [name for name, _ in router.named_parameters()] == ["weight"]
    assert list(router.state_dict()) == ["weight", "bias"]


def test_groups_limit_the_choice():
    # Groups (0,1) (2,3) (4,5): sums of the two best .9+.1, .6+.6, .5+.4; one group kept: (2,3).
    s = torch.tensor([[0.9, 0.1, 0.6, 0.61, 0.5, 0.4]])
    assert LossFreeBias(1, 6, n_group=3, topk_group=1).route(s.logit()).experts.tolist() == [[3, 2]]
    assert LossFreeBias(1, 6, n_group=3, topk_group=2).route(s.logit()).experts.tolist() == [[0, 3]]
    assert LossFreeBias(1, 6, n_group=3, topk_group=3).route(s.logit()).experts.tolist() == [[0, 3]]
    assert LossFreeBias(1, 6, n_group=6, topk_group=2).route(s.logit()).experts.tolist() == [[0, 3]]


def test_a_sigmoid_gate_has_no_competition():
    z = torch.randn(5, 4)
    raised = z.clone()
    raised[:, 0] += 3
    gate = LossFreeBias(1, 4, k=4, normalize=False, bias_rate=0.0)
    torch.testing.assert_close(gate.route(z).probs[:, 1:], gate.route(raised).probs[:, 1:])
    one = LossFreeBias(1, 4, k=1, normalize=False, bias_rate=0.0).route(z)
    torch.testing.assert_close(one.weights, z.amax(1, keepdim=True).sigmoid())


def test_the_optional_loss_is_one_when_even():
    z = 8 * torch.eye(4).repeat(2, 1) + 8 * torch.eye(4)[:, [1, 2, 3, 0]].repeat(2, 1)
    loss = LossFreeBias(1, 4, balance_coef=1.0).route(z).aux_loss
    assert loss.item() == pytest.approx(1.0, abs=1e-6)
    assert LossFreeBias(1, 4).route(z).aux_loss == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_bias_stays_float32(dtype):
    router = LossFreeBias(8, 4, bias_rate=1e-3)
    router.bias.fill_(0.5003)
    router.to(dtype)
    assert router.bias.dtype == router.counts.dtype == torch.float32
    assert router.bias[0].item() == pytest.approx(0.5003)
    router(torch.randn(20, 8, dtype=dtype) + 1)
    assert router.bias.unique().numel() > 1


def test_padding_is_not_counted():
    router, x = LossFreeBias(8, 4, automatic=False), torch.randn(20, 8)
    router(x, mask=torch.arange(20) < 7)
    assert router.counts.sum() == 14


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"k": 7}, "k must be at most n_experts=6, got 7"),
        ({"n_group": 4}, "n_group=4 must divide n_experts=6"),
        ({"n_group": 2, "topk_group": 3}, "topk_group=3 of the groups"),
        ({"n_group": 3, "topk_group": 1, "k": 3}, "must hold k=3 experts"),
        ({"k": 1}, "no gradient"),
        ({"bias_rate": -1.0}, "bias_rate must be in"),
        ({"scores": "tanh"}, "scores must be one of"),
    ],
)
def test_bad_hyperparameters(arguments, text):
    with pytest.raises(ValueError, match=text):
        LossFreeBias(8, 6, **arguments)
