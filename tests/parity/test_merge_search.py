"""Merges by search against plain implementations written apart from them, and on real architectures."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from notebook_kit.merging import (
    NicheArchive,
    PointScores,
    adamerging,
    adamerging_path,
    frank_wolfe_path,
    task_arithmetic,
    ties,
)
from notebook_kit.merging.niches import attraction, fitness, mix
from notebook_kit.models import MLP
from notebook_kit.models.tiny import tiny_gpt2, tiny_llama, tiny_t5, tiny_vit
from notebook_kit.zoo import digit_views


# ---------------------------------------------------------------- AdaMerging
def plain_adamerging(base, experts, forward, data, *, layer_wise, scale, lr, steps):
    """The formula with Adam written out, in float64."""
    names = list(base)
    lambdas = torch.full((len(experts), len(names) if layer_wise else 1), scale, dtype=torch.float64)
    mean, square = torch.zeros_like(lambdas), torch.zeros_like(lambdas)
    for step in range(1, steps + 1):
        lambdas.requires_grad_()
        theta = {
            name: base[name].double()
            + sum(
                lambdas[i, j if layer_wise else 0] * (expert[name].double() - base[name].double())
                for i, expert in enumerate(experts)
            )
            for j, name in enumerate(names)
        }
        total = 0
        for x in data:
            p = F.softmax(forward(theta, x.double()), dim=-1)
            total = total - (p * p.log()).sum(-1).mean()
        (g,) = torch.autograd.grad(total, lambdas)
        mean, square = 0.9 * mean + 0.1 * g, 0.999 * square + 0.001 * g**2
        move = (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
        lambdas = lambdas.detach() - lr * move
    return lambdas


def two_layers(theta, x):
    hidden = F.relu(F.linear(x, theta["layers.0.weight"], theta["layers.0.bias"]))
    return F.linear(hidden, theta["layers.1.weight"], theta["layers.1.bias"])


@pytest.mark.parametrize("layer_wise", [True, False])
def test_adamerging_is_the_plain_one(layer_wise):
    models = []
    for seed in range(4):
        torch.manual_seed(seed)
        models.append(MLP([5, 7, 3]))
    base, *experts = (model.state_dict() for model in models)
    data = {f"task {i}": torch.randn(20, 5) for i in range(3)}
    options = {"scale": 0.3, "lr": 0.05, "steps": 20}
    granularity = "layer" if layer_wise else "task"
    ours = adamerging_path(base, experts, model=models[0], batches=data, granularity=granularity, **options)
    plain = plain_adamerging(base, experts, two_layers, data.values(), layer_wise=layer_wise, **options)
    torch.testing.assert_close(ours.coefficients[-1].double(), plain, rtol=1e-4, atol=1e-5)


def test_adamerging_on_trained_weights_starts_at_task_arithmetic_or_at_ties():
    bed = digit_views()
    data = {name: x[:40] for name, (x, _) in bed.batches("val").items()}
    ours = adamerging(bed.base, bed.experts, model=bed.model, batches=data, steps=0, scale=0.2)
    plain = task_arithmetic(bed.base, bed.experts, scale=0.2)
    for key in bed.base:
        torch.testing.assert_close(ours[key], plain[key], rtol=1e-5, atol=1e-6)
    # ++: with scale 1 and the sum of what agrees, the start is TIES with combine="sum".
    trimmed = adamerging(bed.base, bed.experts, model=bed.model, batches=data, steps=0, scale=1.0, density=0.2)
    summed = ties(bed.base, bed.experts, density=0.2, combine="sum")
    for key in bed.base:
        torch.testing.assert_close(trimmed[key], summed[key], rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- Frank-Wolfe
def plain_frank_wolfe(base, experts, x, y, steps, layer_wise):
    """A linear classifier with the gradient worked out by hand, in numpy."""
    names = ["weight", "bias"]

    def get(weights):
        return [weights[name].double().numpy() for name in names]

    vertices = [get(expert) for expert in experts]
    theta = [t.copy() for t in get(base)]
    vertices.append([t.copy() for t in theta])
    picks, gaps = [], []
    for t in range(steps):
        logits = x @ theta[0].T + theta[1]
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        p[np.arange(len(y)), y] -= 1
        g = [p.T @ x / len(y), p.mean(0)]
        table = np.array([[(gl * vl).sum() for gl, vl in zip(g, v, strict=True)] for v in vertices])
        here = np.array([(gl * tl).sum() for gl, tl in zip(g, theta, strict=True)])
        chosen = table.argmin(0) if layer_wise else np.repeat(table.sum(1).argmin(), 2)
        gaps.append((here - table[chosen, [0, 1]]).sum())
        picks.append(chosen if layer_wise else chosen[:1])
        theta = [tl + 2 / (t + 2) * (vertices[chosen[i]][i] - tl) for i, tl in enumerate(theta)]
    return theta, np.array(picks), np.array(gaps)


@pytest.mark.parametrize("layer_wise", [True, False])
def test_frank_wolfe_is_the_plain_one(layer_wise):
    nets = [torch.nn.Linear(6, 4) for _ in range(6)]
    base, *experts = (net.state_dict() for net in nets)
    x, y = torch.randn(50, 6), torch.randint(4, (50,))
    granularity = "layer" if layer_wise else "task"
    ours = frank_wolfe_path(
        base, experts, model=nets[0], batches={"t": (x, y)}, granularity=granularity, init="base", steps=12
    )
    theta, picks, gaps = plain_frank_wolfe(base, experts, x.double().numpy(), y.numpy(), 12, layer_wise)
    assert np.array_equal(ours.picks[:, 0].numpy(), picks)
    np.testing.assert_allclose(ours.gaps.numpy(), gaps, rtol=1e-3, atol=1e-5)
    for name, plain in zip(("weight", "bias"), theta, strict=True):
        np.testing.assert_allclose(ours.merged[name].numpy(), plain, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- M2N2
def official_slerp_with_split(w, split, x, y):
    """As natural_niches does it, in numpy float64: t along the vector, one angle."""
    t = np.where(np.arange(len(x)) < split, w, 1 - w)
    omega = np.arccos(np.clip(x @ y / np.linalg.norm(x) / np.linalg.norm(y), -1, 1))
    if np.sin(omega) > 1e-6:
        return np.sin((1 - t) * omega) / np.sin(omega) * x + np.sin(t * omega) / np.sin(omega) * y
    return (1 - t) * x + t * y


def test_crossover_is_the_official_one():
    g = np.random.default_rng(0)
    a, b = g.normal(size=(2, 5, 40))
    w, k = g.random(5), g.integers(0, 40, 5)
    tensors = (torch.tensor(v, dtype=torch.float32) for v in (a, b, w))
    ours = mix(*tensors, torch.tensor(k))
    for row in range(5):
        expected = official_slerp_with_split(w[row], k[row], a[row], b[row])
        np.testing.assert_allclose(ours[row].numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.0])
def test_niches_are_the_official_ones(alpha):
    g = np.random.default_rng(1)
    scores = (g.random((6, 30)) < 0.4).astype(float)
    z = scores.sum(0)
    z = np.where(z, z, 1) ** alpha
    shares = scores / z
    ours = torch.tensor(scores, dtype=torch.float32)
    np.testing.assert_allclose(fitness(ours, alpha).numpy(), shares.sum(1), rtol=1e-5)
    for i in range(6):
        np.testing.assert_allclose(
            attraction(ours, i, alpha).numpy(), np.maximum(0, shares - shares[i]).sum(1), rtol=1e-5, atol=1e-6
        )


def test_replacement_is_the_official_one():
    """A run of random children: the same ones stay."""
    g = torch.Generator().manual_seed(0)
    base = {"w": torch.zeros(25)}
    archive = NicheArchive(base, [base], score_points=lambda weights: (weights["w"] > 0).float(), pop_size=6)
    scores, rows = np.zeros((6, 25)), np.zeros((6, 25))
    for _ in range(60):
        child = torch.randn(25, generator=g)
        score = torch.rand(25, generator=g)  # no two models are equally fit
        archive.insert(child, score)
        extended = np.concatenate([scores, score.numpy()[None]])
        z = extended.sum(0)
        worst = (extended / np.where(z, z, 1)).sum(1).argmin()
        if worst < 6:
            scores[worst], rows[worst] = score.numpy(), child.numpy()
        np.testing.assert_array_equal(archive.scores.numpy(), scores.astype(np.float32))
    np.testing.assert_allclose(archive.flat.numpy(), rows, rtol=1e-6)


# ---------------------------------------------------------------- real architectures
def fine_tuned(build, count):
    """Base and experts: small steps away from it, tied parameters together."""
    base = build()
    weights = base.state_dict()
    experts = []
    for seed in range(count):
        g = torch.Generator().manual_seed(seed)
        moved: dict[int, torch.Tensor] = {}
        expert = {}
        for name, tensor in weights.items():
            if tensor.data_ptr() not in moved:
                moved[tensor.data_ptr()] = tensor + 0.05 * torch.randn(tensor.shape, generator=g)
            expert[name] = moved[tensor.data_ptr()]
        experts.append(expert)
    return base, dict(weights), experts


def text(seed=0):
    ids = torch.randint(256, (3, 12), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, 8:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids}


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
@pytest.mark.parametrize("loss", ["entropy", "cross_entropy"])
def test_language_models_with_tied_and_untied_heads(build, loss):
    model, base, experts = fine_tuned(build, 2)
    data = {"a": text(0), "b": text(1)}
    path = adamerging_path(base, experts, model=model, batches=data, loss=loss, steps=4, lr=0.05)
    assert path.losses[-1].sum() < path.losses[0].sum()
    merged = path.merged()
    assert set(merged) == set(base)
    tied = build is tiny_gpt2
    assert tied == ("lm_head.weight" in path.vectors.owners and "lm_head.weight" not in path.layers)
    walk = frank_wolfe_path(base, experts, model=model, batches=data, init="base", granularity="layer", steps=3)
    assert walk.losses[-1].mean() <= walk.losses[0].mean()
    if tied:
        assert torch.equal(merged["lm_head.weight"], merged["transformer.wte.weight"])
        assert torch.equal(walk.merged["lm_head.weight"], walk.merged["transformer.wte.weight"])
    model.load_state_dict(walk.merged)
    with torch.no_grad():
        loss_now = torch.stack([model(**batch).loss for batch in data.values()])
    torch.testing.assert_close(loss_now, walk.losses[-1])


def test_vision_and_encoder_decoder_models():
    model, base, experts = fine_tuned(tiny_vit, 3)
    g = torch.Generator().manual_seed(0)
    pixels, labels = torch.randn(8, 1, 16, 16, generator=g), torch.randint(10, (8,), generator=g)
    for batch in ((pixels, labels), {"pixel_values": pixels, "labels": labels}):
        path = adamerging_path(base, experts, model=model, batches={"t": batch}, loss="cross_entropy", steps=3, lr=0.05)
        assert path.losses[-1] < path.losses[0]
    t5, base, experts = fine_tuned(tiny_t5, 2)
    walk = frank_wolfe_path(base, experts, model=t5, batches={"t": text()}, init="base", steps=3)
    assert walk.losses[-1] <= walk.losses[0]
    assert torch.equal(walk.merged["shared.weight"], walk.merged["encoder.embed_tokens.weight"])


def test_evolution_of_a_vision_transformer_and_of_a_language_model():
    model, base, experts = fine_tuned(tiny_vit, 2)
    g = torch.Generator().manual_seed(0)
    pixels, labels = torch.randn(16, 1, 16, 16, generator=g), torch.randint(10, (16,), generator=g)

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x).logits

    named = [{f"model.{key}": tensor for key, tensor in weights.items()} for weights in (base, *experts)]
    score = PointScores(Logits(), pixels, labels)
    archive = NicheArchive(named[0], named[1:], score_points=score, pop_size=4, children=3).run(12)
    assert archive.evaluations == 12
    assert archive.history[-1]["best"] == pytest.approx(float(score(archive.best()).mean()))
    one_by_one = torch.stack([score(archive.space.weights(row)) for row in archive.flat])
    torch.testing.assert_close(score.stacked(archive.space, archive.flat), one_by_one)

    llama, base, experts = fine_tuned(tiny_llama, 2)
    batch = text()

    def likelihood(weights):
        with torch.no_grad():
            logits = torch.func.functional_call(llama, weights, (), batch).logits[:, :-1]
        return F.softmax(logits, -1).gather(-1, batch["labels"][:, 1:, None]).flatten()

    archive = NicheArchive(base, experts, score_points=likelihood, pop_size=4).run(8)
    assert set(archive.best()) == set(base)
    assert archive.scores.shape == (4, 33)
