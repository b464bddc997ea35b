"""The diagonal Fisher: closed forms, the estimators against each other, and every kind of model and batch."""

import copy
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from notebook_kit.merging import diagonal_fisher, pulled_back
from notebook_kit.models import MLP, DigitEncoder, tiny_gpt2, tiny_llama, tiny_mixtral, tiny_t5, tiny_vit
from tests.untyped import untyped

X = torch.randn(12, 5, generator=torch.Generator().manual_seed(1))
Y = torch.arange(12) % 3
IDS = torch.randint(0, 256, (3, 6), generator=torch.Generator().manual_seed(2))
close = torch.testing.assert_close


def net(outputs=3):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, outputs))


def total(fisher):
    return sum(float(tensor.sum()) for tensor in fisher.values())


# ---------------------------------------------------------------- closed forms
def test_logistic_regression():
    class Logistic(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.linspace(-1, 1, 5))

        def forward(self, x):
            return torch.stack([torch.zeros(len(x)), x @ self.w], dim=-1)  # softmax of (0, w·x) is σ(w·x)

    model = Logistic()
    p = torch.sigmoid(X @ model.w.detach())
    expected = ((p * (1 - p))[:, None] * X.square()).mean(0)
    close(diagonal_fisher(model, [X])["w"], expected, rtol=1e-5, atol=1e-7)


def test_softmax_of_a_linear_layer():
    model = nn.Linear(5, 3)
    p = model(X).softmax(-1).detach()
    fisher = diagonal_fisher(model, [X])
    close(fisher["weight"], ((p * (1 - p)).T @ X.square()) / len(X), rtol=1e-5, atol=1e-7)
    close(fisher["bias"], (p * (1 - p)).mean(0), rtol=1e-5, atol=1e-7)


def test_regression_with_unit_variance():
    model = nn.Linear(5, 2)
    fisher = diagonal_fisher(model, [X], head="regression")
    close(fisher["weight"], X.square().mean(0).expand(2, -1))
    close(fisher["bias"], torch.ones(2))
    target = torch.randn(12, 2)
    empirical = diagonal_fisher(model, [(X, target)], head="regression", estimator="empirical")
    close(empirical["bias"], (target - model(X)).square().mean(0).detach())
    scalar = diagonal_fisher(nn.Linear(5, 1), [(X, torch.zeros(12))], head="regression", estimator="empirical")
    assert scalar["weight"].shape == (1, 5)


def test_empirical_is_the_mean_square_of_each_examples_own_gradient():
    model = net()
    rows = []
    for x, y in zip(X, Y, strict=True):
        rows.append(torch.autograd.grad(F.cross_entropy(model(x[None]), y[None]), list(model.parameters())))
    fisher = diagonal_fisher(model, [(X, Y)], estimator="empirical")
    for tensor, gradients in zip(fisher.values(), zip(*rows, strict=True), strict=True):
        close(tensor, torch.stack(gradients).square().mean(0), rtol=1e-5, atol=1e-8)


# ---------------------------------------------------------------- estimators and batches
@pytest.mark.parametrize("head", ["classes", "regression"])
def test_samples_reach_the_exact_fisher_within_three_standard_errors(head):
    model = net()
    exact = diagonal_fisher(model, [X], head=head)
    runs = [
        diagonal_fisher(model, [X], head=head, estimator="sampled", n_samples=40, seed=seed)["0.weight"]
        for seed in range(20)
    ]
    runs = torch.stack(runs)
    error = runs.std(0) / len(runs) ** 0.5
    inside = (runs.mean(0) - exact["0.weight"]).abs() <= 3 * error + 1e-9
    assert inside.float().mean() > 0.9
    assert abs(float(runs.mean() / exact["0.weight"].mean()) - 1) < 0.05


