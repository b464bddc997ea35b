import weakref
from collections.abc import Mapping
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from notebook_kit.merging import (
    IncompatibleWeights,
    frank_wolfe,
    frank_wolfe_path,
    load,
    merge_files,
    save,
    task_arithmetic,
)
from notebook_kit.weights import Checkpoint
from tests.merging.searching import Odd, Point, copies, odd_data, odd_weights, unchanged

CENTRE = torch.tensor([0.5, 0.5, 0.0])
BOWL = {
    "model": Point(),
    "batches": {"bowl": torch.zeros(1)},
    "task_loss": lambda x, batch, task: 0.5 * ((x - CENTRE) ** 2).sum(),
}
CORNERS = [{"x": row} for row in torch.eye(3)]


def experts_of(count, dtype=torch.float32):
    return [odd_weights(seed, dtype) for seed in range(1, count + 1)]


def rebuilt(path, base, experts, step=-1, name="x"):
    start = path.coefficients[step][:, 0] * base[name]
    return start + sum(c * expert[name] for c, expert in zip(path.coefficients[step][0, 1:], experts, strict=True))


# ---------------------------------------------------------------- worked by hand
def test_the_bowl_between_two_corners():
    path = frank_wolfe_path(CORNERS[2], CORNERS[:2], init="base", steps=5, **BOWL)
    assert path.picks.flatten().tolist() == [0, 1, 0, 1, 0]
    torch.testing.assert_close(path.gaps, torch.tensor([1.5, 1.0, 2 / 9, 2 / 9, 0.12]))
    expected = [[1, 0, 0], [0, 1, 0], [0, 1 / 3, 2 / 3], [0, 2 / 3, 1 / 3], [0, 0.4, 0.6], [0, 0.6, 0.4]]
    torch.testing.assert_close(path.coefficients[:, 0], torch.tensor(expected))
    torch.testing.assert_close(path.merged["x"], torch.tensor([0.6, 0.4, 0.0]))
    torch.testing.assert_close(path.losses[:2, 0], torch.tensor([0.75, 0.25]))
    assert path.vertices == ["experts[0]", "experts[1]", "initial"]


def test_it_stops_where_no_vertex_is_better():
    path = frank_wolfe_path({"x": CENTRE}, CORNERS, init="base", steps=5, **BOWL)
    assert len(path.picks) == len(path.gaps) == 0
    assert path.losses.tolist() == [[0.0]]
    assert path.coefficients.shape == (1, 1, 4)
    near = frank_wolfe_path(CORNERS[2], CORNERS[:2], init="base", steps=50, tolerance=0.2, **BOWL)
    assert near.gaps.tolist() == pytest.approx([1.5, 1.0, 2 / 9, 2 / 9])


def test_start_and_scale():
    begun = frank_wolfe(CORNERS[2], CORNERS[:2], steps=0, **BOWL)
    torch.testing.assert_close(begun["x"], task_arithmetic(CORNERS[2], CORNERS[:2], scale=0.3)["x"])
    slow = frank_wolfe_path(CORNERS[2], CORNERS[:2], init="base", steps=1, scale=0.3, step_size=0.5, **BOWL)
    torch.testing.assert_close(slow.coefficients[1, 0], torch.tensor([0.85, 0.15, 0.0]))


def test_one_model_and_no_initial_vertex_is_that_model():
    merged = frank_wolfe(CORNERS[2], CORNERS[:1], initial_vertex=False, steps=3, **BOWL)
    torch.testing.assert_close(merged["x"], CORNERS[0]["x"])


# ---------------------------------------------------------------- invariants
@given(st.integers(1, 5), st.integers(0, 10**6), st.sampled_from(["task", "layer"]))
@settings(deadline=None, max_examples=25)
def test_iterates_stay_in_the_hull_and_the_coefficients_say_where(count, seed, granularity):
    g = torch.Generator().manual_seed(seed)
    centre = torch.randn(3, generator=g)
    loss = {**BOWL, "task_loss": lambda x, batch, task: ((x - centre) ** 2).sum()}
    base, *experts = ({"x": torch.randn(3, generator=g)} for _ in range(count + 1))
    path = frank_wolfe_path(base, experts, init="base", steps=6, granularity=granularity, **loss)
    assert (path.coefficients >= 0).all()
    torch.testing.assert_close(path.coefficients.sum(-1), torch.ones(path.coefficients.shape[:2]))
    torch.testing.assert_close(path.merged["x"], rebuilt(path, base, experts), rtol=1e-4, atol=1e-5)
    assert (path.gaps >= 0).all()
    best = min(float(((expert["x"] - centre) ** 2).sum()) for expert in (base, *experts))
    if len(path.picks):
        bound = path.losses[:-1, 0] - path.gaps  # a lower bound of the best loss in the hull
        assert (bound <= best + 1e-4).all()
        if path.picks[0, 0, 0] < count:
            assert path.coefficients[1, 0, 0] == 0


