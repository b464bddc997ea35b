"""PCB: the card's numbers, its invariants, its inspector, and the search for one λ a task."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from notebook_kit.merging import average, pcb, pcb_scores, pcb_search, ties
from notebook_kit.merging.pcb import statistics
from notebook_kit.weights import flatten

T = torch.tensor([[2.0, -1, 0.5, 0], [1, 1, -0.5, 2]])
ZERO, ROWS = {"w": torch.zeros(4)}, [{"w": row} for row in T]
FORMS = {"intra": ["exp", "softmax", "none"], "inter": ["sum", "votes", "pairwise_softmax", "none"]}


def rows_of(seed, n_experts=3, d=60):
    g = torch.Generator().manual_seed(seed)
    base = {"a": torch.randn(d // 3, generator=g), "b": torch.randn(2, d // 3, generator=g)}

    def draw():
        return {key: t + torch.randn(t.shape, generator=g) for key, t in base.items()}

    return base, [draw() for _ in range(n_experts)]


def changes(base, weights):
    return flatten(weights) - flatten(base)


def test_the_hand_worked_example():
    scores = pcb_scores(ZERO, ROWS, density=0.5, clip=0.0)
    expected = torch.tensor([[7.38906, 1.64872, 1.13315, 1], [1.24885, 1.24885, 1, 7.38906]])
    torch.testing.assert_close(scores.intra["w"] * math.e**2, expected, rtol=1e-5, atol=1e-5)
    agree = torch.tensor([[math.tanh(6), 0, 0, 0], [math.tanh(3), 0, 0, math.tanh(4)]])
    torch.testing.assert_close(scores.inter["w"], agree)
    assert scores.kept["w"].tolist() == [[1, 0, 0, 0], [0, 0, 0, 1]]
    assert scores.claims()["w"].tolist() == [1, 0, 0, 1]
    assert pcb(ZERO, ROWS, density=0.5, clip=0.0)["w"].tolist() == [2, 0, 0, 2]


def test_scale_weights_and_base():
    base = {"w": torch.ones(4)}
    experts = [{"w": 1 + row} for row in T]
    options = {"density": 0.5, "clip": 0.0}
    assert pcb(base, experts, scale=1.5, **options)["w"].tolist() == [4, 1, 1, 4]
    assert pcb(base, experts, weights=[2.0, 0.5], **options)["w"].tolist() == [5, 1, 1, 2]


@given(st.integers(0, 500), st.floats(0.05, 1), st.sampled_from(FORMS["intra"]), st.sampled_from(FORMS["inter"]))
@settings(deadline=None, max_examples=40)
def test_scores_and_merge_keep_their_promises(seed, density, intra, inter):
    base, experts = rows_of(seed)
    options = {"density": density, "intra": intra, "inter": inter, "clip": 0.0}
    kept = torch.cat([s.reshape(3, -1) for s in pcb_scores(base, experts, **options).kept.values()], dim=1)
    if intra == inter == "none":
        assert (kept == 1).all()
    else:
        assert (kept.amin(dim=1) == 0).all()
        assert ((kept > 0).sum(dim=1) <= math.ceil(density * 60)).all()
        assert all(row.max() == 1 or row.max() == 0 for row in kept)  # 0: so few are kept that only the best is left
    tau = torch.stack([changes(base, expert) for expert in experts])
    merged = changes(base, pcb(base, experts, **options))
    held = (kept > 0).any(dim=0)
    low = torch.where(kept > 0, tau, torch.inf).amin(dim=0)[held]
    high = torch.where(kept > 0, tau, -torch.inf).amax(dim=0)[held]
    assert ((merged[held] >= low - 1e-5) & (merged[held] <= high + 1e-5)).all()
    assert (merged[~held].abs() < 1e-6).all()
    twice = changes(base, pcb(base, experts, scale=2.0, **options))
    torch.testing.assert_close(twice, 2 * merged, rtol=1e-4, atol=1e-5)


def test_who_opposes_the_sum_is_dropped():
    base, experts = rows_of(3)
    tau = torch.stack([changes(base, expert) for expert in experts])
    opposes = tau * tau.sum(dim=0) < 0
    kept = torch.cat([s.reshape(3, -1) for s in pcb_scores(base, experts, density=0.3, clip=0.0).kept.values()], dim=1)
    assert opposes.any()
    assert not (kept[opposes] > 0).any()


def test_permuted_tasks_permute_the_scores():
    base, experts = rows_of(1)
    one, two = pcb_scores(base, experts), pcb_scores(base, [experts[i] for i in (2, 0, 1)])
    for key in base:
        torch.testing.assert_close(two.kept[key], one.kept[key][[2, 0, 1]], rtol=1e-5, atol=1e-6)


def test_copies_and_a_lone_task_are_trimmed_by_magnitude():
    base, experts = rows_of(2, d=300)
    for copies in (1, 4):
        merged = changes(base, pcb(base, [experts[0]] * copies, density=0.2, clip=0.0))
        tau = changes(base, experts[0])
        kept = merged != 0
        assert int(kept.sum()) == 59  # of the sixty best, the last is the threshold itself
        torch.testing.assert_close(merged[kept], tau[kept], rtol=1e-5, atol=1e-5)
        assert tau[kept].abs().min() > tau[~kept].abs().max() - 1e-6


def test_ratio_one_drops_the_worst_alone():
    base, experts = rows_of(5)
    kept = torch.cat([s.reshape(3, -1) for s in pcb_scores(base, experts, density=1.0).kept.values()], dim=1)
    assert ((kept == 0).sum(dim=1) == 1).all()


def test_disjoint_tasks_are_not_diluted():
    base = {"w": torch.zeros(40)}
    one, two = torch.zeros(40), torch.zeros(40)
    one[:20], two[20:] = torch.linspace(1, 2, 20), torch.linspace(-2, -1, 20)
    experts = [{"w": one}, {"w": two}]
    merged = pcb(base, experts, density=0.4, clip=0.0)["w"]
    kept = merged != 0
    assert int(kept.sum()) == 30
    torch.testing.assert_close(merged[kept], (one + two)[kept])
    torch.testing.assert_close(average(base, experts)["w"], (one + two) / 2)


def test_both_scores_off_is_the_average_and_a_step_is_near_ties():
    base, experts = rows_of(7)
    off = pcb(base, experts, intra="none", inter="none", clip=0.0)
    for key, mean in average(base, experts).items():
        torch.testing.assert_close(off[key], mean, rtol=1e-5, atol=1e-5)
    agree = changes(base, pcb(base, experts, intra="none", density=0.5, clip=0.0))
    elected = changes(base, ties(base, experts, density=1.0))
    kept = agree != 0
    assert (agree.sign() == elected.sign())[kept].all()


@pytest.mark.parametrize("zero", [torch.zeros(12), torch.full((12,), 0.5)])
def test_degenerate_rows_score_nothing(zero):
    base = {"w": torch.zeros(12)}
    merged = pcb(base, [{"w": zero}, {"w": torch.linspace(-1, 1, 12)}], density=0.5)
    assert torch.isfinite(merged["w"]).all()
    assert torch.equal(pcb(base, [{"w": torch.zeros(12)}] * 2, density=0.5)["w"], base["w"])


@pytest.mark.parametrize("power", [0.0, 4.0, 64.0])
def test_a_high_power_overflows_nothing(power):
    base, experts = rows_of(4)
    assert torch.isfinite(changes(base, pcb(base, experts, power=power))).all()
    many = [experts[i % 3] for i in range(120)]  # e^120 is no float32
    assert torch.isfinite(changes(base, pcb(base, many, density=0.5))).all()


def test_outliers_are_clipped_where_the_official_code_clips():
    base = {"w": torch.zeros(100)}
    tau = torch.arange(1.0, 101)
    merged = pcb(base, [{"w": tau}], density=1.0, clip=0.05)["w"]
    assert float(merged.max()) == 95  # sorted[int(100 · 0.95 − 1)]
    assert pcb(base, [{"w": tau}], density=1.0, clip=1e-4)["w"].max() == 99  # sorted[98]
    assert pcb(base, [{"w": tau}], density=1.0, clip=0.0)["w"].max() == 100


def test_levels_can_be_reused_with_other_weights():
    base, experts = rows_of(8)
    levels = statistics(base, experts, density=0.3)
    for weights in ([1.0, 1.0, 1.0], [0.5, 2.0, 1.0]):
        once = pcb(base, experts, density=0.3, weights=weights)
        again = pcb(base, experts, density=0.3, weights=weights, **levels)
        assert all(torch.equal(once[key], again[key]) for key in base)


# ---------------------------------------------------------------- the search
def target_score(base, experts, wanted):
    goal = flatten(pcb(base, experts, density=0.5, weights=wanted))
    return lambda weights: -float((flatten(weights) - goal).norm())


def test_the_search_finds_a_planted_answer():
    base, experts = rows_of(9)
    score = target_score(base, experts, [0.7, 1.6, 2.2])
    found = pcb_search(base, experts, score, budget=180, density=0.5)
    assert found.score > 0.1 * score(pcb(base, experts, density=0.5))
    assert found.weights == pytest.approx([0.7, 1.6, 2.2], abs=0.15)
    assert len(found.history) == len(found.trials) == 180
    assert found.history == sorted(found.history)
    assert found.history[-1] == found.score == {tuple(w): s for w, s in found.trials}[tuple(found.weights)]
    assert found.trials[0][0] == [1.0, 1.0, 1.0]
    assert all(0.5 <= w <= 3.0 for weights, _ in found.trials for w in weights)


@pytest.mark.parametrize("n_experts", [1, 2])
def test_the_search_reproduces_and_leaves_numpy_alone(n_experts):
    base, experts = rows_of(10, n_experts)
    score = target_score(base, experts, [1.3] * n_experts)
    before = np.random.get_state()[1].tolist()  # noqa: NPY002  the generator that cma would seed
    runs = [pcb_search(base, experts, score, budget=23, seed=seed, density=0.5) for seed in (0, 0, 1)]
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002
    assert runs[0] == runs[1]
    assert runs[0].trials != runs[2].trials
    assert all(len(weights) == n_experts for weights, _ in runs[0].trials)
    assert len(runs[0].history) == 23


def test_one_evaluation_is_the_start_and_nan_is_never_best():
    base, experts = rows_of(11)
    assert pcb_search(base, experts, lambda weights: 0.5, budget=1).weights == [1.0, 1.0, 1.0]
    answers = iter([0.1, float("nan"), 0.3] + [float("nan")] * 17)
    found = pcb_search(base, experts, lambda weights: next(answers), budget=20)
    assert (found.score, found.history[:3]) == (0.3, [0.1, 0.1, 0.3])


def test_what_the_search_refuses():
    base, experts = rows_of(12)
    with pytest.raises(ValueError, match=r"bounds must enclose 1, where the search starts, got \(1.5, 2\)"):
        pcb_search(base, experts, float, bounds=(1.5, 2))
    with pytest.raises(ValueError, match="weights is what pcb_search looks for"):
        pcb_search(base, experts, float, weights=[1, 1, 1])
    with pytest.raises(ValueError, match=r"budget must be in \[1, 100000\], got 0 \(pcb_search\)"):
        pcb_search(base, experts, float, budget=0)
    with pytest.raises(ValueError, match="density must be in"):
        pcb_search(base, experts, lambda weights: 0.0, density=2.0)


def test_scores_are_asked_for_as_the_merge_is():
    base, experts = rows_of(12)
    for wrong, text in (({"intra": "linear"}, "intra must be one of 'exp'"), ({"inter": "all"}, "inter must be")):
        with pytest.raises(ValueError, match=text):
            pcb_scores(base, experts, **wrong)
    shapes = {"w": torch.randn(3, 2), "empty": torch.zeros(0, 3), "scalar": torch.tensor(1.0)}
    scores = pcb_scores(shapes, [{name: t + 1 for name, t in shapes.items()}] * 2)
    assert {name: tuple(s.shape) for name, s in scores.kept.items()} == {"w": (2, 3, 2), "empty": (2, 0, 3),
                                                                         "scalar": (2,)}  # fmt: skip
