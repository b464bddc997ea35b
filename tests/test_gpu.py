"""The same numbers on a GPU as on the CPU, and results where the inputs are.

Collected only where there is a GPU; on other machines `tests/elsewhere.py` plays one.
"""

import copy

import pytest
import torch
from torch.nn import functional as F

from notebook_kit import alignment, expert_merging, merging, models, routers
from notebook_kit.adapters import LoRA, ParallelBottleneck, SeriesBottleneck, attach, detach, fold
from notebook_kit.mixtures import LoRAMoE, MoE, MoLA, MultiHeadRouting, SMoRA, SwiGLUExperts, UnionOfExperts
from notebook_kit.models import MLP
from notebook_kit.routers import TopK, install, record_routing, reroute
from notebook_kit.training import fit
from tests.alignment.nets import BUILD
from tests.expert_merging.moes import KINDS, ids, logits, moe
from tests.merging import test_devices as merge_cases
from tests.routers.test_interface import ALL

CLOSE = {"rtol": 2e-3, "atol": 2e-4}


@pytest.fixture(autouse=True)
def _full_precision():
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def on(device, value):
    """Tensors, in whatever lists and dicts, on a device."""
    return torch.utils._pytree.tree_map(lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, value)


def assert_same(there, here):
    assert all(tensor.is_cuda for tensor in there.values())
    torch.testing.assert_close(on("cpu", dict(there)), dict(here), **CLOSE)


@pytest.mark.parametrize("name", merge_cases.CASES)
def test_merges(name):
    values, merge = merge_cases.CASES[name], getattr(merging, name)
    there = merge(on("cuda", merge_cases.BASE), on("cuda", merge_cases.EXPERTS), **on("cuda", values))
    here = merge(merge_cases.BASE, merge_cases.EXPERTS, **values)
    assert_same(there, here)


def digits_like():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, 12, generator=g)
    return x, (x[:, :3].argmax(1))


def experts_of(model, n=3):
    g = torch.Generator().manual_seed(1)
    base = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    return base, [{k: t + 0.1 * torch.randn(t.shape, generator=g) for k, t in base.items()} for _ in range(n)]


@pytest.mark.parametrize("name", ["adamerging", "frank_wolfe"])
def test_searches_with_data(name):
    x, y = digits_like()
    results, model = {}, MLP([12, 16, 3]).eval()
    base, experts = experts_of(model)
    for device in ("cpu", "cuda"):
        batches = {f"task {i}": (x.to(device), y.to(device)) for i in range(3)}
        merged = getattr(merging, name)(
            on(device, base), on(device, experts), model=model.to(device), batches=batches, steps=5
        )
        results[device] = merged
    assert_same(results["cuda"], results["cpu"])


def test_statistics_of_models():
    x, y = digits_like()
    found, model = {}, MLP([12, 16, 3]).eval()
    for device in ("cpu", "cuda"):
        model, batches = model.to(device), [(x.to(device), y.to(device))]
        found[device] = (merging.diagonal_fisher(model, batches), merging.gram_matrices(model, batches))
    for there, here in zip(found["cuda"], found["cpu"], strict=True):
        assert_same(there, here)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("training", [True, False])
def test_routers(name, training):
    here = ALL[name](4).train(training)
    there, x = copy.deepcopy(here).cuda(), torch.randn(40, 6)
    tokens = {"tokens": (torch.arange(40) % 9)} if here.needs_tokens else {}
    a, b = here(x, **tokens), there(x.cuda(), **on("cuda", tokens))
    assert all(part.is_cuda for part in (b.logits, b.probs, b.weights, b.experts, b.aux_loss))
    noisy = training and name in ("noisy", "dense to sparse")
    if not noisy:
        assert torch.equal(a.experts, b.experts.cpu())
        torch.testing.assert_close((a.weights, a.aux_loss), (b.weights.cpu(), b.aux_loss.cpu()), **CLOSE)
    if b.weights.requires_grad:
        (b.weights.sum() + b.aux_loss).backward()
    none = {name: ids[:0] for name, ids in on("cuda", tokens).items()}
    assert len(there(x.cuda()[:0], **none)) == 0


