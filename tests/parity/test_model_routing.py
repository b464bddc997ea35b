"""Routing between whole models against plain ways to say the same: enumeration, loops, complex numbers."""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from notebook_kit.mixtures import ContrastiveMoE, ExpertAggregator, MetaDMoE, masked_gate, mnr_loss, mnr_plus_loss
from notebook_kit.mixtures.expert_budget import compose
from notebook_kit.mixtures.grid_attention import GridAttention
from notebook_kit.models import MLP, tiny_bert


def best_by_enumeration(scores, sizes, budget, traffic, host):
    """All subsets of experts: (value, -size) of the best."""
    best = None
    for r in range(1, len(sizes) + 1):
        for subset in itertools.combinations(range(len(sizes)), r):
            size = sum(sizes[k] for k in subset)
            if size <= budget and set(host) <= set(subset):
                value = sum(n * max(row[k] for k in subset) for n, row in zip(traffic, scores, strict=True))
                if best is None or value > best[0] + 1e-9 or (abs(value - best[0]) <= 1e-9 and -size > best[1]):
                    best = (value, -size)
    return best


@given(
    st.integers(1, 5),
    st.integers(1, 8),
    st.integers(0, 2**31),
    st.sampled_from([4, 1000]),
    st.floats(0.0, 1.0),
    st.booleans(),
)
@settings(deadline=None, max_examples=40)
def test_the_programme_against_all_subsets(m, k, seed, grain, share, forced):
    g = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, grain + 1, (m, k), generator=g).double() / grain
    sizes = torch.randint(1, 12, (k,), generator=g).tolist()
    traffic = torch.randint(1, 9, (m,), generator=g).tolist()
    host = (int(torch.randint(k, (1,), generator=g)),) if forced else ()
    low = sizes[host[0]] if forced else min(sizes)
    budget = low + share * (sum(sizes) - low)
    found = compose(scores.float(), sizes, budget, traffic=traffic, host=host)
    value, size = best_by_enumeration(scores.float().double().tolist(), sizes, budget, traffic, host)
    assert found.value == pytest.approx(value, rel=1e-6, abs=1e-9)
    assert found.size == -size
    assert set(host) <= set(found.hosted)


def test_the_meta_gradient_against_plain_tensors():
    """One linear map as student: θ' = θ - η 2/(Bd) Xᵀ(Xθ - t), written out, with autograd over plain tensors."""
    torch.manual_seed(0)
    experts = [nn.Linear(5, 4).double() for _ in range(3)]
    student, head = nn.Linear(5, 4, bias=False).double(), nn.Linear(4, 3).double()
    aggregator = ExpertAggregator(4, n_heads=2, dropout=0.0).double()
    model = MetaDMoE(experts, student, head, aggregator=aggregator, inner_lr=0.7).eval()
    s, q, y = torch.randn(6, 5).double(), torch.randn(7, 5).double(), torch.arange(7) % 3
    loss = model.episode_loss(s, q, y, expert=2)
    ours = torch.autograd.grad(loss, [student.weight, head.weight, *aggregator.parameters()])

    tokens = torch.stack([e(s).detach() for e in experts[:2]], 1)
    t = aggregator(tokens)
    theta = student.weight.T
    moved = theta - 0.7 * 2 / t.numel() * s.T @ (s @ theta - t)
    logits = q @ moved @ head.weight.T + head.bias
    plain = F.cross_entropy(logits, y)
    torch.testing.assert_close(loss, plain)
    theirs = torch.autograd.grad(plain, [student.weight, head.weight, *aggregator.parameters()])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-8)


def test_the_aggregator_against_torchs_encoder_layer():
    torch.manual_seed(0)
    ours = ExpertAggregator(8, n_heads=2, dropout=0.0).eval()
    plain = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
    block = ours.blocks[0]
    pairs = [(plain.self_attn.in_proj_weight, block.qkv.weight), (plain.self_attn.in_proj_bias, block.qkv.bias)]
    modules = [(plain.self_attn.out_proj, block.out), (plain.linear1, block.mlp[0]), (plain.linear2, block.mlp[3])]
    modules += [(plain.norm1, block.norms[0]), (plain.norm2, block.norms[1])]
    with torch.no_grad():
        for theirs, mine in pairs + [(getattr(a, n), getattr(b, n)) for a, b in modules for n in ("weight", "bias")]:
            theirs.copy_(mine)
    tokens = torch.randn(5, 4, 8)
    torch.testing.assert_close(ours(tokens), plain.eval()(tokens).mean(1), atol=1e-5, rtol=1e-5)


