import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from notebook_kit.merging import (
    FlatSpace,
    IncompatibleWeights,
    NicheArchive,
    PointScores,
    load,
    m2n2,
    merge_files,
    random_weights,
    save,
)
from notebook_kit.merging.niches import attraction, competition, coverage, diversity, fitness, mix
from notebook_kit.weights import flatten
from tests.merging.searching import Odd, copies, odd_data, odd_weights, unchanged

S = torch.tensor([[1.0, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]])
ROW = {"w": torch.zeros(6)}


def points(weights):
    """Six points; each asks that one weight is above one half."""
    return (weights["w"] > 0.5).float()


def rows(*values):
    return [{"w": torch.tensor(value, dtype=torch.float32)} for value in values]


def planted(scores, **how):
    """An archive whose members score as the rows say: weights and scores are the same numbers."""
    base = {"w": torch.zeros(scores.shape[1])}
    return NicheArchive(base, rows(*scores.tolist()), score_points=points, pop_size=len(scores), **how)


# ---------------------------------------------------------------- worked by hand
def test_competition_and_attraction_of_three_models():
    assert fitness(S).tolist() == [1, 2, 1]
    assert fitness(S, alpha=0.0).tolist() == [2, 3, 1]
    assert [attraction(S, i).tolist() for i in range(3)] == [[0, 1, 1], [0, 0, 1], [1, 2, 0]]
    assert fitness(S, alpha=2.0).tolist() == [0.5, 1.5, 1]
    assert coverage(S) == 1
    third = -(1 / 3) * torch.log2(torch.tensor(1 / 3)) - (2 / 3) * torch.log2(torch.tensor(2 / 3))
    assert diversity(S) == pytest.approx(float(third))
    assert diversity(S[:1]) == 0


def test_the_only_mate_of_the_strong_model_is_the_one_that_differs():
    archive = planted(S)
    pairs = {archive.pair() for _ in range(200)}
    assert {b for a, b in pairs if a == 1} == {2}
    assert {a for a, _ in pairs} == {0, 1, 2}
    assert not any(a == b for a, b in pairs)


def test_a_model_without_a_mate_mates_itself():
    archive = NicheArchive(ROW, rows([1, 1, 1, 1, 1, 1]), score_points=points, pop_size=4)
    assert {archive.pair() for _ in range(20)} == {(0, 0)}
    archive.step()
    assert torch.allclose(archive.births[0].scores, archive.scores[0])


def test_crossover_by_hand():
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])  # at a right angle
    half = torch.tensor([0.5])
    torch.testing.assert_close(mix(a, b, half, torch.tensor([2])), torch.full((1, 2), 0.5**0.5))
    child = mix(a, b, torch.tensor([0.2]), torch.tensor([1]))  # t is 0.2, then 0.8
    angles = torch.tensor([0.8, 0.8]) * torch.pi / 2
    torch.testing.assert_close(child[0], angles.sin())
    line = mix(a, 3 * a, torch.tensor([0.25]), torch.tensor([2]))  # no angle: a straight line
    torch.testing.assert_close(line, torch.tensor([[1.5, 0.0]]))
    torch.testing.assert_close(mix(a, -a, half, torch.tensor([2])), torch.zeros(1, 2), atol=1e-5, rtol=0)
    parts = mix(a, b, torch.tensor([0.25]), torch.tensor([1]), "part")  # a part of zeros has no angle
    torch.testing.assert_close(parts, torch.tensor([[0.75, 0.75]]))


# ---------------------------------------------------------------- invariants
matrices = st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(0, 10**6))


def binary(shape):
    models, n, seed = shape
    return torch.randint(2, (models, n), generator=torch.Generator().manual_seed(seed)).float()


