"""MeteoRA: gates by hand, banks from models, tensors and folders, what is trained."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from notebook_kit.adapters import LoRA, adapter_weights, attach, fold, save_peft, trainable_parameters
from notebook_kit.mixtures import MeteoRA, aux_loss, sample_labels
from notebook_kit.mixtures.meteora import AdapterGate
from notebook_kit.models import MLP, tiny_llama
from tests.adapters.conftest import disturb

BASE = MLP([8, 12, 6]).eval()
Z = torch.tensor([[2.0, 1, 0]])


def adapted(seed, rank=2, alpha=3, targets="layers"):
    model = copy.deepcopy(BASE)
    attach(model, LoRA, targets=targets, rank=rank, alpha=alpha)
    disturb(model, std=0.5, seed=seed)
    return model


def embedded(bank, **values):
    model = copy.deepcopy(BASE)
    MeteoRA.embed(model, bank, **values)
    return model


def always(model, index):
    """Let every gate prefer one adapter, by far: its logit is a positive multiple of Σ x²."""
    for layer in model.modules():
        if isinstance(layer, MeteoRA):
            layer.router.logits = lambda x, n=layer.n_experts: 50 * F.one_hot(torch.full((len(x),), index), n).float()


def test_the_gate_by_hand():
    for temperature, expected in ((1, [0.7311, 0.2689]), (20, [0.5125, 0.4875]), (1e3, [0.5, 0.5])):
        routing = AdapterGate(4, 3, k=2, temperature=temperature).route(Z)
        assert routing.experts.tolist() == [[0, 1]]
        torch.testing.assert_close(routing.weights, torch.tensor([expected]), atol=1e-3, rtol=0)
    loss = AdapterGate(4, 3).route(Z, labels=torch.tensor([0])).aux_loss
    assert float(loss) == pytest.approx(0.4076, abs=1e-4)
    assert AdapterGate(4, 3, k=1).route(Z).weights.tolist() == [[1.0]]


def test_temperature_1_is_the_softmax_over_all_divided_by_the_sum_of_the_picked():
    z = torch.randn(20, 5)
    routing = AdapterGate(4, 5, k=3).route(z)
    p = z.softmax(1).gather(1, routing.experts)
    torch.testing.assert_close(routing.weights, p / p.sum(1, keepdim=True))


@pytest.mark.parametrize("i", [0, 1, 2])
def test_one_adapter_picked_everywhere_is_the_model_with_that_adapter(i):
    bank = {
        name: adapted(seed, rank, alpha)
        for seed, (name, rank, alpha) in enumerate([("a", 2, 3), ("b", 4, 1), ("c", 1, 8)])
    }
    model, x = embedded(bank, k=1), torch.randn(5, 8)
    always(model, i)
    torch.testing.assert_close(model(x), list(bank.values())[i](x), atol=1e-5, rtol=1e-5)
    assert model.layers[0].names == ("a", "b", "c")
    assert model.layers[0].rank == 4
    assert sum(trainable_parameters(model).parameters) == 3 * (8 + 12)  # L d_in for each gate


@pytest.mark.parametrize("k", [1, 2, 3])
def test_loop_and_bmm_agree_with_equal_and_other_scales(k):
    for alphas in ((4, 4, 4), (1, 4, 9)):
        model = embedded([adapted(i, alpha=alpha) for i, alpha in enumerate(alphas)], k=k)
        x, results = torch.randn(6, 8), []
        for dispatch in ("sorted", "gathered", "masked"):
            for layer in model.layers:
                layer.dispatch = dispatch
            results.append(model(x))
        torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(results[0], results[2], atol=1e-5, rtol=1e-5)


def test_every_source_of_adapters(tmp_path):
    source, x = adapted(3), torch.randn(4, 8)
    folder = save_peft(source, tmp_path / "adapter")
    tensors = adapter_weights(source)
    for bank in ([source], [folder], [(tensors, 1.5)], {"x": str(folder)}):
        model = embedded(bank, k=1)
        torch.testing.assert_close(model(x), source(x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model.layers[0].scaling, torch.tensor([1.5]))
        torch.testing.assert_close(fold(model)(x), source(x), atol=1e-5, rtol=1e-5)


def test_an_adapter_may_leave_a_layer_alone():
    model, x = embedded([adapted(0), adapted(1, targets=r"layers\.1")], k=1), torch.randn(4, 8)
    always(model, 1)
    torch.testing.assert_close(model.layers[0](x), BASE.layers[0](x))
    assert (model(x) - BASE(x)).abs().max() > 1e-3


def test_the_order_of_the_bank_is_the_order_of_the_gate():
    sources, x = [adapted(i) for i in range(3)], torch.randn(5, 8)
    model, other = embedded(sources), embedded(sources[::-1])
    for a, b in zip(model.layers, other.layers, strict=True):
        b.router.weight.data = a.router.weight.data.flip(0)
    torch.testing.assert_close(model(x), other(x), atol=1e-5, rtol=1e-5)


def test_only_the_gates_train_and_the_gate_loss_reaches_only_gates():
    model = embedded([adapted(0), adapted(1)], k=1).train()
    before = {key: t.clone() for key, t in model.state_dict().items()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    x, labels = torch.randn(40, 8), torch.arange(40) % 2
    x[labels == 1] += 2
    losses = []
    for _ in range(60):
        with sample_labels(model, labels):
            model(x)
        losses.append(aux_loss(model))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.3 * losses[0]
    changed = {key for key, t in model.state_dict().items() if not torch.equal(t, before[key])}
    assert changed == {"layers.0.router.weight", "layers.1.router.weight"}
    joint = embedded([adapted(0)], k=1, train_adapters=True)
    assert sum(trainable_parameters(joint).parameters) == 2 * (8 + 12) + 2 * (12 + 6) + 8 + 12


def test_the_gate_loss_is_the_mean_over_tokens_and_gates():
    model = embedded([adapted(i) for i in range(3)], gate_loss_coef=50)
    x, labels = torch.randn(2, 4, 8), torch.tensor([[0, 0, 1, -1], [2, 2, 2, 2]])  # a label for each token
    with sample_labels(model, labels):
        model(x)
    z = torch.cat([layer.routing.logits for layer in model.layers])
    expected = 50 * F.cross_entropy(z, labels.reshape(-1).repeat(2), ignore_index=-1)
    torch.testing.assert_close(aux_loss(model), expected)


def test_temperature_moves_weights_and_not_the_choice():
    model, x = embedded([adapted(i) for i in range(4)], k=3), torch.randn(6, 8)
    model(x)
    before = model.layers[0].routing
    model.layers[0].router.temperature = 30.0
    model(x)
    after = model.layers[0].routing
    assert torch.equal(before.experts, after.experts)
    assert after.weights.std() < before.weights.std()


def test_a_llama_with_seven_gates_a_block():
    model = tiny_llama()
    source = copy.deepcopy(model)
    attach(source, LoRA, targets=r"_proj$", rank=2)
    names = MeteoRA.embed(model, [source, source], k=2)
    assert len(names) == 7 * model.config.num_hidden_layers
    model(input_ids=torch.arange(8).reshape(1, 8))
    assert float(aux_loss(model)) == 0  # no labels, no gate loss


def test_what_does_not_fit():
    with pytest.raises(ValueError, match="the bank holds no adapter"):
        embedded([])
    with pytest.raises(ValueError, match="k must be at most n_experts=1, got 2"):
        embedded([adapted(0)])
    wide = MLP([8, 9, 6])
    attach(wide, LoRA, targets="layers", rank=2)
    for bad, match in [(wide, r"changes layers.0 by a \[9, 8\] matrix, the layer's is \[12, 8\]")]:
        model = copy.deepcopy(BASE)
        with pytest.raises(ValueError, match=match):
            MeteoRA.embed(model, [bad], k=1)
        assert type(model.layers[0]) is nn.Linear
    with pytest.raises(ValueError, match="the bank changes elsewhere, which MLP does not have"):
        embedded([({"elsewhere.A": torch.ones(1, 2), "elsewhere.B": torch.ones(2, 1)}, 1.0)], k=1)
    model = embedded([adapted(0), adapted(1)])
    with sample_labels(model, torch.tensor([5])), pytest.raises(ValueError, match=r"labels must be in \[-1, 1\], got"):
        model(torch.randn(1, 8))
