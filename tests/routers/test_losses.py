"""The losses by hand."""

import math

import pytest
import torch

from notebook_kit.routers import cv_squared, load_balancing_loss, z_loss

P = torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.5, 0.1, 0.4]])


def test_balance_loss_by_hand():
    first = P.argmax(1, keepdim=True)
    assert load_balancing_loss(P, first).item() == pytest.approx(1.33125)
    assert load_balancing_loss(P, P.topk(2, dim=1).indices).item() == pytest.approx(2.08125)


@pytest.mark.parametrize("k", [1, 2])
def test_even_load_costs_k(k):
    probs = torch.full((4, 4), 0.25)
    experts = (torch.arange(4)[:, None] + torch.arange(k)) % 4
    assert load_balancing_loss(probs, experts).item() == pytest.approx(k)


def test_z_loss_by_hand():
    z = torch.tensor([[0.0, 0, 0], [math.log(2), 0, 0]])
    assert z_loss(z).item() == pytest.approx(1.5644, abs=1e-4)
    assert z_loss(z + 1).item() == pytest.approx(5.0493, abs=1e-4)


def test_cv_squared():
    assert cv_squared(torch.tensor([2.0, 2.0, 2.0])).item() == 0
    assert cv_squared(torch.tensor([1.0, 3.0])).item() == pytest.approx(2 / 4)
    assert cv_squared(torch.tensor([5.0])).item() == 0
    assert cv_squared(torch.zeros(3)).item() == 0


def test_padding_counts_nowhere():
    mask = torch.tensor([True, True, False, False])
    first = P.argmax(1, keepdim=True)
    torch.testing.assert_close(load_balancing_loss(P, first, mask=mask), load_balancing_loss(P[:2], first[:2]))
    torch.testing.assert_close(z_loss(P, mask=mask), z_loss(P[:2]))
    assert z_loss(P[:0]).item() == load_balancing_loss(P[:0], first[:0]).item() == 0