def test_a_convex_loss_falls_as_two_c_over_t():
    path = frank_wolfe_path(CORNERS[2], CORNERS[:2], init="base", steps=60, **BOWL)
    curvature = 2.0  # squared diameter of the triangle, times the bowl's curvature 1
    t = torch.arange(1, len(path.losses))
    assert (path.losses[1:, 0] <= 2 * curvature / (t + 2)).all()


def test_layers_reach_lower_than_whole_models():
    base, experts = odd_weights(0), experts_of(3)
    common = {"model": Odd(), "batches": odd_data(), "steps": 1, "init": "base"}
    task, layer = (frank_wolfe_path(base, experts, granularity=g, **common) for g in ("task", "layer"))
    assert layer.gaps[0] >= task.gaps[0] - 1e-5
    assert layer.picks.shape == (1, 1, 3)
    assert layer.layers == ["weight", "scalar", "empty"]


def test_a_duplicate_changes_nothing():
    one = frank_wolfe_path(CORNERS[2], CORNERS[:2], init="base", steps=5, **BOWL)
    two = frank_wolfe_path(CORNERS[2], [*CORNERS[:2], CORNERS[0]], init="base", steps=5, **BOWL)
    torch.testing.assert_close(one.merged["x"], two.merged["x"])
    assert one.picks.tolist() == two.picks.tolist()


def test_what_all_models_share_moves_the_cosine_and_not_the_inner_product():
    """Adding one vector to all vertices, and to where the bowl is: the picture is the same, but not to a cosine."""
    shift, start = torch.tensor([-4.0, 9.0, 0.0]), torch.tensor([0.1, 0.6, 0.9])
    pool = [{"x": torch.tensor([2.0, 0.4, 0.0])}, {"x": torch.tensor([0.3, 0.1, -0.3])}]

    def first_pick(oracle, moved):
        loss = {**BOWL, "task_loss": lambda x, batch, task: 0.5 * ((x - CENTRE - moved) ** 2).sum()}
        shifted = [{"x": weights["x"] + moved} for weights in pool]
        options = {"init": "base", "steps": 1, "oracle": oracle, "initial_vertex": False}
        return int(frank_wolfe_path({"x": start + moved}, shifted, **options, **loss).picks[0, 0, 0])

    for oracle in ("inner", "cos_delta"):
        assert first_pick(oracle, torch.zeros(3)) == first_pick(oracle, shift)
    assert first_pick("cos_checkpoint", torch.zeros(3)) != first_pick("cos_checkpoint", shift)


def test_soft_picks_one_model_for_each_task_and_none_twice():
    targets = {"first": torch.tensor([1.0, 0, 0]), "second": torch.tensor([1.0, 0.1, 0])}
    loss = {**BOWL, "batches": {task: torch.zeros(1) for task in targets}}
    loss["task_loss"] = lambda x, batch, task: 0.5 * ((x - targets[task]) ** 2).sum()
    path = frank_wolfe_path(CORNERS[2], CORNERS[:2], init="base", variant="soft", steps=2, scale=0.3, **loss)
    assert path.picks[0, :, 0].tolist() == [0, 1]  # both want corner 0; the second must take another
    torch.testing.assert_close(path.coefficients[1, 0], torch.tensor([0.4, 0.3, 0.3]))
    learned = frank_wolfe_path(CORNERS[2], CORNERS[:2], init="base", variant="soft", move="adamerging", steps=2, **loss)
    torch.testing.assert_close(learned.coefficients.sum(-1), torch.ones(3, 1))
    torch.testing.assert_close(learned.merged["x"], rebuilt(learned, CORNERS[2], CORNERS[:2]))
    few = frank_wolfe_path(CORNERS[2], CORNERS[:1], variant="soft", initial_vertex=False, steps=1, **loss)
    assert few.picks.shape == (1, 1, 1)  # fewer models than tasks


def test_a_ties_move_has_no_coefficients():
    path = frank_wolfe_path(CORNERS[2], CORNERS[:2], init="base", move="ties", density=0.67, steps=1, **BOWL)
    assert path.merged["x"].tolist() == [1, 0, 0]  # of (1, 0, -1) two entries are kept
    assert path.coefficients[1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "options",
    [{}, {"granularity": "layer", "oracle": "cos_delta"}, {"variant": "soft", "move": "adamerging", "move_steps": 3}],
)
def test_the_result_looks_like_base_and_inputs_stay(dtype, options):
    base, experts, model = odd_weights(0, dtype), experts_of(3, dtype), Odd()
    before, parameters = copies(base, *experts), copies(model.state_dict())[0]
    merged = frank_wolfe(base, experts, model=model, batches=odd_data(), steps=3, **options)
    assert list(merged) == list(base)
    assert all((merged[k].shape, merged[k].dtype) == (t.shape, t.dtype) for k, t in base.items())
    assert all(torch.isfinite(tensor.float()).all() for tensor in merged.values())
    assert torch.equal(merged["steps"], base["steps"])
    for tensor in merged.values():
        tensor.zero_()
    assert all(unchanged(copy, now) for copy, now in zip(before, (base, *experts), strict=True))
    assert unchanged(parameters, model.state_dict())