@pytest.mark.parametrize("estimator", ["exact", "empirical"])
def test_batch_size_order_and_pieces_change_nothing(estimator):
    model = net()
    whole = diagonal_fisher(model, [(X, Y)], estimator=estimator)
    parts = diagonal_fisher(model, [(X[8:], Y[8:]), (X[:3], Y[:3]), (X[3:8], Y[3:8])], estimator=estimator)
    singles = [diagonal_fisher(model, [(x[None], y[None])], estimator=estimator) for x, y in zip(X, Y, strict=True)]
    loop = diagonal_fisher(model, [(X, Y)], estimator=estimator, vectorized=False)
    for key, tensor in whole.items():
        for other in (parts[key], loop[key], torch.stack([single[key] for single in singles]).mean(0)):
            close(tensor, other, rtol=1e-5, atol=1e-8)


def test_a_small_budget_takes_many_pieces_and_gives_the_same():
    module, model = sys.modules["notebook_kit.merging.diagonal_fisher"], net()
    whole = diagonal_fisher(model, [X])
    with pytest.MonkeyPatch.context() as patch:
        for numbers in (1, 100):
            patch.setattr(module, "NUMBERS", numbers)
            for key, tensor in diagonal_fisher(model, [X]).items():
                close(tensor, whole[key], rtol=1e-5, atol=1e-8)


def test_the_squared_batch_gradient_is_something_else():
    model = net()
    loss = F.cross_entropy(model(X), Y)
    squared = torch.autograd.grad(loss, model[0].weight)[0].square()
    assert (diagonal_fisher(model, [(X, Y)], estimator="empirical")["0.weight"] > squared).float().mean() > 0.9


def test_a_head_of_its_own_and_labels_that_do_not_matter():
    model = DigitEncoder(6)
    x = torch.rand(4, 64)
    two = diagonal_fisher(model, [x], logits=lambda z: z[:, 2:4])
    assert list(two) == [name for name, _ in model.named_parameters()]
    assert total(two) > 0
    exact = [diagonal_fisher(model, [(x, y)], logits=lambda z: z[:, 2:4]) for y in (torch.zeros(4), torch.ones(4))]
    for other in exact:
        assert all(torch.equal(other[key], two[key]) for key in two)


