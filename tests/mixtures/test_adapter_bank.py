"""Banks of LoRAs behind Phatgoose, Arrow and Glider: the shared rules, worked votes, gates trained alone."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from notebook_kit.adapters import LoRA, adapter_on, attach, detach, merge_adapters, read_adapter, save_peft
from notebook_kit.mixtures import (
    Arrow,
    Glider,
    Phatgoose,
    arrow_prototypes,
    attach_bank,
    character_ngrams,
    global_scale,
    phatgoose_gates,
    sample_labels,
    stack_prototypes,
)
from notebook_kit.mixtures.adapter_bank import BankRouter
from notebook_kit.models import MLP, tiny_llama
from notebook_kit.routers import record_routing, reroute
from notebook_kit.routing import Routing

ROUTERS = {"phatgoose": Phatgoose, "arrow": Arrow}
router = pytest.mark.parametrize("kind", ROUTERS.values(), ids=ROUTERS)
X = torch.linspace(-1, 1, 48).reshape(6, 8).sin()
E = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
Q = torch.tensor([0.8, 0.6])


class Scripted(BankRouter):
    """Gives the same local logits to each token."""

    def __init__(self, d_model, n_experts, z, **values):
        super().__init__(d_model, n_experts, **values)
        self.z = z

    def local(self, x):
        return self.z.expand(len(x), -1)


def library(n=3, seed=0, rank=2, layers=((8, 16), (16, 4))):
    generator = torch.Generator().manual_seed(seed)
    result = []
    for _ in range(n):
        tensors = {}
        for i, (d_in, d_out) in enumerate(layers):
            tensors[f"layers.{i}.A"] = torch.randn(rank, d_in, generator=generator)
            tensors[f"layers.{i}.B"] = torch.randn(d_out, rank, generator=generator)
        result.append((tensors, 0.5))
    return result


def base():
    torch.manual_seed(0)
    return MLP([8, 16, 4]).eval()


def gates(n=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        {"layers.0": torch.randn(8, generator=generator), "layers.1": torch.randn(16, generator=generator)}
        for _ in range(n)
    ]


def with_expert(model, expert):
    copied = copy.deepcopy(model)
    copied.load_state_dict(adapter_on(model.state_dict(), expert))
    return copied


# ---------------------------------------------------------------- routers
@router
@pytest.mark.parametrize("n_tokens", [0, 1, 9])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_shape_and_weights(kind, n_tokens, k):
    routing = kind(8, 5, k=k)(torch.randn(n_tokens, 8))
    assert routing.experts.shape == routing.weights.shape == (n_tokens, k)
    assert routing.weights.dtype == torch.float32
    torch.testing.assert_close(routing.weights.sum(1), torch.ones(n_tokens), atol=2e-5, rtol=0)
    assert routing.aux_loss == 0
    single = kind(8, 1, k=1)(torch.randn(n_tokens, 8))
    torch.testing.assert_close(single.weights, torch.ones(n_tokens, 1), atol=2e-6, rtol=0)


@router
def test_ties_mask_nan_and_half(kind):
    ours = kind(8, 5, k=2)
    assert ours.route(torch.zeros(3, 5)).experts.tolist() == [[0, 1]] * 3
    mask = torch.tensor([True, False, True])
    routing = ours.route(torch.randn(3, 5), mask=mask)
    assert routing.experts[1].tolist() == [-1, -1]
    assert routing.weights[1].tolist() == [0, 0]
    with pytest.raises(ValueError, match="NaN, first at token 1"):
        ours(torch.stack([torch.ones(8), torch.full((8,), torch.nan)]))
    for dtype in (torch.float16, torch.bfloat16):
        assert ours(torch.randn(4, 8).to(dtype)).weights.dtype == torch.float32
        assert ours.to(dtype)(torch.randn(4, 8).to(dtype)).weights.dtype == torch.float32
    with pytest.raises(ValueError, match="k must be at most n_experts=5, got 6"):
        kind(8, 5, k=6)


@router
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 999), top_p=st.sampled_from([1.0, 0.5, 0.9]))
def test_experts_have_no_order(kind, seed, top_p):
    torch.manual_seed(seed)
    one, x, order = kind(8, 5, k=2, top_p=top_p), torch.randn(7, 8), torch.randperm(5)
    other = kind(8, 5, k=2, top_p=top_p)
    other.weight.data = one.weight[order].detach()
    a, b = one(x), other(x)
    assert torch.equal(a.experts, torch.where(b.experts >= 0, order[b.experts.clamp_min(0)], -1))
    torch.testing.assert_close(a.weights, b.weights)


def test_top_p_takes_the_smallest_set():
    z = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.97, 0.01, 0.01, 0.01]]).log()
    routing = Phatgoose(8, 4, top_p=0.75).route(z)
    assert (routing.experts >= 0).sum(1).tolist() == [2, 1]
    torch.testing.assert_close(routing.weights[0, :2], torch.tensor([0.625, 0.375]), atol=1e-5, rtol=0)


def test_a_gradient_reaches_the_gate_and_the_token():
    x = torch.randn(5, 8, requires_grad=True)
    ours = Phatgoose(8, 4, k=2)
    ours(x).weights[:, 0].sum().backward()
    assert ours.weight.grad.any()
    assert x.grad.any()


@settings(deadline=None, max_examples=20)
@given(a=st.floats(0.5, 20), b=st.floats(-5, 5), c=st.floats(0.5, 20), d=st.floats(-5, 5), seed=st.integers(0, 99))
def test_phatgoose_ignores_scale_and_shift(a, b, c, d, seed):
    torch.manual_seed(seed)
    ours, u = Phatgoose(16, 4), torch.randn(6, 16)
    ours.weight.data.normal_()
    before = ours.logits(u)
    ours.weight.data = c * ours.weight.data + d
    torch.testing.assert_close(ours.logits(a * u + b), before, atol=2e-3, rtol=1e-3)  # up to the LN's epsilon
    assert before.abs().max() <= 4 + 1e-4  # √d_in


def test_a_gate_that_never_trained_says_nothing():
    ours = Phatgoose(8, 3)
    ours.weight.data.zero_()
    assert not ours.logits(torch.randn(4, 8)).any()


def test_arrow_points_along_the_first_singular_vector():
    (expert, *_), layers = library(), ("layers.0", "layers.1")
    v = arrow_prototypes(expert)
    for name in layers:
        delta = 0.5 * expert[0][f"{name}.B"] @ expert[0][f"{name}.A"]
        torch.testing.assert_close(v[name].norm(), torch.tensor(1.0))
        torch.testing.assert_close((delta @ v[name]).norm(), torch.linalg.matrix_norm(delta, 2), rtol=1e-4, atol=1e-4)
    ours = Arrow(8, 1, k=1, temperature=10)
    ours.weight.data = v["layers.0"][None]
    torch.testing.assert_close(ours.logits(X), ours.logits(-X))
    torch.testing.assert_close(ours.logits(X), (X @ v["layers.0"]).abs()[:, None] / 10)
    zero = ({"layers.0.A": torch.randn(2, 8), "layers.0.B": torch.zeros(16, 2)}, 1.0)
    assert not arrow_prototypes(zero)["layers.0"].any()


# ---------------------------------------------------------------- the bank
@settings(deadline=None, max_examples=15)
@given(n=st.integers(1, 6), k=st.integers(1, 3), seed=st.integers(0, 99))
def test_the_sum_token_by_token(n, k, seed):
    model, bank, k = MLP([8, 4]).eval(), library(n, seed, layers=((8, 4),)), min(k, n)
    host = copy.deepcopy(model)
    (layer,) = attach_bank(model, bank, lambda d: Phatgoose(d, n, k=k)).values()
    y = model(X)
    for row, out, w, experts in zip(X, y, layer.routing.weights, layer.routing.experts.tolist(), strict=True):
        total = host(row)
        for weight, i in zip(w, experts, strict=True):
            tensors, scale = bank[i]
            total = total + weight * scale * tensors["layers.0.B"] @ tensors["layers.0.A"] @ row
        torch.testing.assert_close(out, total, atol=1e-4, rtol=1e-4)
    assert not any(p.requires_grad for p in model.parameters())
    detach(model)
    assert all(torch.equal(v, host.state_dict()[key]) for key, v in model.state_dict().items())


def test_even_weights_are_the_merged_average():
    model, bank = base(), library()
    merged = merge_adapters(bank, [1 / 3] * 3).on(model.state_dict())
    plain = copy.deepcopy(model)
    plain.load_state_dict(merged)
    attach_bank(model, bank, lambda d: Scripted(d, 3, torch.zeros(3), k=3))
    torch.testing.assert_close(model(X), plain(X), atol=1e-4, rtol=1e-4)


def test_different_ranks_scales_and_layers(tmp_path):
    model, folders = base(), []
    for i, (rank, targets) in enumerate([(1, "layers.0"), (3, "layers"), (2, "layers.1")]):
        lora = copy.deepcopy(model)
        attach(lora, LoRA, targets=targets, rank=rank, alpha=5, seed=i)
        for module in lora.modules():
            if isinstance(module, LoRA):
                module.B.data.normal_()
        folders.append(save_peft(lora, tmp_path / str(i)))
    for i, folder in enumerate(folders):
        one = torch.full((3,), -1e4)
        one[i] = 0.0
        mixed = copy.deepcopy(model)
        layers = attach_bank(mixed, folders, lambda d, one=one: Scripted(d, 3, one, k=2))
        torch.testing.assert_close(mixed(X), with_expert(model, folder)(X), atol=1e-5, rtol=1e-5)
    assert layers["layers.0"].scaling.tolist() == pytest.approx([5, 5 / 3, 1])


def test_a_bank_says_what_does_not_fit():
    with pytest.raises(ValueError, match="needs at least one expert"):
        attach_bank(base(), [], lambda d: Phatgoose(d, 1, k=1))
    with pytest.raises(TypeError, match="must be a sequence of adapters"):
        attach_bank(base(), "a_folder", lambda d: Phatgoose(d, 1, k=1))
    with pytest.raises(ValueError, match=r"changes layers\.0 by a"):
        attach_bank(MLP([9, 16, 4]), library(), lambda d: Phatgoose(d, 3))
    with pytest.raises(ValueError, match=r"no prototypes for layers.1, only for layers.0"):
        attach_bank(base(), library(), lambda d: Phatgoose(d, 3), prototypes={"layers.0": torch.zeros(3, 8)})
    model = base()
    attach_bank(model, library(), lambda d: Phatgoose(d, 3))
    with pytest.raises(ValueError, match=r"adapter"):
        attach_bank(model, library(), lambda d: Phatgoose(d, 3))


# ---------------------------------------------------------------- gates
def draw(generator):
    return torch.randn(16, 8, generator=generator)


def towards(expert):
    target = with_expert(base(), expert)
    return lambda model, x: (model(x) - target(x).detach()).square().mean()


def test_gates_are_trained_alone_and_touch_nothing():
    model, bank = base(), library()
    before = {key: v.clone() for key, v in model.state_dict().items()}
    tensors = [{key: v.clone() for key, v in part.items()} for part, _ in bank]
    forth = [phatgoose_gates(model, e, draw, towards(e), steps=4) for e in bank]
    back = [phatgoose_gates(model, e, draw, towards(e), steps=4) for e in reversed(bank)][::-1]
    for a, b in zip(forth, back, strict=True):
        assert all(torch.equal(a[name], b[name]) and bool(a[name].any()) for name in ("layers.0", "layers.1"))
    assert all(torch.equal(v, before[key]) for key, v in model.state_dict().items())
    assert all(
        torch.equal(v, copies[key]) for (part, _), copies in zip(bank, tensors, strict=True) for key, v in part.items()
    )


def test_an_untrained_gate_halves_its_expert():
    from notebook_kit.mixtures.phatgoose import GatedExpert

    model, (tensors, scale) = MLP([8, 4]), library(1, layers=((8, 4),))[0]
    gated = GatedExpert(model.layers[0], scale * tensors["layers.0.B"], tensors["layers.0.A"])
    half = model(X) + 0.5 * scale * X @ tensors["layers.0.A"].T @ tensors["layers.0.B"].T
    torch.testing.assert_close(gated(X), half)
    assert [n for n, p in gated.named_parameters() if "host" not in n] == ["v"]


def test_a_gate_opens_where_its_expert_helps():
    """The expert is right for tokens along one direction and wrong against it."""
    model, expert = MLP([8, 4]), library(1, layers=((8, 4),))[0]
    plain, good = copy.deepcopy(model), with_expert(model, expert)

    def loss(net, x):
        wanted = torch.where(x[:, :1] > 0, good(x), plain(x))
        return (net(x) - wanted.detach()).square().mean()

    v = phatgoose_gates(model, expert, draw, loss, steps=150, lr=0.1)["layers.0"]
    assert v.abs().argmax() == 0
    assert v[0] > 1


# ---------------------------------------------------------------- Glider
def test_worked_votes():
    """Local scores (.5, 1, 0), c = (.8, .6, .96): a = 3 leaves expert 0 ahead by .02, a = 100 makes it expert 2."""
    z = torch.tensor([0.5, 1.0, 0.0])
    ours = Scripted(8, 3, z, k=1)
    c = F.normalize(E, dim=1) @ Q
    torch.testing.assert_close(c, torch.tensor([0.8, 0.6, 0.96]))
    ours.vote = 3 * c
    torch.testing.assert_close(ours.logits(X), torch.tensor([2.9, 2.8, 2.88]).expand(6, 3))
    assert ours(X).experts.unique().tolist() == [0]
    ours.vote = 100 * c
    routing = ours(X)
    assert routing.experts.unique().tolist() == [2]
    assert routing.probs[:, :2].max() < 2e-7
    ours.vote = 3 * c + 7
    torch.testing.assert_close(ours(X).probs, torch.tensor([2.9, 2.8, 2.88]).softmax(0).expand(6, 3))


def test_the_rule_of_the_scale():
    c = torch.tensor([[0.81, 0.2], [0.79, 0.2], [0.8, 0.8]])
    assert global_scale(c).tolist() == [103, 3, 3]
    glider = Glider(base(), library(), E, gates=gates())
    assert glider.scale(glider.ask(Q)).item() == 103  # .96 is above .8
    assert Glider(base(), library(), E, gates=gates(), weight=7.0).scale(c).tolist() == [7, 7, 7]


@pytest.mark.parametrize("local", ["phatgoose", "arrow"])
def test_no_weight_is_the_local_router_bit_for_bit(local):
    glider = Glider(base(), library(), E, gates=gates(), local=local, weight=0.0)
    voted = glider(X, query=Q)
    glider.ask(None)
    assert torch.equal(voted, glider(X))
    rows = gates() if local == "phatgoose" else [arrow_prototypes(e) for e in library()]
    model, kind = base(), ROUTERS[local]
    attach_bank(model, library(), lambda d: kind(d, 3), prototypes=stack_prototypes(rows))
    assert torch.equal(voted, model(X))


def test_a_large_weight_lets_the_vote_decide_everywhere():
    glider = Glider(base(), library(), E, gates=gates(), weight=10_000.0, k=1)
    torch.testing.assert_close(glider(X, query=Q), with_expert(base(), library()[2])(X), atol=1e-4, rtol=1e-4)
    for layer in glider.layers.values():
        assert layer.routing.experts.unique().tolist() == [2]
    two = Glider(base(), library(), E, gates=gates(), weight=10_000.0)
    two(X, query=Q)
    assert all(layer.routing.experts.tolist() == [[2, 0]] * 6 for layer in two.layers.values())


def test_a_far_expert_changes_nothing_under_a_large_weight():
    far = torch.cat([E, -Q[None]])
    small = Glider(base(), library(), E, gates=gates(), weight=100.0)
    large = Glider(base(), library(4), far, gates=gates(4), weight=100.0)
    torch.testing.assert_close(small(X, query=Q), large(X, query=Q), atol=1e-5, rtol=1e-5)


def test_each_sequence_may_have_its_query():
    model = tiny_llama()
    attach(model, LoRA, targets="(q|up)_proj", rank=2)
    experts = []
    for seed in range(3):
        torch.manual_seed(seed)
        for module in model.modules():
            if isinstance(module, LoRA):
                module.B.data.normal_()
        experts.append(read_adapter(model))
    detach(model)
    ids, queries = torch.arange(24).reshape(2, 12), E[:2]
    glider = Glider(model, experts, E, local="arrow", weight=50.0, k=2)
    both = glider(ids, query=queries).logits
    for i in range(2):
        alone = glider(ids[i : i + 1], query=queries[i]).logits
        torch.testing.assert_close(both[i : i + 1], alone, atol=1e-4, rtol=1e-4)
    assert glider.similarity.shape == (3,)
    with sample_labels(glider, mask=torch.tensor([[True] * 10 + [False] * 2])):
        glider(ids[:1])
    layer = next(iter(glider.layers.values()))
    assert (layer.routing.experts[-2:] == -1).all()
    with record_routing(glider.model) as trace:
        glider(ids[:1])
    assert len(trace.layers) == len(glider.layers)
    assert isinstance(reroute(trace, Phatgoose, layer=0, k=1), Routing)


def test_texts_are_embedded_by_what_is_given():
    tasks = ["name the digit, rotated by a quarter turn", "name the digit, mirrored", "name the digit, shifted"]
    glider = Glider(base(), library(), tasks, gates=gates(), k=1)
    assert glider.ask("a digit that is rotated").argmax() == 0
    assert glider.ask("digits shifted to the right").argmax() == 2
    assert glider.ask(tasks[1])[1].item() == pytest.approx(1)
    c = glider.ask(["mirrored", "shifted"])
    assert c.shape == (2, 3)

    def lengths(texts):
        return torch.tensor([[len(t), 1.0] for t in texts])

    ours = Glider(base(), library(), tasks, gates=gates(), embed=lengths)
    assert ours.tasks[:, 0].tolist() == [len(t) for t in tasks]
    rows = character_ngrams(["a cat", "A  Cat", ""])
    torch.testing.assert_close(rows[0], rows[1])
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(3))


def test_glider_copies_its_model_and_can_be_copied():
    model = base()
    before = model(X)
    glider = Glider(model, library(), E, gates=gates())
    assert torch.equal(model(X), before)
    twin = copy.deepcopy(glider)
    assert next(iter(twin.layers.values())) is twin.model.layers[0]
    twin.ask(Q)
    assert next(iter(glider.layers.values())).router.vote is None


def test_bad_input():
    with pytest.raises(ValueError, match="needs gates="):
        Glider(base(), library(), E)
    with pytest.raises(ValueError, match="tasks must have one entry per expert, 3, got 2"):
        Glider(base(), library(), E[:2], gates=gates())
    with pytest.raises(ValueError, match="gates must have one entry per expert, 3, got 2"):
        Glider(base(), library(), E, gates=gates(2))
    glider = Glider(base(), library(), E, gates=gates())
    with pytest.raises(ValueError, match="width of the tasks' embeddings, 2, got 3"):
        glider.ask(torch.ones(3))
    glider.ask(torch.ones(4, 2))
    with pytest.raises(ValueError, match="6 tokens do not divide among 4 queries"):
        glider(X)
    with pytest.raises(ValueError, match="local must be one of"):
        Glider(base(), library(), E, local="nothing")