@pytest.mark.parametrize("count", [1, 10])
def test_one_expert_or_ten(count):
    path = frank_wolfe_path(odd_weights(0), experts_of(count), model=Odd(), batches=odd_data(), steps=4)
    assert path.losses[-1].mean() <= path.losses[0].mean() + 0.5
    assert len(path.vertices) == count + 1


# ---------------------------------------------------------------- from disk
class Watched(Mapping):
    """A pool model that counts how many of the pool's tensors are alive at once."""

    alive: ClassVar = weakref.WeakSet()
    most = 0

    def __init__(self, weights):
        self._weights = weights

    def __getitem__(self, name):
        tensor = self._weights[name].clone()
        Watched.alive.add(tensor)
        Watched.most = max(Watched.most, len(Watched.alive))
        return tensor

    def __iter__(self):
        return iter(self._weights)

    def __len__(self):
        return len(self._weights)


@pytest.mark.parametrize("granularity", ["task", "layer"])
def test_memory_does_not_grow_with_the_pool(granularity, tmp_path):
    base, experts = odd_weights(0), experts_of(8)
    common = {"model": Odd(), "batches": odd_data(), "steps": 4, "granularity": granularity}
    expected = frank_wolfe_path(base, experts, **common)
    most = {}
    for count in (2, 8):
        Watched.most = 0
        watched = frank_wolfe_path(base, [Watched(expert) for expert in experts[:count]], **common)
        most[count] = Watched.most
    assert most[8] == most[2] <= 3  # of 8 models with 3 floating tensors each
    assert unchanged(expected.merged, watched.merged)
    paths = [save(expert, tmp_path / f"{i}.safetensors") for i, expert in enumerate(experts)]
    from_disk = frank_wolfe_path(base, [Checkpoint(path) for path in paths], **common)
    assert unchanged(expected.merged, from_disk.merged)
    assert torch.equal(expected.picks, from_disk.picks)


def test_files_merge_as_the_whole_model_does(tmp_path):
    models = [odd_weights(seed) for seed in range(3)]
    paths = [save(weights, tmp_path / f"{i}.safetensors") for i, weights in enumerate(models)]
    settings = {"model": Odd(), "batches": odd_data(), "steps": 3}
    merge_files(frank_wolfe, paths[0], paths[1:], tmp_path / "merged.safetensors", progress=False, **settings)
    assert unchanged(frank_wolfe(models[0], models[1:], **settings), load(tmp_path / "merged.safetensors"))


# ---------------------------------------------------------------- what it refuses
def test_bad_input_is_named():
    with pytest.raises(IncompatibleWeights, match="shape"):
        frank_wolfe(CORNERS[0], [{"x": torch.zeros(4)}], **BOWL)
    with pytest.raises(ValueError, match="at least one state dict"):
        frank_wolfe(CORNERS[0], [], **BOWL)
    with pytest.raises(ValueError, match="tensor 'y' of base is not in the model"):
        frank_wolfe({"y": torch.zeros(3)}, [{"y": torch.zeros(3)}], **BOWL)
    with pytest.raises(ValueError, match="oracle must be one of 'inner', 'cos_checkpoint', 'cos_delta'"):
        frank_wolfe(CORNERS[0], CORNERS, **BOWL, oracle="cosine")
    with pytest.raises(ValueError, match=r"scale must be in \[0.01, 1\], got 2"):
        frank_wolfe(CORNERS[0], CORNERS, **BOWL, scale=2.0)
    with pytest.raises(ValueError, match="cross_entropy needs labels"):
        frank_wolfe({"0.weight": torch.zeros(2, 3)}, [{"0.weight": torch.ones(2, 3)}],
                    model=nn.Sequential(nn.Linear(3, 2, bias=False)), batches={"t": torch.zeros(1, 3)})  # fmt: skip
    for wrong, text in (
        ({"oracle": "cosine"}, "oracle must be one of"),
        ({"granularity": "tensor"}, "granularity must be one of 'task', 'layer'"),
        ({"stepz": 3}, "did you mean 'steps'"),
    ):
        with pytest.raises(ValueError, match=text):
            frank_wolfe_path(CORNERS[0], CORNERS, **BOWL, **wrong)
