import math

import pytest
import torch
from torch import nn

from notebook_kit.merging import (
    IncompatibleWeights,
    adamerging,
    adamerging_path,
    frank_wolfe,
    load,
    merge_files,
    save,
    task_arithmetic,
)
from notebook_kit.merging.objective import Objective, mean_entropy
from tests.merging.searching import Odd, Point, copies, odd_data, odd_weights, unchanged

BOWL = {"task_loss": lambda output, batch, task: ((output - torch.tensor([1.0, 3.0])) ** 2).sum()}


def experts_of(count, dtype=torch.float32):
    return [odd_weights(seed, dtype) for seed in range(1, count + 1)]


# ---------------------------------------------------------------- worked by hand
def test_no_step_is_task_arithmetic():
    base, experts = odd_weights(0), experts_of(3)
    ours = adamerging(base, experts, model=Odd(), batches=odd_data(), scale=0.3, steps=0)
    expected = task_arithmetic(base, experts, scale=0.3)
    for key in base:
        torch.testing.assert_close(ours[key], expected[key])


def test_a_coefficient_of_one_is_that_expert():
    base, experts = odd_weights(0), experts_of(2)
    path = adamerging_path(base, experts, model=Odd(), batches=odd_data(), steps=0)
    one_hot = torch.zeros_like(path.coefficients[0])
    one_hot[1] = 1
    merged = path.vectors.state_dict(one_hot)
    torch.testing.assert_close(merged["weight"], experts[1]["weight"])
    torch.testing.assert_close(merged["scalar"], experts[1]["scalar"])


def test_the_first_step_of_adam_moves_every_coefficient_by_lr():
    """θ = (λ_1, 2 λ_2), target (1, 3): both gradients are negative, so both coefficients grow by lr."""
    base, experts = {"x": torch.zeros(2)}, [{"x": torch.tensor([1.0, 0.0])}, {"x": torch.tensor([0.0, 2.0])}]
    options = {"model": Point(2), "batches": {"t": torch.zeros(1)}, "granularity": "task", **BOWL}
    path = adamerging_path(base, experts, scale=0.5, lr=0.1, steps=1, **options)
    torch.testing.assert_close(path.coefficients[:, :, 0], torch.tensor([[0.5, 0.5], [0.6, 0.6]]))
    torch.testing.assert_close(path.losses[:, 0], torch.tensor([0.25 + 4.0, 0.16 + 3.24]))
    far = adamerging_path(base, experts, scale=0.5, lr=0.1, steps=150, **options)
    torch.testing.assert_close(far.coefficients[-1, :, 0], torch.tensor([1.0, 1.5]), atol=0.02, rtol=0)
    held = adamerging_path(base, experts, scale=0.5, lr=0.1, steps=150, clamp=True, **options)
    torch.testing.assert_close(held.coefficients[-1, :, 0], torch.tensor([1.0, 1.0]), atol=0.02, rtol=0)


def test_entropy_of_known_distributions():
    assert float(mean_entropy(torch.zeros(2, 4))) == pytest.approx(math.log(4))
    assert float(mean_entropy(torch.tensor([[100.0, 0.0]]))) == pytest.approx(0, abs=1e-6)
    half = mean_entropy(torch.tensor([[[0.0, 0.0], [100.0, 0.0]]]), torch.tensor([[1, 0]]))
    assert float(half) == pytest.approx(math.log(2))


def test_plus_plus_trims_and_drops_what_loses_the_vote():
    base = {"x": torch.zeros(4)}
    experts = [{"x": torch.tensor([4.0, -1.0, 3.0, 0.1])}, {"x": torch.tensor([-1.0, -3.0, 0.2, 2.0])}]
    options = {"model": Point(4), "batches": {"t": torch.zeros(1)}, "steps": 0, "scale": 1.0}
    path = adamerging_path(base, experts, density=0.75, task_loss=lambda o, b, t: o.sum(), **options)
    expected = torch.tensor([[4.0, -1.0, 3.0, 0.0], [0.0, -3.0, 0.0, 2.0]])  # 0.1 and 0.2 trimmed, -1 outvoted by 4
    assert torch.equal(path.vectors.tau["x"], expected)
    assert path.merged()["x"].tolist() == [4, -4, 3, 2]