def test_the_model_is_left_alone_and_dropout_is_off():
    model = nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.5), nn.BatchNorm1d(4), nn.Linear(4, 3))
    model[1].eval()
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    state = torch.get_rng_state()
    first, second = (diagonal_fisher(model, [X], estimator="sampled", seed=5) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_frozen_parameters_have_none_and_low_precision_gives_float32():
    model = net()
    model[0].requires_grad_(False)
    assert list(diagonal_fisher(model, [X])) == ["2.weight", "2.bias"]
    half = diagonal_fisher(net().bfloat16(), [X.bfloat16()])
    assert {tensor.dtype for tensor in half.values()} == {torch.float32}
    close(half["2.weight"], diagonal_fisher(net(), [X])["2.weight"], rtol=0.1, atol=0.01)
    assert diagonal_fisher(net().double(), [X.double()])["2.weight"].dtype == torch.float64


# ---------------------------------------------------------------- transformers
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(
    ("make", "batch"),
    [
        (tiny_llama, {"input_ids": IDS}),
        (tiny_gpt2, {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}),
        (tiny_mixtral, {"input_ids": IDS}),
        (tiny_t5, {"input_ids": IDS, "decoder_input_ids": IDS}),
        (tiny_vit, {"pixel_values": torch.rand(3, 1, 16, 16)}),
    ],
    ids=["llama", "gpt2", "mixtral", "t5", "vit"],
)
def test_real_architectures_side_by_side_and_in_turn(make, batch):
    model = make()
    fast = diagonal_fisher(model, [batch], estimator="sampled", seed=1)
    slow = diagonal_fisher(model, [batch], estimator="sampled", seed=1, vectorized=False)
    assert list(fast) == [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for key, tensor in fast.items():
        close(tensor, slow[key], rtol=1e-3, atol=1e-5)


def test_a_language_model_sums_over_positions():
    """Exact: every position and token alone. Sampled: all positions at once; equal on the mean."""
    model = tiny_llama(vocab_size=7, hidden_size=8, intermediate_size=8, num_hidden_layers=1)
    ids = torch.randint(0, 7, (2, 4), generator=torch.Generator().manual_seed(0))
    exact = diagonal_fisher(model, [{"input_ids": ids}])["lm_head.weight"]
    z = model(input_ids=ids).logits
    h = model.model(input_ids=ids).last_hidden_state
    p = z.softmax(-1)
    expected = torch.einsum("ntc,nth->ch", p * (1 - p), h.square()) / 2
    close(exact, expected.detach(), rtol=1e-4, atol=1e-6)
    sampled = diagonal_fisher(model, [{"input_ids": ids}], estimator="sampled", n_samples=500)["lm_head.weight"]
    assert abs(float(sampled.sum() / exact.sum()) - 1) < 0.1


def test_labels_of_a_causal_model_are_shifted_and_ignored_ones_are():
    model = tiny_llama(vocab_size=7, hidden_size=8, intermediate_size=8, num_hidden_layers=1)
    ids = torch.randint(0, 7, (2, 4), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, 1] = -100
    ours = diagonal_fisher(model, [{"input_ids": ids, "labels": labels}], estimator="empirical")["lm_head.weight"]
    rows = []
    for i in range(2):
        loss = F.cross_entropy(model(input_ids=ids[i : i + 1]).logits[0, [1, 2]], ids[i, [2, 3]], reduction="sum")
        rows.append(torch.autograd.grad(loss, model.lm_head.weight)[0].square())
    close(ours, torch.stack(rows).mean(0), rtol=1e-4, atol=1e-7)


def test_padding_does_not_count():
    model = tiny_llama()
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    padded = {"input_ids": IDS[:1], "attention_mask": mask}
    short = diagonal_fisher(model, [{"input_ids": IDS[:1, :4]}], logits=lambda out: out.logits[..., :3])
    long = diagonal_fisher(model, [padded], logits=lambda out: out.logits[..., :3], vectorized=False)
    close(long["model.norm.weight"], short["model.norm.weight"], rtol=1e-3, atol=1e-5)
    with pytest.raises(RuntimeError, match=r"call diagonal_fisher\(..., vectorized=False\)"):
        diagonal_fisher(model, [padded], estimator="sampled")


def test_a_tied_weight_has_its_fisher_under_both_names():
    model = tiny_gpt2()
    fisher = diagonal_fisher(model, [{"input_ids": IDS}], estimator="sampled")
    assert fisher["lm_head.weight"] is fisher["transformer.wte.weight"]
    assert total(fisher) > 0


# ---------------------------------------------------------------- what is refused
def test_what_cannot_be_measured_is_named():
    model = net()
    with pytest.raises(ValueError, match="batches hold no example"):
        diagonal_fisher(model, [])
    with pytest.raises(ValueError, match="the empirical Fisher needs labels"):
        diagonal_fisher(model, [X], estimator="empirical")
    with pytest.raises(ValueError, match=r"labels of shape \[12, 2\] do not fit outputs of shape \[12, 1, 3\]"):
        diagonal_fisher(model, [(X, torch.zeros(12, 2))], estimator="empirical")
    with pytest.raises(ValueError, match="labels must be under 3, the number of classes, got 3"):
        diagonal_fisher(model, [(X, Y + 1)], estimator="empirical")
    with pytest.raises(ValueError, match=r"n_samples must be in \[1, 1000\], got 0 \(diagonal_fisher\)"):
        diagonal_fisher(model, [X], n_samples=0)
    with pytest.raises(ValueError, match="estimator must be one of 'exact', 'sampled', 'empirical'"):
        diagonal_fisher(model, [X], estimator="true")
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        diagonal_fisher(net().requires_grad_(False), [X])
    with pytest.raises(ValueError, match=r"one example gave \[\]: say `logits`"):
        diagonal_fisher(model, [X], logits=lambda z: z.sum())
    with pytest.raises(ValueError, match="a batch must be a tensor, a pair"):
        diagonal_fisher(model, ["text"])
    with pytest.raises(ValueError, match="at least one tensor of inputs"):
        diagonal_fisher(model, [{"text": "a"}])
    with untyped(), pytest.raises(ValueError, match="one example gave tuple"):
        diagonal_fisher(model, [X], logits=lambda z: (z,))


def test_an_mlp_without_classes_is_run_as_it_is():
    assert set(diagonal_fisher(MLP([5, 4, 2]), [X])) == set(MLP([5, 4, 2]).state_dict())
    assert pulled_back.IGNORED == -100