@given(matrices)
@settings(deadline=None, max_examples=40)
def test_food_is_shared_out_exactly(shape):
    scores = binary(shape)
    solved = scores.max(0).values
    assert float(fitness(scores).sum()) == pytest.approx(float(solved.sum()), abs=1e-4)
    torch.testing.assert_close(competition(scores, 1.0).sum(0), solved)
    torch.testing.assert_close(fitness(scores, 0.0), scores.sum(1))
    alone = scores * (scores.sum(0) == 1)
    assert (fitness(scores) >= alone.sum(1) - 1e-5).all()
    twice = fitness(torch.cat([scores, scores[:1]]))
    assert float(twice[0]) == pytest.approx(float(twice[-1]))
    assert float(twice[0]) <= float(fitness(scores)[0]) + 1e-5
    for i in range(len(scores)):
        g = attraction(scores, i)
        assert g[i] == 0
        assert (g >= 0).all()
    assert 0 <= diversity(scores) <= 1 + 1e-6


@given(st.integers(0, 10**6), st.integers(0, 12), st.floats(0, 1), st.sampled_from(["global", "part"]))
@settings(deadline=None, max_examples=40)
def test_crossover_promises(seed, k, w, angle):
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 1, 12, generator=g)
    split, weight = torch.tensor([k]), torch.tensor([w])
    torch.testing.assert_close(mix(a, a, weight, split, angle), a, rtol=1e-4, atol=1e-5)
    none = torch.tensor([0])  # nothing before the split: t = 1 − w everywhere
    torch.testing.assert_close(mix(a, b, torch.tensor([0.0]), none, angle), b)
    torch.testing.assert_close(mix(a, b, torch.tensor([1.0]), none, angle), a)
    unit_a, unit_b = a / a.norm(), b / b.norm()
    whole = mix(unit_a, unit_b, weight, torch.tensor([12]), angle)
    assert float(whole.norm()) == pytest.approx(1, abs=1e-4)
    child = mix(a, b, weight, split)
    before, after = (mix(a, b, torch.tensor([t]), torch.tensor([12])) for t in (w, 1 - w))
    torch.testing.assert_close(child[:, :k], before[:, :k])
    torch.testing.assert_close(child[:, k:], after[:, k:])
    several = mix(torch.cat([a, b]), torch.cat([b, a]), weight.repeat(2), split.repeat(2), angle)
    torch.testing.assert_close(several[:1], mix(a, b, weight, split, angle))


def test_the_lowest_leaves_and_the_child_counts_in_the_competition():
    archive = planted(S)
    assert archive.insert(torch.zeros(4), torch.zeros(4)) is None  # worse than all: discarded
    # With the child, point 0 is shared by three: f = [5/6, 11/6, 1, 1/3], so the child leaves again.
    assert archive.insert(torch.ones(4), torch.tensor([1.0, 0, 0, 0])) is None
    # It alone brings nothing new, but takes half of the last point: f = [1, 2, 1/2, 1/2], the first of the two leaves.
    assert archive.insert(torch.full((4,), 7.0), torch.tensor([0.0, 0, 0, 1])) == 2
    assert archive.flat[2].tolist() == [7, 7, 7, 7]
    assert len(archive.scores) == 3


def test_empty_rows_leave_first_and_are_never_drawn():
    archive = NicheArchive(ROW, rows([1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1]), score_points=points, pop_size=5)
    assert {index for _ in range(100) for index in archive.pair()} <= {0, 1}
    assert archive.fitness.tolist() == [1, 1, 0, 0, 0]
    assert archive.insert(torch.ones(6), torch.tensor([0.0, 1, 0, 0, 0, 0])) == 2


def test_the_best_never_falls_without_competition_and_may_with_it():
    g = torch.Generator().manual_seed(3)
    experts = [{"w": torch.randn(40, generator=g)} for _ in range(4)]
    base = {"w": torch.zeros(40)}
    for seed in range(5):
        archive = NicheArchive(base, experts, score_points=points, pop_size=5, alpha=0.0, mutation_std=0.3, seed=seed)
        archive.run(80)
        best = [row["best"] for row in archive.history]
        assert best == sorted(best)
    # Each of its four points is known to others too; a child that knows a seventh point makes it the lowest, 5/3.
    archive = planted(torch.tensor([[1.0, 1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 1, 0, 0], [0, 0, 1, 1, 0, 1, 0]]))
    assert archive.insert(torch.zeros(7), torch.tensor([0.0, 0, 1, 1, 0, 0, 1])) == 0
    assert archive.scores.sum(1).tolist() == [3, 3, 3]
    assert archive.scores.max(0).values.tolist() == [1] * 7