@pytest.mark.parametrize("k", [1, 2, 3, 5, 16])
def test_picks_with_ties(k):
    scores = torch.randn(500, 16).round(decimals=1)
    expected = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(routers._claims.top_k(scores.cuda(), k).cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dispatch(dtype):
    here = MoE(SwiGLUExperts(8, 16, 32), TopK(16, 8)).eval()
    there, x = copy.deepcopy(here).cuda().to(dtype), torch.randn(50, 16)
    tolerance = CLOSE if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.05}
    torch.testing.assert_close(there(x.cuda().to(dtype)).float().cpu(), here(x), **tolerance)


@pytest.mark.parametrize("n_experts", [2, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_mixture_learns_in_every_precision(n_experts, dtype):
    here = MoE(SwiGLUExperts(n_experts, 16, 32), TopK(16, n_experts)).train()
    there, x = copy.deepcopy(here).cuda().to(dtype), torch.randn(50, 16)
    for layer, rows in ((here, x), (there, x.cuda().to(dtype))):
        layer(rows).square().mean().backward()
    tolerance = CLOSE if dtype == torch.float32 else {"rtol": 0.3, "atol": 0.02}
    for a, b in zip(here.parameters(), there.parameters(), strict=True):
        torch.testing.assert_close(b.grad.float().cpu(), a.grad, **tolerance)


@pytest.mark.parametrize(
    "adapter", [LoRA, SeriesBottleneck, ParallelBottleneck, LoRAMoE, MoLA, SMoRA, MultiHeadRouting]
)
def test_adapters(adapter):
    model = models.tiny_llama().eval().cuda()
    before, batch = copy.deepcopy(model.state_dict()), ids(n=2, length=16).cuda()
    more = {"n_tasks": 3} if adapter is MultiHeadRouting else {}
    names = attach(model, adapter, targets=r"down_proj$", **more)
    assert names
    if adapter is MultiHeadRouting:
        for module in model.modules():
            if isinstance(module, MultiHeadRouting):
                module.tasks = torch.zeros(2, dtype=torch.long, device="cuda")
    loss = F.cross_entropy(model(batch).logits.flatten(0, 1), batch.flatten())
    loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    if adapter is LoRA:
        with torch.no_grad():
            expected = model(batch).logits
            torch.testing.assert_close(fold(copy.deepcopy(model))(batch).logits, expected, **CLOSE)
    detach(model)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_fit():
    x, y = digits_like()
    x, y = x.cuda(), y.cuda()
    model = MLP([12, 16, 3]).cuda()

    def batch(generator):
        rows = torch.randint(len(x), (16,), generator=generator).cuda()
        return x[rows], y[rows]

    history = fit(
        model, batch, lambda net, part: F.cross_entropy(net(part[0]), part[1]), steps=60, lr=0.01, progress=False
    )
    assert history["loss"].iloc[-5:].mean() < 0.8 * history["loss"].iloc[:5].mean()


def test_union_of_experts():
    dense, x = MLP([8, 16, 8]).cuda().eval(), torch.randn(2, 10, 8, device="cuda")
    union = UnionOfExperts(dense).eval()
    assert all(parameter.is_cuda for parameter in union.parameters())
    assert union(x).is_cuda


@pytest.mark.parametrize("name", sorted(set(BUILD) - {"mt5", "t5"}))
def test_weight_matching_finds_planted_permutations(name):
    torch.manual_seed(0)
    model = BUILD[name]().eval()
    spec = alignment.permutation_spec(model)
    weights = on("cuda", model.state_dict())
    planted = alignment.random_permutations(spec, seed=3)
    shuffled = alignment.permute(spec, planted, weights)
    assert all(tensor.is_cuda for tensor in shuffled.values())
    found = alignment.weight_matching(spec, weights, shuffled)
    back = alignment.permute(spec, found, shuffled)
    here = alignment.permute(
        spec, alignment.weight_matching(spec, *on("cpu", (weights, shuffled))), on("cpu", shuffled)
    )
    assert_same(back, here)


def test_matching_with_data():
    x, _ = digits_like()
    a, b = MLP([12, 16, 3]).eval(), MLP([12, 16, 3]).eval()
    spec, batches = alignment.permutation_spec(a), [x]
    here = alignment.activation_matching(spec, a, b, batches)
    merged_here = alignment.pleas(a, b, batches, budget=1.3)
    a, b = a.cuda(), b.cuda()
    there = alignment.activation_matching(spec, a, b, [x.cuda()])
    assert {k: v.tolist() for k, v in here.items()} == {k: v.tolist() for k, v in there.items()}
    merged = alignment.pleas(a, b, [x.cuda()], budget=1.3)
    torch.testing.assert_close(merged(x.cuda()).cpu(), merged_here(x), rtol=1e-2, atol=1e-2)
    alignment.zipit(spec, [a, b], [x.cuda()])

    def loss(weights, batch):
        return torch.func.functional_call(a, weights, (batch,)).square().mean()

    alignment.straight_through(
        spec, *on("cuda", (a.state_dict(), b.state_dict())), loss, [x.cuda()], steps=3, progress=False
    )


def test_fusion_by_transport():
    x, _ = digits_like()
    a, b = MLP([12, 16, 3]).eval(), MLP([12, 16, 3]).eval()
    here = alignment.ot_fusion(a, b, [x])
    assert_same(alignment.ot_fusion(a.cuda(), b.cuda(), [x.cuda()]), here)


METHODS = ["m_smoe", "average_experts", "hc_smoe", "sub_moe", "drop_experts", "zipit_experts"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_expert_merging(kind, method):
    model, text = moe(kind), ids(n=6)
    results = {}
    for device in ("cpu", "cuda"):
        model = model.to(device)
        with torch.no_grad(), record_routing(model) as trace:
            model(text.to(device))
        more = {} if method in ("m_smoe", "average_experts") else {"batches": [text.to(device)]}
        if method == "drop_experts" and kind == "deepseek_v3":
            more["router"] = "map"  # groups of experts: rows cannot be deleted
        results[device] = getattr(expert_merging, method)(model, trace, n_experts=3, **more)
    there, here = results["cuda"], results["cpu"].cpu()
    assert all(tensor.is_cuda for tensor in [*there.parameters(), *there.buffers()])
    out = there.generate(text[:1, :4].cuda(), max_new_tokens=3, do_sample=False)
    assert out.shape == (1, 7)
    expected = logits(here)
    assert (logits(there.cpu()) - expected).abs().max() < 0.01 * expected.abs().max()


def test_switch_experts():
    model, text = models.tiny_switch().cuda(), {"input_ids": ids(2, length=24), "decoder_input_ids": ids(3, length=16)}
    with torch.no_grad(), record_routing(model) as trace:
        model(**on("cuda", text))
    for method in METHODS:
        more = {} if method in ("m_smoe", "average_experts") else {"batches": [on("cuda", text)]}
        smaller = getattr(expert_merging, method)(model, trace, n_experts=3, **more)
        assert all(parameter.is_cuda for parameter in smaller.parameters())
        assert smaller(**on("cuda", text)).logits.isfinite().all()


def test_installed_routers_and_traces(tmp_path):
    model, text = moe("mixtral").cuda(), ids(n=3).cuda()
    for router, values in ((routers.TopP, {"threshold": 0.4}), (routers.NullExperts, {"n_null": 8, "k": 3})):
        install(model, router, **values)
        with torch.no_grad(), record_routing(model) as trace:
            model(text)
        routers.uninstall(model)
    trace.save(tmp_path / "trace.safetensors")
    again = routers.RoutingTrace.load(tmp_path / "trace.safetensors")
    made = TopK(4, again.layer_logits(0).shape[1], k=2).cuda()
    assert not reroute(again, made, layer=0).weights.is_cuda
