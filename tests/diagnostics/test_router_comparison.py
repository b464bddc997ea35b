"""The byte model behind compare_routers: causal, the same beginning for every router, schedules told to routers."""

import pytest
import torch

from notebook_kit.diagnostics.byte_mixture import CONTEXT, ByteMixture
from notebook_kit.diagnostics.router_comparison import Size, _curve, make_router, train_router
from notebook_kit.routers import DenseToSparse, HashRouter, RandomRouter, StableMoE, StochasticExperts, TopK
from tests.untyped import untyped

IDS = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))
SMALL = Size(n_experts=4, d_model=16, d_ff=8, batch_size=2, length=8)


@torch.no_grad()
def test_the_model_sees_four_bytes_and_no_later_one():
    model = ByteMixture([TopK(16, 4)], d_ff=8).eval()
    before, changed = model(IDS), IDS.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 256
    differs = (model(changed) - before).abs().amax((0, 2)) > 0
    assert differs.tolist() == [5 <= place < 5 + CONTEXT for place in range(12)]


def test_models_begin_alike_whatever_the_router():
    one, two = (ByteMixture([router], d_ff=8, seed=3) for router in (TopK(16, 4), HashRouter(16, 4)))
    own = dict(two.named_parameters())
    assert all(torch.equal(value, own[name]) for name, value in one.named_parameters() if "router" not in name)
    other = ByteMixture([TopK(16, 4)], d_ff=8, seed=4)
    assert not torch.equal(one.write.weight, other.write.weight)


def test_routers_are_told_their_schedule():
    assert make_router(DenseToSparse, SMALL, 90, 0)[0].steps == 90
    assert make_router((DenseToSparse, {"steps": 7}), SMALL, 90, 0)[0].steps == 7
    assert make_router(StableMoE, SMALL, 90, 0)[0].distill_steps == 30
    (table,) = make_router((HashRouter, {"table": "balanced"}), SMALL, 90, 0)
    assert table.kind == "balanced"
    two = Size(n_experts=4, d_model=16, n_layers=2)
    first, second = make_router(HashRouter, two, 90, 0)
    assert not torch.equal(first.table, second.table)  # a lot of its own for each layer
    assert torch.equal(make_router(TopK, SMALL, 90, 0)[0].weight, make_router(TopK, SMALL, 90, 0)[0].weight)


@pytest.mark.parametrize("router", [DenseToSparse, RandomRouter, StochasticExperts])
def test_routers_with_ways_of_their_own_are_trained(router):
    run = train_router(router, size=SMALL, steps=4)
    assert 0 < run.figures["loss"] < 8
    assert run.curve[-1][0] == pytest.approx(1.0)


def test_what_is_no_router():
    with (
        untyped(),
        pytest.raises(ValueError, match=r"a class, \(class, settings\), a Router or a function, got 'TopK'"),
    ):
        make_router("TopK", SMALL, 9, 0)


def test_shares_of_the_budget_add_up():
    told = []
    run = train_router((TopK, {"k": 3}), size=SMALL, steps=6, advance=told.append)
    assert sum(told) == pytest.approx(1.0)
    assert len(told) == run.figures["steps"] < 6 + 1


def test_training_teaches():
    short, longer = (train_router(TopK, size=SMALL, steps=steps).figures["loss"] for steps in (1, 60))
    assert longer < short - 1


def test_a_curve_is_the_means_of_equal_parts():
    rows = [(0.01, 4.0, 1.0), (0.04, 2.0, 3.0), (0.5, 1.0, 0.0), (1.0, 0.5, 0.0)]
    assert _curve(rows) == [(0.05, 3.0, 2.0), (0.55, 1.0, 0.0), (1.0, 0.5, 0.0)]
