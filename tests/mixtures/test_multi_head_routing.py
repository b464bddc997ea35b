"""Skills mixed by task: hand-worked examples, identities, adaptation, folding."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from notebook_kit.adapters import CannotFold, attach, detach, fold
from notebook_kit.mixtures import (
    MultiHeadRouting,
    Polytropon,
    adapt_to_task,
    choose_tasks,
    folded,
    private_skills,
    share_router,
    task_weights,
)
from notebook_kit.models import MLP, tiny_gpt2, tiny_llama
from notebook_kit.training import fit

X = torch.linspace(-1, 1, 40).reshape(5, 8)


def net(kind=MultiHeadRouting, seed=0, **values):
    """A small net with skills of random B and Z, as if trained."""
    torch.manual_seed(seed)
    model = MLP([8, 16, 4]).eval()
    values = {"n_tasks": 3, "n_skills": 4, "rank": 2} | ({} if kind is Polytropon else {"n_splits": 4}) | values
    attach(model, kind, targets="layers", **values)
    for layer in model.layers:
        layer.B.data.normal_()
        layer.Z.data.normal_()
    return model


def own(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "host" not in name}


def test_a_fresh_adapter_changes_nothing():
    model = MLP([8, 16, 4])
    before = model(X)
    attach(model, MultiHeadRouting, targets="layers", n_tasks=3, n_skills=5, n_splits=2, rank=2)
    choose_tasks(model, torch.tensor([0, 1, 2, 0, 1]))
    assert torch.equal(model(X), before)
    assert all(layer.Z.abs().max() <= 1e-3 for layer in model.layers)
    assert all(layer.A.abs().max() <= (layer.in_features / 2) ** -0.5 for layer in model.layers)
    detach(model)
    assert torch.equal(model(X), before)


def test_worked_weights():
    layer = Polytropon(nn.Linear(1, 1, bias=False), n_tasks=2, n_skills=2, rank=1)
    layer.Z.data = torch.tensor([[[math.log(3), 0.0]], [[0.0, 0.0]]])
    torch.testing.assert_close(layer.eval().weights(torch.tensor([0, 1]))[:, 0], torch.tensor([[0.6, 0.4], [0.5, 0.5]]))
    # Factors are mixed, .6 · (.6 · 1 + .4 · 2) = .84, not products, .6 · 1 · 1 + .4 · 0 · 2 = .6
    layer.A.data, layer.B.data = (
        torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1),
        torch.tensor([1.0, 2.0]).reshape(1, 2, 1, 1),
    )
    layer.host.weight.data.zero_()
    layer.tasks = 0
    assert layer(torch.ones(1, 1)).item() == pytest.approx(0.84)


@settings(deadline=None, max_examples=25)
@given(heads=st.sampled_from([1, 2, 4]), skills=st.integers(1, 5), rank=st.integers(1, 4), seed=st.integers(0, 999))
def test_the_equation_example_by_example(heads, skills, rank, seed):
    torch.manual_seed(seed)
    layer = MultiHeadRouting(nn.Linear(8, 4), n_tasks=3, n_skills=skills, n_splits=heads, rank=rank).double().eval()
    layer.B.data.normal_()
    layer.Z.data.normal_(std=2)
    x, tasks = torch.randn(6, 8).double(), torch.tensor([0, 2, 1, 1, 0, 2])
    layer.tasks = tasks
    rows = []
    for row, t in zip(x, tasks.tolist(), strict=True):
        s = layer.Z[t].sigmoid()
        w = s / s.sum(-1, keepdim=True)
        assert w.sum(-1).allclose(torch.ones(heads).double())
        A = torch.cat([sum(w[q, i] * layer.A[q, i] for i in range(skills)) for q in range(heads)], 0)
        B = torch.cat([sum(w[q, i] * layer.B[q, i] for i in range(skills)) for q in range(heads)], 1)
        rows.append(layer.host(row) + row @ A @ B / rank)
    torch.testing.assert_close(layer(x), torch.stack(rows), atol=1e-6, rtol=1e-5)  # w is float32
    assert (
        sum(p.numel() for n, p in layer.named_parameters() if "host" not in n)
        == skills * rank * 12 + 3 * skills * heads
    )


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_one_skill_is_plain_lora(heads):
    layer = MultiHeadRouting(nn.Linear(8, 4), n_tasks=2, n_skills=1, n_splits=heads, rank=3).eval()
    layer.B.data.normal_()
    layer.tasks = 1
    A, B = layer.A.flatten(0, 2), layer.B[:, 0].transpose(0, 1).flatten(1)
    torch.testing.assert_close(layer(X), layer.host(X) + X @ A @ B / 3)


def test_permuting_skills_changes_nothing():
    model, order = net(), torch.tensor([2, 0, 3, 1])
    choose_tasks(model, torch.tensor([0, 1, 2, 0, 1]))
    before = model(X)
    for layer in model.layers:
        layer.A.data, layer.B.data, layer.Z.data = layer.A[:, order], layer.B[:, order], layer.Z[:, :, order]
    torch.testing.assert_close(model(X), before)


def test_tasks_of_a_batch_stay_apart():
    model = net()
    choose_tasks(model, torch.tensor([0, 1, 2, 0, 1]))
    mixed = model(X)
    for task in range(3):
        choose_tasks(model, task)
        rows = torch.tensor([0, 1, 2, 0, 1]) == task
        torch.testing.assert_close(mixed[rows], model(X)[rows])


@pytest.mark.parametrize(("build", "targets"), [(tiny_llama, r"(q|v)_proj$"), (tiny_gpt2, r"c_(attn|fc)$")])
def test_in_transformers(build, targets):
    model, ids = build(), torch.arange(24).reshape(2, 12)
    attach(model, MultiHeadRouting, targets=targets, n_tasks=2, n_splits=4, rank=2)
    for module in model.modules():
        if isinstance(module, MultiHeadRouting):
            module.B.data.normal_(std=0.1)
            module.Z.data.normal_()
    choose_tasks(model, torch.tensor([1, 0]))
    both = model(ids).logits
    choose_tasks(model, 1)
    torch.testing.assert_close(both[:1], model(ids[:1]).logits, atol=1e-5, rtol=1e-4)
    plain = fold(copy.deepcopy(model))
    torch.testing.assert_close(plain(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-4)


def test_folding_a_task_and_back():
    model = net()
    choose_tasks(model, 0)
    other = model(X)
    choose_tasks(model, 1)
    one, state = model(X), {k: v.clone() for k, v in model.state_dict().items()}
    choose_tasks(model, None)
    with folded(model, 1):
        torch.testing.assert_close(model(X), one, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(model(X), other, atol=1e-3)
        assert not torch.equal(model.layers[0].host.weight, state["layers.0.host.weight"])
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert model.layers[0].tasks is None
    with pytest.raises(CannotFold, match="choose one first"):
        fold(model)


def test_adaptation_z_trains_nothing_else():
    model, y = net(), torch.randn(5, 4)
    adapt_to_task(model, adaptation="z")
    before = own(model)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["layers.0.Z", "layers.1.Z"]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 4 * 4
    fit(model, lambda g: X, lambda m, x: (m(x) - y).square().mean(), steps=3, lr=0.1, progress=False)
    for name, tensor in own(model).items():
        assert torch.equal(tensor, before[name]) != name.endswith("Z")


@pytest.mark.parametrize("stochastic", [False, True])
def test_adaptation_full_and_mu(stochastic):
    model = net(stochastic=stochastic)
    full = adapt_to_task(copy.deepcopy(model), n_tasks=2)
    assert {n.rpartition(".")[2] for n, p in full.named_parameters() if p.requires_grad} == {"A", "B", "Z"}
    assert all(layer.Z.shape == (2, 4, 4) and not layer.Z.any() for layer in full.layers)
    with pytest.raises(ValueError, match="needs the task of each of 5 examples, none was chosen"):
        full(X)
    choose_tasks(full, 1)
    mu = adapt_to_task(copy.deepcopy(model), adaptation="mu")
    # A row of zeros is the uniform average, which mu keeps as one adapter.
    torch.testing.assert_close(mu(X), full(X))
    assert {n.rpartition(".")[2] for n, p in mu.named_parameters() if p.requires_grad} == {"A", "B"}
    assert mu.layers[0].A.shape == (4, 1, 2, 2)
    assert all(layer.A.shape[1] == 4 for layer in model.layers)


def test_shared_router_and_private_skills():
    model = share_router(net())
    assert model.layers[0].Z is model.layers[1].Z
    assert copy.deepcopy(model).layers[1].Z.shape == (3, 4, 4)
    adapted = adapt_to_task(copy.deepcopy(model), adaptation="z")
    assert adapted.layers[0].Z is adapted.layers[1].Z
    private = private_skills(net(n_tasks=4))
    for w in task_weights(private).values():
        torch.testing.assert_close(w, torch.eye(4)[:, None].expand(4, 4, 4))
    assert not private.layers[0].Z.requires_grad
    with pytest.raises(ValueError, match="n_skills = n_tasks, got 4 and 3"):
        private_skills(net())


def test_noise_only_in_training():
    model = net(Polytropon)
    choose_tasks(model, 0)
    assert torch.equal(model(X), model(X))
    model.train()
    assert not torch.equal(model(X), model(X))
    # One example, one sample: equal rows differ.
    rows = model(X[:1].expand(4, 8))
    assert len(rows.unique(dim=0)) == 4
    quiet = net().train()
    choose_tasks(quiet, 0)
    assert torch.equal(quiet(X), quiet(X))
    torch.manual_seed(0)
    layer = Polytropon(nn.Linear(2, 2), n_tasks=1, n_skills=2, rank=1).train()
    layer.Z.data = torch.tensor([[[2.0, 0.0]]])
    drawn = layer.weights(torch.zeros(4000, dtype=torch.long))[:, 0]
    assert drawn[:, 0].mean() > drawn[:, 1].mean() + 0.15


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    model = net().to(dtype)
    choose_tasks(model, torch.tensor([0, 1, 2, 0, 1]))
    half, full = model(X.to(dtype)), net()
    choose_tasks(full, torch.tensor([0, 1, 2, 0, 1]))
    assert half.dtype == dtype
    torch.testing.assert_close(half.float(), full(X), atol=0.1, rtol=0.1)


def test_an_empty_batch():
    model = net()
    choose_tasks(model, torch.zeros(0, dtype=torch.long))
    assert model(X[:0]).shape == (0, 4)


def test_bad_input():
    with pytest.raises(ValueError, match="n_splits must divide the host's 8 inputs and 4 outputs, got 3"):
        MultiHeadRouting(nn.Linear(8, 4), n_tasks=1, n_splits=3, rank=2)
    with pytest.raises(ValueError, match="n_tasks must be at least 1, got 0"):
        Polytropon(nn.Linear(8, 4), n_tasks=0, rank=2)
    with pytest.raises(ValueError, match="rank must be at most 4"):
        Polytropon(nn.Linear(8, 4), n_tasks=1, rank=5)
    with pytest.raises(ValueError, match=r"task ids must be in \[0, 2\], got 3"):
        choose_tasks(net(), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="mixes no skills"):
        choose_tasks(MLP([8, 4]), 0)
    with pytest.raises(ValueError, match="adaptation must be one of"):
        adapt_to_task(net(), adaptation="half")
    model = net()
    choose_tasks(model, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="needs the task of each of 5 examples, got 2"):
        model(X)
