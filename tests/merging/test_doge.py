"""DOGE: the card's numbers, the gradient against autograd, the subspace, and each part switched off."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from notebook_kit.merging import adamerging, adamerging_path, doge, doge_details, doge_experts, load, merge_files, save
from notebook_kit.merging.doge_descent import Objective, coefficients, descend, shared_subspace

OPTIONS = {"subspace": 4, "steps": 40, "lr": 1e-2, "project": "grad", "shared_delta": True, "optimizer": "adam"}


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def loss_of(taus, lambdas, moved):
    """The official loss, task by task."""
    total, planned = 0.0, (lambdas[:, None, None] * taus).sum(0)
    for tau in taus:
        total += (tau * tau - tau * planned - tau * moved).sum(1).square().sum()
    return total


def models(count=3, shape=(8, 6), dtype=torch.float32):
    def build(seed):
        return {
            "w": random(seed, *shape).to(dtype),
            "v": random(seed + 9, 6, 8).to(dtype),
            "embed_tokens.weight": random(seed + 5, 4, 4).to(dtype),
            "b": random(seed, 8).to(dtype),
            "s": torch.tensor(1.0 + seed).to(dtype),
            "e": torch.zeros(0, 2, dtype=dtype),
            "i": torch.tensor([seed]),
        }

    return build(0), [build(i) for i in range(1, count + 1)]


# ---------------------------------------------------------------- the objective
def test_the_hand_worked_loss_and_gradient():
    taus, lambdas = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[0.0, 2.0], [0.0, 0.0]]]), torch.tensor([0.5, 0.5])
    objective = Objective(taus, lambdas)
    residual = objective.residual(torch.zeros(2, 2))
    assert float(residual.square().sum()) == 4.25
    assert objective.gradient(residual).tolist() == [[-1, -8], [0, 0]]


def test_an_exact_conflict_cannot_be_helped():
    tau = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    objective = Objective(torch.stack([tau, -tau]), torch.tensor([0.5, 0.5]))
    residual = objective.residual(torch.zeros(2, 2))
    assert float(residual.square().sum()) == 2
    assert not objective.gradient(residual).any()


@given(st.integers(1, 5), st.integers(0, 10**6), st.sampled_from([(5, 5), (4, 7), (7, 4)]))
@settings(deadline=None, max_examples=30)
def test_the_closed_form_is_autograds(count, seed, shape):
    taus, delta = random(seed, count, *shape), random(seed + 1, *shape).requires_grad_()
    lambdas = coefficients(taus, 0.3, True)
    objective = Objective(taus, lambdas)
    moved = lambdas.sum() * delta
    loss = loss_of(taus, lambdas, moved)
    loss.backward()
    residual = objective.residual(moved.detach())
    torch.testing.assert_close(residual.square().sum(), loss.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lambdas.sum() * objective.gradient(residual), delta.grad, rtol=1e-3, atol=1e-3)


@given(st.integers(0, 10**6), st.sampled_from(["grad", "step", "none"]), st.booleans())
@settings(deadline=None, max_examples=20)
def test_small_sgd_steps_never_raise_the_loss(seed, project, shared):
    taus = random(seed, 3, 6, 8)
    options = OPTIONS | {"optimizer": "sgd", "lr": 1e-4, "project": project, "shared_delta": shared}
    losses = descend(taus, coefficients(taus, 0.2, True), **options).losses
    assert (losses >= 0).all()
    assert (losses[1:] <= losses[:-1] * (1 + 1e-6)).all()


def test_independent_rows_can_be_satisfied_without_projection():
    taus = random(0, 3, 4, 10)
    options = OPTIONS | {"project": "none", "steps": 1500, "lr": 3e-2}
    found = descend(taus, coefficients(taus, 1.0, True), **options)
    assert found.losses[-1] < 1e-3 * found.losses[0]


# ---------------------------------------------------------------- the subspace
def test_the_shared_subspace_is_orthonormal_and_shared():
    common, g = random(0, 12, 1), 1
    taus = torch.stack([10 * common @ random(g + i, 1, 12) + random(20 + i, 12, 12) for i in range(3)])
    q, spectrum = shared_subspace(taus, 6)
    assert q.shape == (12, 2)
    torch.testing.assert_close(q.T @ q, torch.eye(2), rtol=0, atol=1e-5)
    projector = q @ q.T
    torch.testing.assert_close(projector @ projector, projector, rtol=0, atol=1e-5)
    assert float((q[:, 0] @ common[:, 0]).abs() / common.norm()) > 0.97
    assert spectrum[0].item() == pytest.approx(3**0.5, rel=0.02)  # all three share it
    assert shared_subspace(taus, 13)[0].shape == (12, 0)
    assert shared_subspace(random(3, 5, 4, 9), 2)[0].shape == (4, 0)  # more experts than directions


VARIANTS = [
    ({"project": "step"}, True),
    ({"optimizer": "sgd", "lr": 1e-3}, True),
    ({"project": "grad"}, False),
    ({"project": "none"}, False),
]


@pytest.mark.parametrize(("options", "exact"), VARIANTS)
def test_delta_avoids_the_subspace(options, exact):
    taus = random(0, 3, 9, 9)
    found = descend(taus, coefficients(taus, 0.3, True), **OPTIONS | options)
    inside = (found.subspace.T @ found.delta).norm()
    assert found.delta.norm() > 1e-3
    if exact:
        assert inside < 1e-5 * found.delta.norm()
    else:
        assert inside > 1e-3 * found.delta.norm()
    assert found.energy_inside() == pytest.approx(float(inside**2 / found.delta.square().sum()), abs=1e-6)


def test_all_protected_leaves_nothing_to_learn():
    # K divides min(m, n), so that the tasks' bases fill the whole space
    base, experts = {"w": torch.zeros(6, 8)}, [{"w": random(i, 6, 8)} for i in range(3)]
    for project in ("grad", "step"):
        moved = doge(base, experts, subspace=1, project=project, lr=1e-2)["w"]
        torch.testing.assert_close(moved, doge(base, experts, steps=0)["w"], rtol=1e-3, atol=2e-3 * 0.07)


def test_rows_that_no_task_touches_stay():
    taus = random(0, 2, 8, 8)
    taus[:, 5] = 0
    assert not descend(taus, coefficients(taus, 0.3, True), **OPTIONS).delta[:, 5].abs().max() > 1e-4


# ---------------------------------------------------------------- the merge
def test_without_steps_and_trimming_every_task_has_norm_eta():
    base, experts = models()
    for i in range(3):
        merged = doge(base, [experts[i]], eta=0.2, steps=0, density=1.0)
        for name in ("w", "v"):
            assert float((merged[name] - base[name]).norm()) == pytest.approx(0.2, rel=1e-4)
    merged = doge(base, experts, eta=0.2, steps=0, density=1.0)
    plan = sum(0.2 * (e["w"] - base["w"]) / (e["w"] - base["w"]).norm() for e in experts)
    torch.testing.assert_close(merged["w"], base["w"] + plan, rtol=1e-5, atol=1e-5)
    flat = doge(base, experts, eta=0.2, steps=0, density=1.0, norm_aware=False)
    torch.testing.assert_close(flat["w"], base["w"] + 0.2 * sum(e["w"] - base["w"] for e in experts))


def test_all_other_parameters_stay_at_base():
    base, experts = models()
    merged = doge(base, experts, density=0.5)
    assert all(torch.equal(merged[name], base[name]) for name in base if name not in ("w", "v"))
    assert not torch.equal(doge(base, experts, matrices="all")["embed_tokens.weight"], base["embed_tokens.weight"])


@pytest.mark.parametrize("density", [0.1, 0.3, 0.77])
def test_each_task_keeps_its_share_of_the_whole_model(density):
    base, experts = models()
    base = {name: torch.zeros_like(tensor) for name, tensor in base.items()}
    d = base["w"].numel() + base["v"].numel()
    for moved in doge_experts(base, experts, steps=0, density=density):
        assert int(moved["w"].count_nonzero() + moved["v"].count_nonzero()) == int(density * d)
    level = [{name: torch.ones_like(tensor) for name, tensor in base.items()}]
    (moved,) = doge_experts(base, level, steps=0, density=density)  # all magnitudes tie
    assert int(moved["w"].count_nonzero() + moved["v"].count_nonzero()) == int(density * d)


def test_the_mask_is_taken_from_the_task_vector_and_laid_on_both():
    base, experts = models(2)
    delta = doge_details(base, experts, lr=1e-2, eta=0.3)["w"][0].delta[0]
    one = doge_experts(base, experts, lr=1e-2, eta=0.3, density=0.4)[0]["w"] - base["w"]
    bare = doge_experts(base, experts, steps=0, density=0.4)[0]["w"] - base["w"]
    keep = bare != 0
    torch.testing.assert_close(one, keep * (experts[0]["w"] - base["w"] + delta), rtol=1e-4, atol=1e-5)


def test_the_order_of_tasks_does_not_matter():
    base, experts = models(3)
    one, other = (doge(base, order, lr=1e-3) for order in (experts, experts[::-1]))
    for name in base:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-3)


def test_one_delta_each():
    base, experts = models(3)
    found = doge_details(base, experts, shared_delta=False, subspace=3)["w"][0]
    assert found.delta.shape == (3, 8, 6)
    assert found.losses[-1] < found.losses[0]
    assert doge_details(base, experts)["w"][0].delta.shape == (1, 8, 6)
    adjusted = doge_experts(base, experts, shared_delta=False, subspace=3, density=1.0)
    combined = sum(lam * (one["w"] - base["w"]) for lam, one in zip(found.lambdas, adjusted, strict=True))
    merged = doge(base, experts, shared_delta=False, subspace=3, density=1.0)
    torch.testing.assert_close(merged["w"], base["w"] + combined, rtol=1e-4, atol=1e-5)


def test_transposed_tensors_and_fused_experts():
    taus = [random(i, 5, 8) for i in range(2)]
    plain = doge({"w": torch.zeros(5, 8)}, [{"w": tau} for tau in taus], eta=0.3, lr=1e-2)
    turned = {"base": {"c_fc.weight": torch.zeros(8, 5)}, "experts": [{"c_fc.weight": tau.T} for tau in taus]}
    merged = doge(turned["base"], turned["experts"], eta=0.3, lr=1e-2, transposed=r"c_fc\.weight$")
    torch.testing.assert_close(merged["c_fc.weight"], plain["w"].T)
    fused = [random(i, 3, 6, 4) for i in range(2)]
    merged = doge({"experts.w": torch.zeros(3, 6, 4)}, [{"experts.w": tau} for tau in fused], density=1.0, lr=1e-2)
    for e in range(3):
        one = doge({"w": torch.zeros(6, 4)}, [{"w": tau[e]} for tau in fused], density=1.0, lr=1e-2)
        torch.testing.assert_close(merged["experts.w"][e], one["w"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("count", [1, 10])
def test_precisions_and_numbers_of_experts(dtype, count):
    base, experts = models(count, dtype=dtype)
    merged = doge(base, experts, steps=20)
    assert list(merged) == list(base)
    for name, tensor in base.items():
        assert (merged[name].shape, merged[name].dtype) == (tensor.shape, tensor.dtype)
        assert torch.isfinite(merged[name].float()).all()


def test_a_task_that_never_moved_and_a_name_misspelt():
    base, experts = models(1)
    merged = doge(base, [base, experts[0]], steps=5)
    assert all(torch.isfinite(tensor.float()).all() for tensor in merged.values())
    with pytest.raises(ValueError, match="no hyperparameter 'step'"):
        doge_details(base, experts, step=3)
    with pytest.raises(ValueError, match=r"lr must be in"):
        doge_experts(base, experts, lr=1.0)
    with pytest.raises(ValueError, match=r"transposed must be a regular expression, got '\(': missing"):
        doge(base, experts, transposed="(")


def test_merge_files_streams_it(tmp_path):
    base, experts = models()
    paths = [save(weights, tmp_path / f"{i}.safetensors") for i, weights in enumerate((base, *experts))]
    out = merge_files(doge, paths[0], paths[1:], tmp_path / "out.safetensors", progress=False, steps=20)
    whole = doge(base, experts, steps=20)
    for name, tensor in load(out).items():
        torch.testing.assert_close(tensor, whole[name])


# ---------------------------------------------------------------- followed by AdaMerging
class Two(torch.nn.Module):
    """Reads with two matrices of `models`, and has its other tensors."""

    def __init__(self, weights):
        super().__init__()
        for name, tensor in weights.items():
            if "." not in name:
                tensor = tensor.clone()
                self.register_parameter(name, torch.nn.Parameter(tensor)) if tensor.is_floating_point() else (
                    self.register_buffer(name, tensor)
                )
        self.embed_tokens = torch.nn.Embedding.from_pretrained(weights["embed_tokens.weight"], freeze=False)

    def forward(self, x):
        return 0.1 * (self.s * (x @ self.w.T + self.b) @ self.v.T)


def entropy_run(base, count=3):
    batches = {str(i): random(70 + i, 30, 6) for i in range(count)}
    return {"model": Two(base), "batches": batches, "lr": 1e-2}


def test_adamerging_learns_the_coefficients_of_adjusted_experts():
    base, experts = models()
    adjusted = doge_experts(base, experts, shared_delta=False, subspace=3, steps=20, lr=1e-2, eta=0.3, density=0.5)
    path = adamerging_path(base, adjusted, steps=15, scale=0.3, **entropy_run(base))
    # it starts at the plain sum of what DOGE adjusted
    for name in base:
        expected = base[name].float() + 0.3 * sum(expert[name].float() - base[name].float() for expert in adjusted)
        torch.testing.assert_close(path.merged(0)[name].float(), expected, rtol=1e-4, atol=1e-5)
    assert path.losses[-1].sum() < path.losses[0].sum() - 0.01
    # only what DOGE treats has a task vector, so only its coefficients move, and the rest stays at the base
    moved = (path.coefficients[-1] - path.coefficients[0]).abs().amax(0)
    assert {name for name, size in zip(path.layers, moved.tolist(), strict=True) if size > 0} == {"w", "v"}
    merged = path.merged()
    assert all(torch.equal(merged[name], base[name]) for name in base if name not in ("w", "v"))
    assert torch.equal(adamerging(base, adjusted, steps=15, scale=0.3, **entropy_run(base))["w"], merged["w"])


def test_a_single_task_and_no_step_of_either_is_the_trimmed_expert():
    base, experts = models(1)
    adjusted = doge_experts(base, experts, shared_delta=False, subspace=1, steps=0, density=0.5)
    merged = adamerging(base, adjusted, steps=0, scale=1.0, **entropy_run(base, 1))
    kept = {name: merged[name] != base[name] for name in ("w", "v")}
    assert sum(int(mask.sum()) for mask in kept.values()) == (8 * 6 + 6 * 8) // 2
    for name, mask in kept.items():
        torch.testing.assert_close(merged[name][mask], experts[0][name][mask])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_both_in_half_precision(dtype):
    base, experts = models(2, dtype=dtype)
    adjusted = doge_experts(base, experts, shared_delta=False, subspace=2, steps=10, density=0.5)
    run = entropy_run({name: t.float() if t.is_floating_point() else t for name, t in base.items()}, 2)
    merged = adamerging(base, adjusted, steps=3, **run)
    assert all((merged[name].dtype, merged[name].shape) == (t.dtype, t.shape) for name, t in base.items())
    assert all(torch.isfinite(t.float()).all() for t in merged.values())
