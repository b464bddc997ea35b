"""Merges in subspaces against independent, plain implementations of the official code's formulas.

fusion_bench, the peer, is not installed here: `benchmarks/subspace_merging.py` holds the same functions against it.
What follows spells its steps out: whole SVDs with square factors, autograd and torch's Adam, one vector for the model.
On random weights, on trained ones, and on real architectures.
"""

import pytest
import torch

from notebook_kit.merging import adamerging_path, doge, doge_experts, isotropic, opcm, task_singular_vectors
from notebook_kit.merging.matrices import matrix_names
from notebook_kit.models import tiny
from notebook_kit.zoo import digit_labels
from tests.parity.test_merge_search import plain_adamerging


def nearest(a):
    u, _, vh = torch.linalg.svd(a, full_matrices=False)
    return u @ vh


def tsv_of(taus):
    k = min(taus[0].shape) // len(taus)
    u, s, vh = zip(*(torch.linalg.svd(tau, full_matrices=False) for tau in taus), strict=True)
    u = torch.cat([x[:, :k] for x in u], 1)
    return nearest(u) @ torch.diag(torch.cat([x[:k] for x in s])) @ nearest(torch.cat([x[:k] for x in vh]))


def iso_of(taus):
    u, s, vh = torch.linalg.svd(sum(taus), full_matrices=False)
    return u @ torch.diag(s.mean().expand_as(s)) @ vh


def cts_of(taus, fraction=0.8):
    r = min(taus[0].shape)
    n_common = r - round((r - int(r * fraction)) / len(taus)) * len(taus)
    d = (r - n_common) // len(taus)
    u, s, vh = torch.linalg.svd(sum(taus), full_matrices=False)
    u, s, vh = u[:, :n_common], s[:n_common], vh[:n_common]
    parts = [torch.linalg.svd(tau - u @ u.T @ tau, full_matrices=False) for tau in taus]
    u_all = torch.cat([*(p[0][:, :d] for p in parts), u], 1)
    v_all = torch.cat([*(p[2][:d] for p in parts), vh])
    return torch.cat([*(p[1][:d] for p in parts), s]).mean() * nearest(u_all) @ nearest(v_all)


def by_tensor(base, experts, rule, treated):
    """θ₀ + τ*, in float64: `rule` for matrices, the mean for everything else."""
    merged = {}
    for name, start in base.items():
        taus = [expert[name].double() - start.double() for expert in experts]
        if name not in treated:
            star = sum(taus) / len(taus)
        elif start.dim() == 2:
            star = rule(taus)
        else:
            star = torch.stack([rule([tau[e] for tau in taus]) for e in range(len(start))])
        merged[name] = start.double() + star
    return merged


def opcm_of(base, experts, alpha):
    """The official loop: scale, unscale and scale again at every step, with λ kept beside."""

    def flat(one):
        return torch.cat([(one[k].double() - base[k].double()).reshape(-1) for k in base]).norm()

    merged, lam, norms = {k: v.double() for k, v in experts[0].items()}, 1.0, [flat(experts[0])]
    treated = matrix_names(base, "linear")
    for expert in experts[1:]:
        norms.append(flat(expert))
        mean = sum(norms) / len(norms)
        for name in base:
            old, d = merged[name] - base[name].double(), expert[name].double() - base[name].double()
            if name in treated:
                u, s, vh = torch.linalg.svd(old, full_matrices=True)
                split = int((s.cumsum(0) / s.sum() > alpha).float().argmax())
                p = u.T @ d @ vh.T
                p.diagonal().fill_(0)
                p[:split, :split] = 0
                d = u @ p @ vh
            merged[name] = base[name].double() + lam * old + d
        length = flat(merged)
        lam = length / mean
        merged = {k: base[k].double() + (merged[k] - base[k].double()) * mean / length for k in base}
    return merged