def test_several_inner_steps_against_a_copied_network_and_sgd():
    torch.manual_seed(0)
    model = MetaDMoE([MLP([4, 8])], MLP([4, 5, 8]), nn.Linear(8, 2), inner_lr=0.3, inner_steps=3, mask=False).eval()
    x = torch.randn(9, 4)
    plain = copy.deepcopy(model.student)
    t = model.target(x).detach()
    sgd = torch.optim.SGD(plain.parameters(), lr=0.3)
    for _ in range(3):
        sgd.zero_grad()
        F.mse_loss(plain(x), t).backward()
        sgd.step()
    for name, value in model.adapt(x).items():
        torch.testing.assert_close(value.detach(), plain.get_parameter(name).detach(), atol=1e-6, rtol=1e-5)


def test_each_domain_against_its_own_dense_bert():
    dense = tiny_bert()
    model = ContrastiveMoE(dense, 3).eval()
    torch.manual_seed(1)
    for name, p in model.encoder.named_parameters():
        if ".experts." in name:
            p.data += 0.3 * torch.randn_like(p)
    ids = torch.randint(0, 256, (6, 9))
    domains = torch.tensor([2, 0, 1, 0, 2, 1])
    together = model(ids, domains)
    for e in range(3):
        alone = copy.deepcopy(dense)
        for layer, other in zip(alone.encoder.layer, model.encoder.encoder.layer, strict=True):
            layer.intermediate.dense.load_state_dict(other.intermediate.experts[e].up.state_dict())
            layer.output.dense.load_state_dict(other.intermediate.experts[e].down.state_dict())
        # The domain's token equals [CLS] (id 0) until it is trained.
        rows = ids[domains == e].clone()
        rows[:, 0] = 0
        h = alone(input_ids=rows, attention_mask=torch.ones_like(rows)).last_hidden_state
        torch.testing.assert_close(together[domains == e], model.head(h.mean(1)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("normalize", [True, False])
def test_ranking_losses_against_loops(normalize):
    torch.manual_seed(0)
    a, b = torch.randn(2, 6, 5)
    unit = (lambda v: v / v.norm()) if normalize else (lambda v: v)
    s = [[3.0 * float(unit(a[i]) @ unit(b[j])) for j in range(6)] for i in range(6)]

    def ce(row, target):
        return math.log(sum(math.exp(v) for v in row)) - row[target]

    plain = sum(ce(s[i], i) for i in range(6)) / 6
    assert mnr_loss(a, b, scale=3.0, normalize=normalize).item() == pytest.approx(plain, rel=1e-4)
    t = [[0.5 * float(unit(a[i]) @ unit(a[j]) + unit(b[i]) @ unit(b[j])) for j in range(6)] for i in range(6)]
    if not normalize:
        t = [[0.5 * float(a[i] @ a[j] + b[i] @ b[j]) for j in range(6)] for i in range(6)]
        soft = torch.tensor(t).softmax(1)
        rows, columns = soft.argmax(1).tolist(), soft.argmax(0).tolist()
    else:
        rows = columns = list(range(6))
    across = [[s[i][j] for i in range(6)] for j in range(6)]
    plain = sum(ce(s[i], rows[i]) + ce(across[i], columns[i]) for i in range(6)) / 12
    assert mnr_plus_loss(a, b, scale=3.0, normalize=normalize).item() == pytest.approx(plain, rel=1e-4)


def test_the_gate_against_minus_a_million():
    torch.manual_seed(0)
    logits, mask = torch.randn(20, 5), torch.rand(20, 5) < 0.5
    mask[:, 0] = True
    plain = (logits + (1 - mask.float()) * -1e6).softmax(-1)
    keep = F.one_hot(plain.topk(3).indices, 5).sum(1)
    plain = plain * keep
    torch.testing.assert_close(masked_gate(logits, mask, 3), plain / plain.sum(1, keepdim=True))


def test_grid_attention_against_complex_numbers():
    torch.manual_seed(0)
    grid, heads, d, width = 3, 2, 16, 5
    ours = GridAttention(d, width, heads, grid)
    nn.init.normal_(ours.out.weight)
    x, v = torch.randn(2, 9, d), torch.randn(2, 9, width)
    quarter = d // heads // 4

    def turned(t):
        """Pairs of numbers as complex ones, turned by row for the first half of them and by column for the second."""
        z = torch.view_as_complex(t.reshape(2, 9, heads, 2 * quarter, 2).contiguous())
        place = torch.arange(9)
        speeds = torch.tensor([10000 ** (-i / quarter) for i in range(quarter)])
        angle = torch.cat([(place // grid)[:, None] * speeds, (place % grid)[:, None] * speeds], 1)
        return torch.view_as_real(z * torch.polar(torch.ones_like(angle), angle)[:, None]).flatten(-2)

    q, k = turned(ours.q(x)), turned(ours.k(v))
    attention = torch.einsum("blhd,bmhd->bhlm", q, k) / (d // heads) ** 0.5
    y = torch.einsum("bhlm,bmhd->blhd", attention.softmax(-1), ours.v(v).view(2, 9, heads, -1)).reshape(2, 9, d)
    torch.testing.assert_close(ours(x, v), ours.out(ours.norm(y)), atol=1e-5, rtol=1e-4)