# ---------------------------------------------------------------- what it promises
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"granularity": "task", "density": 0.5}])
def test_the_result_looks_like_base_and_inputs_stay(dtype, options):
    base, experts, model = odd_weights(0, dtype), experts_of(2, dtype), Odd().train()
    before, parameters = copies(base, *experts), copies(model.state_dict())[0]
    data = {k: (x.double() if dtype == torch.float64 else x, y) for k, (x, y) in odd_data().items()}
    merged = adamerging(base, experts, model=model, batches=data, steps=3, lr=0.1, **options)
    assert list(merged) == list(base)
    assert all((merged[k].shape, merged[k].dtype) == (t.shape, t.dtype) for k, t in base.items())
    assert torch.equal(merged["steps"], base["steps"])
    for tensor in merged.values():
        tensor.zero_()
    assert all(unchanged(copy, now) for copy, now in zip(before, (base, *experts), strict=True))
    assert unchanged(parameters, model.state_dict())
    assert model.training
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("count", [1, 10])
def test_one_expert_or_ten(count):
    path = adamerging_path(odd_weights(0), experts_of(count), model=Odd(), batches=odd_data(), steps=5, lr=0.05)
    assert path.coefficients.shape == (6, count, 3)
    assert path.losses.shape == (6, 2)
    assert path.layers == ["weight", "scalar", "empty"]
    assert path.losses[-1].sum() < path.losses[0].sum()


def test_layers_learn_apart_and_tasks_together():
    common = {"model": Odd(), "batches": odd_data(), "steps": 5, "lr": 0.05}
    task = adamerging_path(odd_weights(0), experts_of(2), granularity="task", **common)
    layer = adamerging_path(odd_weights(0), experts_of(2), granularity="layer", **common)
    assert task.layers == ["model"]
    assert task.coefficients.shape[2] == 1
    assert not torch.allclose(layer.coefficients[-1, :, 0], layer.coefficients[-1, :, 1])
    empty = layer.layers.index("empty")
    assert torch.equal(layer.coefficients[-1, :, empty], layer.coefficients[0, :, empty])  # no entry, no gradient


def test_the_same_seed_gives_the_same_rows():
    common = {"model": Odd(), "batches": odd_data(40), "steps": 4, "lr": 0.1, "batch_size": 8}
    a, b, c = (
        adamerging_path(odd_weights(0), experts_of(2), seed=seed, **common).coefficients[-1] for seed in (1, 1, 2)
    )
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_batches_may_be_tensors_mappings_or_lists_in_turn():
    x, y = odd_data()["north"]
    base, experts = odd_weights(0), experts_of(2)

    def coefficients(batches, **how):
        return adamerging_path(base, experts, model=Odd(), batches=batches, steps=2, lr=0.1, **how).coefficients

    expected = coefficients({"t": (x, y)})
    assert torch.equal(coefficients({"t": x}), expected)
    assert torch.equal(coefficients({"t": {"x": x}}), expected)
    assert torch.equal(coefficients({"t": [x, x]}), expected)
    drawn = Objective(Odd(), {"t": [x, x + 1]})
    assert [torch.equal(drawn.draw()["t"], batch) for batch in (x, x + 1, x)] == [True] * 3
    rows = Objective(Odd(), {"t": {"x": x, "labels": y, "note": "kept"}}, batch_size=5).draw()["t"]
    assert (rows["x"].shape, rows["labels"].shape, rows["note"]) == ((5, 4), (5,), "kept")


def test_heads_divide_the_logits_and_models_may_differ_by_task():
    x, y = odd_data()["north"]
    base, experts = odd_weights(0), experts_of(2)
    heads = {"a": slice(0, 2), "b": slice(2, 3)}
    data = {"a": (x, y % 2), "b": (x, y * 0)}
    common = {"steps": 1, "loss": "cross_entropy"}
    losses = adamerging_path(base, experts, model=Odd(), batches=data, heads=heads, **common).losses
    assert losses[0, 1] == 0  # one class is never wrong
    own = {task: nn.Sequential(nn.Linear(4, 2, bias=False)) for task in data}
    weights = [{"0.weight": torch.randn(2, 4)} for _ in range(3)]
    two = adamerging_path(weights[0], weights[1:], model=own, batches=dict.fromkeys(data, (x, y % 2)), **common)
    assert torch.equal(two.losses[:, 0], two.losses[:, 1])


def test_a_model_s_own_heads_are_used_and_stay():
    net = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    head = net[1].weight.detach().clone()
    shared = [{k: torch.randn_like(t) for k, t in net.state_dict().items() if k.startswith("0.")} for _ in range(3)]
    merged = adamerging(shared[0], shared[1:], model=net, batches=odd_data(), steps=3, lr=0.1)
    assert set(merged) == {"0.weight", "0.bias"}
    assert torch.equal(net[1].weight, head)


