"""Skills mixed by task against peft's poly, Arrow against peft's Arrow, Phatgoose against mttl's formula."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from notebook_kit.adapters import attach
from notebook_kit.mixtures import (
    Arrow,
    MultiHeadRouting,
    Phatgoose,
    Polytropon,
    arrow_prototypes,
    attach_bank,
    choose_tasks,
    stack_prototypes,
)
from notebook_kit.models import MLP

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
X = torch.randn(6, 3, 16, generator=torch.Generator().manual_seed(1))
TASKS = torch.tensor([0, 1, 2, 2, 1, 0])


@pytest.mark.parametrize("heads", [1, 4, 8])
@pytest.mark.parametrize("trained", [False, True])
def test_poly(heads, trained):
    torch.manual_seed(0)
    base = MLP([16, 32, 8])
    config = peft.PolyConfig(target_modules=["0", "1"], n_tasks=3, n_skills=5, n_splits=heads, r=4, init_weights=False)
    theirs, ours = peft.get_peft_model(copy.deepcopy(base), config), copy.deepcopy(base)
    kind = {"n_splits": heads} if heads > 1 else {}
    attach(ours, MultiHeadRouting if kind else Polytropon, targets="layers", n_tasks=3, n_skills=5, rank=4, **kind)
    for i, layer in enumerate(ours.layers):
        peer = theirs.base_model.model.layers[i]
        peer.poly_router["default"].module_logits.data.normal_()
        layer.A.data, layer.B.data = peer.poly_lora_A["default"].data.clone(), peer.poly_lora_B["default"].data.clone()
        layer.Z.data = peer.poly_router["default"].module_logits.data.reshape(3, heads, 5).clone()
    choose_tasks(ours, TASKS)
    ours.eval(), theirs.eval()
    if trained:  # the same steps on both: gradients agree too
        for model, call in ((ours, ours), (theirs, lambda x: theirs.base_model(x, task_ids=TASKS))):
            parameters = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.SGD(parameters, lr=0.1)
            for _ in range(3):
                optimizer.zero_grad()
                call(X).square().mean().backward()
                optimizer.step()
    torch.testing.assert_close(ours(X), theirs.base_model(X, task_ids=TASKS), rtol=0, atol=1e-5)


def library(n=4, d_in=16, d_out=8, rank=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(n):
        A, B = torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator)
        rows.append(({"layers.0.A": A, "layers.0.B": B}, 0.5))
    return rows


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("temperature", [1.0, 10.0])
def test_arrow(k, temperature):
    from peft.tuners.lora.arrow import ArrowLoraLinearLayer

    torch.manual_seed(0)
    base, bank = MLP([16, 8]).eval(), library()
    names = [f"task_{i}" for i in range(4)]
    config = peft.ArrowConfig(top_k=k, router_temperature=temperature, rng_seed=0)
    config.task_adapter_names, config.gks_adapter_names = names, []
    peer = ArrowLoraLinearLayer(16, config)
    A, B = nn.ModuleDict(), nn.ModuleDict()
    for name, (tensors, _) in zip(names, bank, strict=True):
        A[name], B[name] = nn.Linear(16, 3, bias=False), nn.Linear(3, 8, bias=False)
        A[name].weight.data, B[name].weight.data = tensors["layers.0.A"], tensors["layers.0.B"]
    peer.build_prototypes(A, B)
    exact = stack_prototypes([arrow_prototypes(expert) for expert in bank])["layers.0"]
    # Their 15 power iterations are not quite there; the direction is the same, up to sign.
    assert F.cosine_similarity(exact, peer.prototypes).abs().min() > 0.99
    peer.prototypes = exact
    theirs = base(X) + peer(X, A, B, nn.Identity(), dict.fromkeys(names, 0.5))
    attach_bank(base, bank, lambda d: Arrow(d, 4, k=k, temperature=temperature), prototypes={"layers.0": exact})
    torch.testing.assert_close(base(X), theirs, rtol=0, atol=1e-5)


def test_phatgoose_is_mttls_token_router():
    """mttl: LayerNorm without affine on both sides, logits / sqrt(d), softmax, the k largest, divided by their sum."""
    torch.manual_seed(0)
    router, u = Phatgoose(16, 5, k=2), torch.randn(7, 16)
    norm = nn.LayerNorm(16, elementwise_affine=False)
    p = (norm(u) @ norm(router.weight).T / 16**0.5).softmax(1)
    top, index = p.topk(2, dim=1)
    routing = router(u)
    assert torch.equal(routing.experts, index)
    torch.testing.assert_close(routing.weights, top / top.sum(1, keepdim=True), rtol=0, atol=2e-6)
