"""LoRAMoE: the localised balance, worked by hand and optimised alone; types from the batch."""

import pytest
import torch
from torch import nn

from notebook_kit.adapters import attach, detach
from notebook_kit.mixtures import LoRAMoE, aux_loss, localized_balance_loss, sample_labels
from notebook_kit.models import MLP
from notebook_kit.routers import cv_squared

Q, TYPES = torch.tensor([[4.0, 1, 3, 2], [1, 2, 3, 4]]), torch.tensor([1, 0])


@pytest.mark.parametrize(
    ("imbalance", "squared", "mean"), [(0, 0.228571, 0.571429), (0.1, 0.293953, 0.749580), (0.5, 0.727273, 2.0)]
)
def test_the_loss_by_hand_in_both_forms(imbalance, squared, mean):
    assert float(localized_balance_loss(Q, TYPES, imbalance=imbalance)) == pytest.approx(squared, abs=1e-5)
    paper = localized_balance_loss(Q, TYPES, imbalance=imbalance, form="var/mean")
    assert float(paper) == pytest.approx(mean, abs=1e-5)


def test_zero_is_where_the_load_is_inverse_to_the_factor():
    optimum = torch.tensor([[0.125, 0.125, 0.375, 0.375], [0.375, 0.375, 0.125, 0.125]])
    assert float(localized_balance_loss(optimum, TYPES, imbalance=0.5)) < 1e-12
    assert float(localized_balance_loss(optimum.flip(0), TYPES, imbalance=0.5, attract=True)) < 1e-12
    assert float(localized_balance_loss(optimum.flip(0), TYPES, imbalance=0.5)) > 0.1


def test_what_does_not_matter():
    base = localized_balance_loss(Q, TYPES, imbalance=0.3)
    for other in (
        localized_balance_loss(7 * Q, TYPES, imbalance=0.3),  # the length of the samples
        localized_balance_loss(Q.flip(0), TYPES.flip(0), imbalance=0.3),  # their order
        localized_balance_loss(Q[:, [1, 0, 3, 2]], TYPES, imbalance=0.3),  # the order inside a group
        localized_balance_loss(Q[:, [2, 3, 0, 1]], 1 - TYPES, imbalance=0.3),  # the names of groups and types
    ):
        torch.testing.assert_close(other, base)
    plain = localized_balance_loss(Q, TYPES, imbalance=0.0)
    torch.testing.assert_close(plain, localized_balance_loss(Q, 1 - TYPES, imbalance=0.0))
    torch.testing.assert_close(plain, cv_squared(Q.flatten()))


@pytest.mark.parametrize("attract", [False, True])
def test_optimised_alone_it_parts_the_groups(attract):
    z = torch.zeros(2, 4, requires_grad=True)
    optimizer = torch.optim.Adam([z], lr=0.05)
    for _ in range(500):
        loss = localized_balance_loss(z.softmax(1), TYPES, imbalance=0.5, attract=attract)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    share = z.detach().softmax(1)[:, :2].sum(1)  # of group 1, for type 1 and type 0
    expected = torch.tensor([0.75, 0.25] if attract else [0.25, 0.75])
    torch.testing.assert_close(share, expected, atol=1e-4, rtol=0)
    assert loss.item() < 1e-9
    own, other = sorted(share.tolist())
    assert own / other == pytest.approx((1 - 0.5) / (1 + 0.5), abs=1e-3)


def test_the_layer_sums_over_the_tokens_of_a_sample():
    layer = LoRAMoE(nn.Linear(6, 5), n_experts=4, rank=2, balance_coef=0.3, imbalance=0.5).train()
    x, types = torch.randn(3, 5, 6), torch.tensor([1, 0, 1])
    with sample_labels(layer, types):
        layer(x)
    p = (x @ layer.router.weight.T).softmax(-1)
    expected = 0.3 * localized_balance_loss(p.sum(1), types, imbalance=0.5)
    torch.testing.assert_close(layer.routing.aux_loss, expected)
    torch.testing.assert_close(layer.routing.weights.sum(1), torch.ones(15))
    layer.routing.aux_loss.backward()
    assert layer.router.weight.grad.any()
    assert layer.A.grad is None


def test_one_type_is_a_valid_batch_and_no_type_is_not():
    model = MLP([6, 8, 5])
    attach(model, LoRAMoE, targets="layers", n_experts=2, rank=2)
    model.train()
    with sample_labels(model, torch.ones(4).long()):
        model(torch.randn(4, 6))
    assert torch.isfinite(aux_loss(model))
    with pytest.raises(ValueError, match="needs the type of each sample"):
        model(torch.randn(4, 6))
    with (
        pytest.raises(ValueError, match=r"types must be 0 or 1, got \[0, 2\]"),
        sample_labels(model, torch.tensor([0, 2])),
    ):
        model(torch.randn(2, 6))
    model.eval()
    model(torch.randn(4, 6))
    assert float(aux_loss(model)) == 0
    detach(model)


def test_without_the_loss_no_types_are_needed():
    layer = LoRAMoE(nn.Linear(6, 5), n_experts=2, rank=2, balance_coef=0.0).train()
    assert layer(torch.randn(2, 6)).shape == (2, 5)


@pytest.mark.parametrize("call", [lambda: LoRAMoE(nn.Linear(4, 4), n_experts=3, rank=2)])
def test_an_odd_number_has_no_two_groups(call):
    with pytest.raises(ValueError, match="even"):
        call()
    with pytest.raises(ValueError, match="even number of experts, got 3"):
        localized_balance_loss(torch.ones(1, 3), torch.ones(1).long())
    assert float(localized_balance_loss(torch.ones(2, 1), TYPES)) == 0
