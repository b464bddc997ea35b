"""Curvature against independent code: autograd loops, torch's own Adam, float64 formulas, and the ports' rules."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from notebook_kit.data import digit_labelings
from notebook_kit.merging import diagonal_fisher, fisher, gram_matrices, ota, regmean, squared_gradients
from notebook_kit.zoo import digit_labels, digit_views

close = torch.testing.assert_close


@pytest.fixture(scope="module")
def labels():
    bed = digit_labels()
    data, columns, first = bed.batches("train"), {}, 0
    for name, labeling in digit_labelings().items():
        columns[name] = slice(first, first + labeling.n_classes)
        first += labeling.n_classes
    return bed, data, columns


def expert(bed, i):
    bed.model.load_state_dict(bed.experts[i])
    return bed.model


def test_the_exact_fisher_is_a_loop_over_examples_and_classes(labels):
    bed, data, columns = labels
    model, x = expert(bed, 3), data["mod_three"][0][:6]
    ours = diagonal_fisher(model, [x], logits=lambda z: z[:, columns["mod_three"]])
    sums = [torch.zeros_like(p) for p in model.parameters()]
    for row in x:
        for c in range(3):
            log_p = model(row[None])[0, columns["mod_three"]].log_softmax(-1)
            gradients = torch.autograd.grad(log_p[c], list(model.parameters()))
            for total, g in zip(sums, gradients, strict=True):
                total += log_p[c].exp().detach() * g.square()
    for tensor, total in zip(ours.values(), sums, strict=True):
        close(tensor, total / 6, rtol=1e-4, atol=1e-9)


def test_the_ports_squared_batch_sum_is_not_it(labels):
    """fusion_bench: one backward of Σ_n Σ_c √p log p, then squared. For one example of one class they would agree."""
    bed, data, columns = labels
    model, x = expert(bed, 1), data["parity"][0][:32]
    ours = diagonal_fisher(model, [x], logits=lambda z: z[:, columns["parity"]])["layers.0.weight"]
    log_p = model(x)[:, columns["parity"]].log_softmax(-1)
    port = torch.autograd.grad((log_p.exp().detach().sqrt() * log_p).sum(), model.layers[0].weight)[0].square() / 32
    assert float((port - ours).norm() / ours.norm()) > 0.1


def test_fisher_merging_of_trained_experts_in_float64(labels):
    bed, data, columns = labels
    names = ("digit", "parity", "ink")
    experts = [bed.experts[bed.names.index(name)] for name in names]
    fishers = [
        diagonal_fisher(
            expert(bed, bed.names.index(name)), [data[name][0][:20]], logits=lambda z, n=name: z[:, columns[n]]
        )
        for name in names
    ]
    weights, floor = [0.5, 0.2, 0.3], 1e-6
    merged = fisher(bed.base, experts, fishers=fishers, weights=weights)
    norms = [sum(f.double().square().sum() for f in one.values()).sqrt() for one in fishers]
    for key in bed.base:
        loud = [
            w / norm * (f[key].double().clamp(min=floor) if i == 0 else f[key].double())
            for i, (w, norm, f) in enumerate(zip(weights, norms, fishers, strict=True))
        ]
        expected = sum(p * e[key].double() for p, e in zip(loud, experts, strict=True)) / sum(loud)
        close(merged[key].double(), expected, rtol=1e-5, atol=1e-5)


def test_regmean_of_trained_experts_is_numpys_least_squares():
    import numpy as np

    bed = digit_views()
    data, grams, inputs = bed.batches("train"), [], []
    for i, name in enumerate(bed.names):
        grams.append(gram_matrices(expert(bed, i), [data[name][0][:200]]))
        inputs.append(data[name][0][:200].double().numpy())
    ours = regmean(bed.base, bed.experts, grams=grams, alpha=1.0, ridge=1e-9)["layers.0.weight"].double().numpy()
    W = [e["layers.0.weight"].double().numpy() for e in bed.experts]
    rows, target = np.concatenate(inputs), np.concatenate([x @ w.T for x, w in zip(inputs, W, strict=True)])
    expected = np.linalg.lstsq(rows, target, rcond=None)[0].T

    def loss(w):
        return float(np.square(rows @ w.T - target).mean())

    assert loss(ours) <= loss(expected) * (1 + 1e-4)
    close(torch.tensor(rows @ ours.T), torch.tensor(rows @ expected.T), rtol=1e-3, atol=1e-3)


def test_ota_is_the_official_task_on_each_tensor():
    """pmahdavi/ota-merge, OTAMergeTask in a few lines: its masks are by a given threshold, as here they come out."""
    g = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(9, 7, generator=g)}
    experts = [{"w": base["w"] + torch.randn(9, 7, generator=g)} for _ in range(3)]
    moments = [{"w": torch.rand(9, 7, generator=g) ** 6} for _ in range(3)]
    kept, epsilon, power = 25, 1e-26, 0.5
    ours = ota(base, experts, moments=moments, density=kept / 63 + 1e-6)["w"]
    stacked, weights = torch.stack([e["w"] for e in experts]) - base["w"], []
    for e, v in zip(experts, moments, strict=True):
        pc = v["w"]
        score = pc * torch.pow(e["w"] - base["w"], 2)
        mask = score >= score.flatten().topk(kept).values[-1]
        weights.append((torch.pow(pc, power) + epsilon) * mask)
    weights = torch.stack(weights)
    total = weights.sum(dim=0)
    theirs = torch.where(total <= 3 * epsilon * 1.1, base["w"], base["w"] + (weights * stacked).sum(dim=0) / total)
    close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_squared_gradients_are_what_adam_would_gather_at_a_standstill():
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    x, y = torch.randn(64, 4), torch.randint(0, 3, (64,))
    batches = [(x[i : i + 8], y[i : i + 8]) for i in range(0, 64, 8)]

    def loss(m, batch):
        return F.cross_entropy(m(batch[0]), batch[1])

    seen = squared_gradients(model, batches, loss)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0, betas=(0.9, 0.999))
    for _ in range(5):
        for batch in batches:
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()
    v = optimizer.state[model.weight]["exp_avg_sq"] / (1 - 0.999**40)
    close(seen["weight"], v, rtol=0.02, atol=1e-6)