def doge_parts_of(base, experts, *, eta, subspace, density, steps, lr, shared=True):
    """Autograd, torch's Adam, and the mask over one long vector; matrices only: λ_i and m_i ⊙ (τ_i + Δ_i) by name."""
    names = [name for name in base if name in matrix_names(base, "linear")]
    taus = {name: torch.stack([expert[name] - base[name] for expert in experts]) for name in names}
    n, deltas, lambdas = len(experts), {}, {}
    for name, tau in taus.items():
        lam = eta / torch.stack([t.norm() for t in tau])
        rank = min(tau.shape[1:])
        svds = [torch.linalg.svd(t.double(), full_matrices=False)[0].float() for t in tau]
        u = torch.linalg.svd(torch.cat([x[:, : rank // n] for x in svds], 1).double(), full_matrices=False)[0].float()
        projector = u[:, : rank // subspace] @ u[:, : rank // subspace].T
        delta = [torch.zeros_like(tau[0]).requires_grad_() for _ in range(1 if shared else n)]
        adam = torch.optim.Adam(delta, lr=lr)
        for _ in range(steps):
            adam.zero_grad()
            moved = sum(lam[i] * delta[0 if shared else i] for i in range(n))
            planned = (lam[:, None, None] * tau).sum(0)
            loss = sum((-t * planned - t * moved + t * t).sum(1).pow(2).sum() for t in tau)
            loss.backward()
            for one in delta:
                one.grad -= projector @ one.grad
            adam.step()
        deltas[name], lambdas[name] = torch.stack([one.detach() for one in delta]), lam
    long = torch.stack([torch.cat([taus[name][i].reshape(-1) for name in names]) for i in range(n)])
    keep = int(density * long.shape[1])
    edge = long.abs().sort(dim=1, descending=True).values[:, keep - 1]
    masks = {name: taus[name].abs() >= edge[:, None, None] for name in names}
    return lambdas, {name: (taus[name] + deltas[name]) * masks[name] for name in names}


def doge_of(base, experts, **settings):
    """Each adjusted task vector by its own λ_i."""
    lambdas, adjusted = doge_parts_of(base, experts, **settings)
    merged = {name: tensor.clone() for name, tensor in base.items()}
    for name, moved in adjusted.items():
        merged[name] += (lambdas[name][:, None, None] * moved).sum(0)
    return merged


def close(ours, reference, base, tolerance=1e-4):
    """Equal relative to how far the merge moved."""
    for name in base:
        moved = (reference[name].double() - base[name].double()).norm()
        assert (ours[name].double() - reference[name].double()).norm() <= tolerance * moved + 1e-6, name


def random_models(count=3):
    g = torch.Generator().manual_seed(0)
    shapes = {"square.weight": (24, 24), "wide.weight": (16, 40), "tall.weight": (40, 16), "bias": (24,)}

    def build(size):
        return {k: size * torch.randn(s, generator=g) for k, s in shapes.items()}

    base = build(1.0)
    return base, [{k: base[k] + change for k, change in build(0.1).items()} for _ in range(count)]


@pytest.fixture(params=["random", "trained"])
def models(request):
    bed = digit_labels()
    return random_models() if request.param == "random" else (dict(bed.base), bed.experts)


@pytest.mark.parametrize(("method", "rule"), [
    (task_singular_vectors, tsv_of), (isotropic, iso_of), (lambda b, e: isotropic(b, e, common=0.8), cts_of),
], ids=["tsv", "iso-c", "iso-cts"])  # fmt: skip
def test_tsv_and_isotropic(models, method, rule):
    base, experts = models
    ours, reference = method(base, experts), by_tensor(base, experts, rule, matrix_names(base, "all"))
    for name in base:
        if base[name].dim() == 2:
            # Some pixels are dark in every picture: no expert moved their weights. An SVD fills these directions with
            # arbitrary ones, ours leaves them alone.
            dark = ~(torch.stack([expert[name] - base[name] for expert in experts]) != 0).any(dim=(0, 1))
            assert torch.equal(ours[name][:, dark], base[name][:, dark])
            for merged in (ours, reference, base):
                merged[name] = merged[name][:, ~dark]
    close(ours, reference, base)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8])
def test_opcm(models, alpha):
    base, experts = models
    close(opcm(base, experts[:4], alpha=alpha), opcm_of(base, experts[:4], alpha), base)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("density", [0.3, 1.0])
def test_doge(models, shared, density):
    base, experts = models
    settings = {"eta": 0.2, "subspace": 4, "density": density, "steps": 15, "lr": 1e-3}
    ours = doge(base, experts[:3], **settings, shared_delta=shared)
    # Adam's first steps go by the sign of the gradient alone, so that rounding is seen where a gradient is nearly 0.
    close(ours, doge_of(base, experts[:3], **settings, shared=shared), base, tolerance=1e-3)


def test_doge_followed_by_adamerging():
    """The variant with learned coefficients: one Δ for each task, then AdaMerging written out, in float64."""
    g = torch.Generator().manual_seed(3)
    shapes = {"0.weight": (12, 8), "0.bias": (12,), "2.weight": (5, 12), "2.bias": (5,)}
    base, *experts = ({n: torch.randn(s, generator=g) * 0.4 for n, s in shapes.items()} for _ in range(4))
    batches = [torch.randn(20, 8, generator=g) for _ in range(3)]
    settings = {"eta": 0.3, "subspace": 3, "density": 0.6, "steps": 20, "lr": 1e-2}
    _, moved = doge_parts_of(base, experts, shared=False, **settings)
    reference = [{n: t + moved[n][i] if n in moved else t for n, t in base.items()} for i in range(3)]
    adjusted = doge_experts(base, experts, shared_delta=False, **settings)
    for ours, theirs in zip(adjusted, reference, strict=True):
        close(ours, theirs, base)
    model = torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.Tanh(), torch.nn.Linear(12, 5))
    options = {"scale": 0.3, "lr": 0.02, "steps": 15}
    path = adamerging_path(base, adjusted, model=model, batches={str(i): x for i, x in enumerate(batches)}, **options)

    def forward(theta, x):
        hidden = torch.tanh(x @ theta["0.weight"].T + theta["0.bias"])
        return hidden @ theta["2.weight"].T + theta["2.bias"]

    lambdas = plain_adamerging(base, reference, forward, batches, layer_wise=True, **options)
    treated = [i for i, name in enumerate(path.layers) if name in moved]
    torch.testing.assert_close(path.coefficients[-1][:, treated].double(), lambdas[:, treated], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("build", [tiny.tiny_llama, tiny.tiny_gpt2, tiny.tiny_vit, tiny.tiny_mixtral, tiny.tiny_t5])
def test_real_architectures(build):
    net = build()
    base = net.state_dict()
    experts = [build(seed).state_dict() for seed in (1, 2)]
    for method, rule in ((task_singular_vectors, tsv_of), (isotropic, iso_of)):
        merged = method(base, experts)
        floats = {name: tensor for name, tensor in base.items() if tensor.is_floating_point()}
        reference = by_tensor(floats, experts, rule, matrix_names(base, "all"))
        close(merged, reference, floats, tolerance=1e-3)
        net.load_state_dict(merged)
    for method in (opcm, lambda b, e: doge(b, e, steps=3)):
        merged = method(base, experts)
        assert list(merged) == list(base)
        assert all(torch.isfinite(tensor.float()).all() for tensor in merged.values())
        net.load_state_dict(merged)