def test_files_merge_as_the_whole_model_does(tmp_path):
    models = [odd_weights(seed) for seed in range(3)]
    paths = [save(weights, tmp_path / f"{i}.safetensors") for i, weights in enumerate(models)]
    settings = {"model": Odd(), "batches": odd_data(), "steps": 3, "lr": 0.1}
    merge_files(adamerging, paths[0], paths[1:], tmp_path / "merged.safetensors", progress=False, **settings)
    assert unchanged(adamerging(models[0], models[1:], **settings), load(tmp_path / "merged.safetensors"))


class Normed(nn.Module):
    """A batch norm between two layers: its running statistics are floating buffers of the state dict."""

    def __init__(self):
        super().__init__()
        self.read, self.norm, self.answer = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x):
        return self.answer(self.norm(self.read(x)).relu())


@pytest.mark.parametrize("granularity", ["task", "layer"])
def test_running_statistics_are_merged_but_teach_nothing(granularity):
    torch.manual_seed(0)
    models = [Normed() for _ in range(3)]
    for model in models[1:]:
        model(torch.randn(50, 4) * 2 + 1)  # moves its running statistics
    base, *experts = (model.state_dict() for model in models)
    before, data = copies(base), odd_data()
    path = adamerging_path(base, experts, model=models[0], batches=data, steps=5, lr=0.05, granularity=granularity)
    assert path.losses[-1].sum() < path.losses[0].sum()
    merged, shares = path.merged(), path.coefficients[-1]
    column = path.layers.index("norm.running_mean") if granularity == "layer" else 0
    if granularity == "layer":
        assert (shares[:, column] == path.coefficients[0][:, column]).all()  # no gradient
    expected = base["norm.running_mean"] + sum(
        share * (expert["norm.running_mean"] - base["norm.running_mean"])
        for share, expert in zip(shares[:, column], experts, strict=True)
    )
    torch.testing.assert_close(merged["norm.running_mean"], expected)
    assert merged["norm.num_batches_tracked"] == base["norm.num_batches_tracked"]
    walked = frank_wolfe(base, experts, model=models[0], batches=data, steps=3, granularity=granularity)
    assert all(torch.isfinite(tensor.float()).all() for tensor in walked.values())
    assert unchanged(before[0], models[0].state_dict())  # the model's own statistics did not move


# ---------------------------------------------------------------- what it refuses
def test_bad_input_is_named():
    base, experts, data = odd_weights(0), experts_of(2), odd_data()

    def go(**how):
        return adamerging(base, experts, **({"model": Odd(), "batches": data, "steps": 1} | how))

    with pytest.raises(IncompatibleWeights, match="in base but not in experts"):
        adamerging(base, [{"weight": base["weight"]}], model=Odd(), batches=data)
    with pytest.raises(ValueError, match=r"tensor 'weight' of base is not in the model \(Point\)"):
        go(model=Point())
    with pytest.raises(ValueError, match="batches must map at least one task"):
        go(batches={})
    with pytest.raises(ValueError, match="batches of task 'a' are an empty list"):
        go(batches={"a": []})
    with pytest.raises(ValueError, match="batches of task 'a' hold a batch without rows"):
        go(batches={"a": [torch.randn(2, 4), torch.randn(0, 4)]})
    with pytest.raises(ValueError, match="batch_size needs batches of tensors, from which rows can be drawn, got dict"):
        go(batches={"a": {"x": 3}}, batch_size=2)
    with pytest.raises(ValueError, match=r"heads\['north'\] is slice\(5, 6, None\), which holds none of the 3 logits"):
        go(heads={"north": slice(5, 6)})
    with pytest.raises(ValueError, match="model has no entry for task 'south', only north"):
        go(model={"north": Odd()})
    with pytest.raises(ValueError, match="cross_entropy needs labels: give task 'a'"):
        go(batches={"a": torch.randn(2, 4)}, loss="cross_entropy")
    with pytest.raises(ValueError, match="the loss of task 'north' is nan"):
        go(task_loss=lambda output, batch, task: output.sum() * float("nan"))
    with pytest.raises(TypeError, match=r"scalar tensor, got a tensor of shape \[12, 3\]"):
        go(task_loss=lambda output, batch, task: output)
    with pytest.raises(ValueError, match="loss must be one of 'entropy', 'cross_entropy'"):
        go(loss="hinge")
    for settings, text in (
        ({"granularity": "tensor"}, "granularity must be one of 'task', 'layer'"),
        ({"steps": -1}, "steps must be in"),
        ({"density": 1.5}, "density must be in"),
    ):
        with pytest.raises(ValueError, match=text):
            adamerging_path(base, experts, model=Odd(), batches=data, **settings)
    with pytest.raises(TypeError, match="must return logits"):
        Objective(Odd(), data).loss("nothing", data["north"], "north")