@pytest.mark.parametrize("how", [{}, {"matchmaker": False}, {"splitpoint": False}, {"angle": "part"}, {"children": 4}])
def test_evolution_joins_two_specialists(how):
    """Point i is solved where weight i is large: a child that takes the right half of each parent solves them all."""
    base = {"w": torch.zeros(20)}
    a, b = torch.ones(20) * 0.01, torch.ones(20) * 0.01
    a[:10], b[10:] = 1.0, 1.0
    archive = NicheArchive(base, [{"w": a}, {"w": b}], score_points=points, pop_size=8, **how).run(150)
    assert archive.evaluations == 150
    assert archive.history[0]["best"] == 0.5
    assert archive.history[-1]["best"] > 0.9
    assert archive.history[-1]["coverage"] == 1
    assert points(archive.best()).mean() == pytest.approx(archive.history[-1]["best"])
    again = NicheArchive(base, [{"w": a}, {"w": b}], score_points=points, pop_size=8, **how).run(150)
    assert torch.equal(archive.flat, again.flat)
    other = NicheArchive(base, [{"w": a}, {"w": b}], score_points=points, pop_size=8, seed=1, **how).run(150)
    assert not torch.equal(archive.flat, other.flat)


def test_without_crossover_only_mutation_changes_anything():
    archive = NicheArchive(ROW, rows([1, 0, 0, 0, 0, 0]), score_points=points, pop_size=3, crossover=False).run(10)
    assert set(map(tuple, archive.flat.tolist())) == {(1.0, 0, 0, 0, 0, 0)}
    wild = NicheArchive(ROW, rows([1.0] * 6), score_points=points, pop_size=3, crossover=False, mutation_std=1.0)
    assert not torch.equal(wild.run(10).flat, archive.flat)


def test_a_birth_tells_what_happened():
    archive = planted(S, seed=2)
    before = archive.flat.clone()
    (birth,) = archive.step()
    a, b = birth.parents
    child = mix(before[a][None], before[b][None], torch.tensor([birth.w]), torch.tensor([birth.split]))[0]
    torch.testing.assert_close(points({"w": child}), birth.scores)
    if birth.replaced is not None:
        torch.testing.assert_close(archive.flat[birth.replaced], child)


# ---------------------------------------------------------------- real weights
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 10])
def test_the_result_looks_like_base_and_inputs_stay(dtype, count):
    base, experts = odd_weights(0, dtype), [odd_weights(seed, dtype) for seed in range(1, count + 1)]
    before = copies(base, *experts)
    x, y = odd_data()["north"]
    score = PointScores(Odd(), x.to(dtype), y)
    merged = m2n2(base, experts, score_points=score, evals=20, children=3)
    assert list(merged) == list(base)
    assert all((merged[k].shape, merged[k].dtype) == (t.shape, t.dtype) for k, t in base.items())
    assert torch.equal(merged["steps"], base["steps"])
    best = max(float(score(expert).mean()) for expert in experts)
    assert float(score(merged).mean()) >= best - 0.35
    for tensor in merged.values():
        tensor.zero_()
    assert all(unchanged(copy, now) for copy, now in zip(before, (base, *experts), strict=True))


def test_several_models_score_as_one_by_one():
    (x, y), (_, other) = odd_data().values()
    score = PointScores(Odd(), x, torch.stack([y % 2, other * 0], 1), [slice(0, 2), slice(2, 3)])
    models = [odd_weights(seed) for seed in range(5)]
    space = FlatSpace(models[0])
    together = score.stacked(space, space.flatten(models))
    assert torch.equal(together, torch.stack([score(weights) for weights in models]))
    assert together.shape == (5, 24)
    assert (together[:, 12:] == 1).all()


def test_random_weights_are_small_and_seeded():
    base = odd_weights(0)
    first, second = random_weights(base, 2, std=0.01)
    assert torch.equal(first["weight"], random_weights(base, 1)[0]["weight"])
    assert not torch.equal(first["weight"], second["weight"])
    assert 0.003 < float(flatten(first).std()) < 0.03
    assert torch.equal(first["steps"], base["steps"])


