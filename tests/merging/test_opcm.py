"""OPCM: the card's numbers, orthogonality for every alpha, constant memory, saving and going on."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from notebook_kit.merging import Opcm, average, continual, merge_files, opcm, save, task_arithmetic, ties
from notebook_kit.merging.opcm import statistics
from notebook_kit.merging.opcm_project import project, split_rank


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def models(count, *, dtype=torch.float32, shape=(6, 9)):
    """A base and experts of a matrix, a vector, a scalar, an empty tensor and an integer."""

    def build(seed):
        return {
            "w": random(seed, *shape).to(dtype),
            "embed_tokens.weight": random(seed + 50, 5, 4).to(dtype),
            "b": random(seed + 99, 6).to(dtype),
            "s": torch.tensor(float(seed)).to(dtype),
            "e": torch.zeros(0, 3, dtype=dtype),
            "i": torch.tensor([seed]),
        }

    return build(0), [build(i) for i in range(1, count + 1)]


def full_project(d, m, alpha):
    """The official code, with square U and V."""
    u, s, vh = torch.linalg.svd(m, full_matrices=True)
    r = int((s.cumsum(0) / s.sum() > alpha).float().argmax())
    p = u.T @ d @ vh.T
    p.diagonal().fill_(0)
    p[:r, :r] = 0
    return u @ p @ vh


def distance(one, other):
    floats = [name for name in one if one[name].is_floating_point()]
    return sum(float((one[name].double() - other[name].double()).square().sum()) for name in floats) ** 0.5


# ---------------------------------------------------------------- by hand
def test_the_hand_worked_example():
    m, d = torch.diag(torch.tensor([2.0, 1.0])), torch.tensor([[3.0, 1.0], [2.0, 4.0]])
    torch.testing.assert_close(project(d, m, 0.0).update, torch.tensor([[0.0, 1.0], [2.0, 0.0]]))
    base = {"w": torch.zeros(2, 2)}
    merge = Opcm(base, alpha=0.0)
    assert merge.add({"w": m}).norm == pytest.approx(5**0.5)
    step = merge.add({"w": d})
    assert step.norm == pytest.approx(30**0.5)
    assert step.lambda_t == pytest.approx(0.81996, abs=1e-5)
    assert step.removed == {"w": pytest.approx(25 / 30)}
    expected = torch.tensor([[2.43916, 1.21958], [2.43916, 1.21958]])
    torch.testing.assert_close(merge.merged["w"], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(opcm(base, [{"w": m}, {"w": d}], alpha=0.0)["w"], expected, rtol=1e-5, atol=1e-5)


def test_split_ranks():
    sigma = torch.tensor([4.0, 3.0, 2.0, 1.0])
    assert [split_rank(sigma, alpha) for alpha in (0, 0.39, 0.41, 0.71, 0.95, 1)] == [0, 0, 1, 2, 3, 4]


# ---------------------------------------------------------------- the projection
@given(st.integers(0, 10**6), st.floats(0, 1), st.sampled_from([(6, 6), (5, 9), (9, 5)]), st.booleans())
@settings(deadline=None, max_examples=40)
def test_the_update_is_orthogonal_to_the_merge_and_no_longer(seed, alpha, shape, cross):
    d, m = random(seed, *shape), random(seed + 1, *shape)
    update, r, removed = project(d, m, alpha, "cross" if cross else "corner")
    assert abs(float((update * m).sum())) < 1e-5 * float(d.norm() * m.norm())
    assert update.norm() <= d.norm() * (1 + 1e-6)
    assert 0 <= r <= 5 + (shape == (6, 6))
    assert removed == pytest.approx(1 - float(update.square().sum() / d.square().sum()), abs=1e-5)
    if not cross and alpha < 0.99:
        torch.testing.assert_close(update, full_project(d, m, alpha), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("block", ["corner", "cross"])
def test_more_alpha_leaves_less(block):
    d, m = random(0, 8, 8), random(1, 8, 8)
    lengths = [float(project(d, m, alpha, block).update.norm()) for alpha in (0, 0.3, 0.6, 0.9, 1)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[-1] < 1e-4


def test_cross_keeps_only_what_touches_no_protected_direction():
    d, m = random(0, 7, 9), random(1, 7, 9)
    update, r, _ = project(d, m, 0.5, "cross")
    u, _, vh = torch.linalg.svd(m, full_matrices=True)
    p = u.T @ update @ vh.T
    assert 0 < r < 7
    assert p[:r].abs().max() < 1e-4
    assert p[:, :r].abs().max() < 1e-4
    assert p.diagonal().abs().max() < 1e-4
    reference = u.T @ d @ vh.T
    reference[:r], reference[:, :r] = 0, 0
    reference.diagonal().fill_(0)
    torch.testing.assert_close(p, reference, rtol=1e-3, atol=1e-4)


def test_what_lies_outside_both_subspaces_passes_untouched():
    q, _ = torch.linalg.qr(random(0, 8, 8))
    p, _ = torch.linalg.qr(random(1, 8, 8))
    m = q[:, :3] @ torch.diag(torch.tensor([3.0, 2.0, 1.0])) @ p[:, :3].T
    d = q[:, 3:] @ random(2, 5, 5) @ p[:, 3:].T
    for block in ("corner", "cross"):
        torch.testing.assert_close(project(d, m, 1.0, block).update, d, rtol=1e-4, atol=1e-4)
    assert project(d, torch.zeros(8, 8), 0.5) == (d, 0, 0.0)
    assert project(torch.zeros(8, 8), m, 0.5).removed == 0


# ---------------------------------------------------------------- the whole model
def test_the_first_expert_is_the_merge():
    base, (expert,) = models(1)
    merged = opcm(base, [expert])
    for name in base:
        torch.testing.assert_close(merged[name], base[name] if name == "i" else expert[name])


@pytest.mark.parametrize("options", [{}, {"alpha": 0.9, "block": "cross"}, {"project": False}, {"matrices": "all"}])
def test_the_merge_stays_as_far_from_base_as_the_average_expert(options):
    base, experts = models(10)
    merge, lengths = Opcm(base, **options), []
    for expert in experts:
        merge.add(expert)
        lengths.append(distance(expert, base))
        assert distance(merge.merged, base) == pytest.approx(sum(lengths) / len(lengths), rel=1e-5)


def test_without_rescaling_and_projection_it_is_a_running_sum():
    base, experts = models(3)
    merged = opcm(base, experts, rescale=False, project=False)
    total = task_arithmetic(base, experts, scale=1.0)
    for name in base:
        torch.testing.assert_close(merged[name], total[name], rtol=1e-5, atol=1e-5)


def test_a_repeated_expert_changes_nothing_but_the_scale():
    base, (expert, _) = models(2)
    merge = Opcm(base, rescale=False)
    merge.add(expert)
    step = merge.add(expert)
    torch.testing.assert_close(merge.merged["w"], expert["w"], rtol=1e-4, atol=1e-4)
    assert step.removed["w"] == pytest.approx(1, abs=1e-5)


def test_orthogonal_equally_long_experts_give_the_root_of_t():
    merge = Opcm({"w": torch.zeros(4, 4)})
    for t in range(4):
        tau = torch.zeros(4, 4)
        tau[t, (t + 1) % 4] = 2.0
        assert merge.add({"w": tau}).lambda_t == pytest.approx((t + 1) ** 0.5, rel=1e-5)


def test_embeddings_vectors_and_fused_experts():
    base, experts = models(2)
    linear, every = Opcm(base), Opcm(base, matrices="all")
    steps = [[merge.add(expert) for expert in experts][-1] for merge in (linear, every)]
    assert set(steps[0].removed) == {"w"}
    assert set(steps[1].removed) == {"w", "embed_tokens.weight"}
    fused = [random(i, 3, 5, 4) for i in range(2)]
    merged = opcm({"experts.w": torch.zeros(3, 5, 4)}, [{"experts.w": tau} for tau in fused], rescale=False)
    for e in range(3):
        one = opcm({"w": torch.zeros(5, 4)}, [{"w": tau[e]} for tau in fused], rescale=False)["w"]
        torch.testing.assert_close(merged["experts.w"][e], one)


def test_an_order_is_drawn_by_the_seed():
    base, experts = models(5)
    given_order = opcm(base, experts)["w"]
    assert torch.equal(opcm(base, experts, shuffle_order=True, seed=3)["w"],
                       opcm(base, experts, shuffle_order=True, seed=3)["w"])  # fmt: skip
    assert any(not torch.allclose(opcm(base, experts, shuffle_order=True, seed=s)["w"], given_order) for s in range(3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    base, experts = models(3, dtype=dtype)
    merged = opcm(base, experts)
    assert all(merged[name].dtype == base[name].dtype and merged[name].shape == base[name].shape for name in base)

    def wide(weights):
        return {name: t.float() if t.is_floating_point() else t for name, t in weights.items()}

    reference = opcm(wide(base), [wide(expert) for expert in experts])
    for name in ("w", "b"):
        torch.testing.assert_close(merged[name].float(), reference[name], rtol=2e-2, atol=2e-2)


def test_experts_that_never_moved():
    base, _ = models(1)
    merged = opcm(base, [base, base])
    assert all(torch.equal(merged[name], base[name]) for name in base)


# ---------------------------------------------------------------- a stream
def test_saved_and_loaded_it_goes_on_to_the_same_merge(tmp_path):
    base, experts = models(6)
    whole, half = Opcm(base, alpha=0.3, block="cross"), Opcm(base, alpha=0.3, block="cross")
    for expert in experts[:3]:
        half.add(expert)
    again = Opcm.load(half.save(tmp_path / "state.safetensors"))
    assert (again.settings, again.count, again.norms) == (half.settings, half.count, half.norms)
    for expert in experts[3:]:
        again.add(expert)
    for expert in experts:
        whole.add(expert)
    for name in base:
        assert torch.equal(again.merged[name], whole.merged[name])


def test_the_state_does_not_grow_with_the_number_of_experts(tmp_path):
    base, experts = models(8)
    merge, sizes = Opcm(base), []
    for expert in experts:
        merge.add(expert)
        sizes.append(merge.save(tmp_path / "state.safetensors").stat().st_size)
    assert len(set(sizes)) == 1


def test_inputs_stay_and_nothing_is_shared():
    base, experts = models(3)
    before = [{name: tensor.clone() for name, tensor in weights.items()} for weights in (base, *experts)]
    merge = Opcm(base)
    for expert in experts:
        merge.add(expert)
    for tensor in merge.merged.values():
        tensor.zero_()
    for tensor in Opcm(base).merged.values():
        tensor.zero_()
    for weights, copy in zip((base, *experts), before, strict=True):
        assert all(torch.equal(weights[name], copy[name]) for name in copy)


def test_errors_name_the_thing(tmp_path):
    base, (expert,) = models(1)
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\], got 2 \(Opcm\)"):
        Opcm(base, alpha=2)
    with pytest.raises(ValueError, match="'w': shape"):
        Opcm(base).add({**expert, "w": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match=r"holds no 'opcm.state'"):
        Opcm.load(save({"w": torch.zeros(2)}, tmp_path / "other.safetensors"))


def test_merge_files_streams_it(tmp_path):
    base, experts = models(3)
    paths = [save(weights, tmp_path / f"{i}.safetensors") for i, weights in enumerate((base, *experts))]
    from notebook_kit.merging import load

    settings_ = {"alpha": 0.4, "shuffle_order": True, "seed": 2}
    out = merge_files(opcm, paths[0], paths[1:], tmp_path / "out.safetensors", progress=False, **settings_)
    whole = opcm(base, experts, **settings_)
    for name, tensor in load(out).items():
        torch.testing.assert_close(tensor, whole[name])
    assert statistics(base, experts, rescale=False) == {"lambda_t": 1.0}


# ---------------------------------------------------------------- the baselines
def test_continual_baselines():
    base, experts = models(4)
    *_, mean = continual(base, iter(experts))
    *_, added = continual(base, experts, rule="task_arithmetic", scale=0.2)
    for name, tensor in average(base, experts).items():
        torch.testing.assert_close(mean[name], tensor)
        torch.testing.assert_close(added[name], task_arithmetic(base, experts, scale=0.2)[name])
    first, second, *_ = continual(base, experts, rule="ties", scale=0.5, density=0.4)
    torch.testing.assert_close(first["w"], (base["w"] + experts[0]["w"]) / 2)
    joined = ties(base, [first, experts[1]], density=0.4, combine="sum")
    torch.testing.assert_close(second["w"], first["w"] + 0.5 * (joined["w"] - base["w"]))
    with pytest.raises(ValueError, match="rule must be one of"):
        next(continual(base, experts, rule="slerp"))