def test_files_merge_as_the_whole_model_does(tmp_path):
    models = [odd_weights(seed) for seed in range(3)]
    paths = [save(weights, tmp_path / f"{i}.safetensors") for i, weights in enumerate(models)]
    settings = {"score_points": PointScores(Odd(), *odd_data()["north"]), "evals": 12}
    merge_files(m2n2, paths[0], paths[1:], tmp_path / "merged.safetensors", progress=False, **settings)
    assert unchanged(m2n2(models[0], models[1:], **settings), load(tmp_path / "merged.safetensors"))


# ---------------------------------------------------------------- what it refuses
def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"pop_size must be at least the number of experts, 3, got 2"):
        m2n2(ROW, rows(*torch.eye(6)[:3].tolist()), score_points=points, pop_size=2)
    with pytest.raises(ValueError, match=r"scores in \[0, 1\] .*, got \[1, 6\] in \[2, 2\]"):
        m2n2(ROW, rows([0.0] * 6), score_points=lambda weights: weights["w"] + 2)
    with pytest.raises(TypeError, match=r"must give a tensor of scores \[points\], as long for all models, got float"):
        m2n2(ROW, rows([0.0] * 6), score_points=lambda weights: 0.5)
    lengths = iter((3, 4))
    with pytest.raises(TypeError, match=r"as long for all models, got \[3\], \[4\]"):
        m2n2(ROW, rows([0.0] * 6, [1.0] * 6), score_points=lambda weights: torch.ones(next(lengths)))
    with pytest.raises(IncompatibleWeights, match="shape"):
        m2n2(ROW, [{"w": torch.zeros(5)}], score_points=points)
    with pytest.raises(ValueError, match="angle must be one of 'global', 'part'"):
        m2n2(ROW, rows([1.0] * 6), score_points=points, angle="row")
    with pytest.raises(ValueError, match="one slice for each column of labels, 2, got 1"):
        PointScores(nn.Linear(2, 2), torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.int64))


def test_nobody_solves_anything_at_first():
    archive = NicheArchive(ROW, rows([0.1] * 6, [-0.1] * 6), score_points=points, pop_size=4, mutation_std=0.5)
    archive.run(40)
    assert archive.history[-1]["best"] > 0
    zero = NicheArchive(ROW, rows([0.0] * 6), score_points=points, pop_size=3, mutation_std=0.5).run(20)
    assert torch.equal(zero.space.flatten([zero.best()])[0], zero.best()["w"])


class Tied(nn.Module):
    """Reads with the matrix it embeds with."""

    def __init__(self, tie):
        super().__init__()
        self.embed, self.read = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        if tie:
            self.read.weight = self.embed.weight

    def forward(self, x):
        return self.read(self.embed(x).relu())


def test_tied_parameters_are_one_stretch_and_stay_equal():
    model = Tied(True)
    base, space = model.state_dict(), FlatSpace(dict(model.state_dict()))
    assert len(space) == 16
    x, y = torch.randn(30, 4), torch.randint(4, (30,))
    one, two = ({"embed.weight": w, "read.weight": w} for w in torch.randn(2, 4, 4))
    merged = m2n2(dict(base), [one, two], score_points=PointScores(model, x, y), evals=30, children=4)
    assert torch.equal(merged["embed.weight"], merged["read.weight"])
    loose = PointScores(Tied(False), x, y).stacked(space, space.flatten([one, two]))
    assert torch.equal(loose, PointScores(model, x, y).stacked(space, space.flatten([one, two])))


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"angle": "parts"}, "angle must be one of 'global', 'part'"),
        ({"alpha": -1.0}, "alpha must be in"),
        ({"children": 0}, "children must be in"),
        ({"pop_size": 1}, "pop_size must be in"),
    ],
)
def test_an_archive_is_asked_for_as_the_merge_is(wrong, text):
    with pytest.raises(ValueError, match=text):
        NicheArchive(ROW, rows([0.0] * 6), score_points=points, **wrong)
