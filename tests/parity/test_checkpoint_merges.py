"""Merges of checkpoints and runs against mergekit and peft, on random and on trained weights.

mergekit works in float32 throughout: on tensors of millions of entries its Karcher mean is off by 5e-5 where ours is
within 1e-6 of float64, so the tensors here are small.
"""

import pytest
import torch
from torch import nn

from notebook_kit.adapters import LoRA, adapter_weights, attach, fold, load_adapter_weights, load_peft, save_peft
from notebook_kit.merging import (
    average,
    karcher,
    metrics_weighted,
    model_stock,
    product_of_pairs,
    sce,
    slerp,
    task_vector,
)
from notebook_kit.zoo import digit_labels, digit_twins

SHAPES = {"embed": (17, 8), "mlp.weight": (12, 8), "mlp.bias": (12,), "deep": (3, 4, 5)}


def random_models():
    base = {key: torch.randn(shape) for key, shape in SHAPES.items()}
    common = {key: torch.randn(shape) for key, shape in SHAPES.items()}

    def noise(key):
        return common[key] + torch.randn(SHAPES[key])

    return base, [{key: base[key] + 0.3 * noise(key) for key in base} for _ in range(3)]


def trained_models():
    bed = digit_labels()
    return bed.base, bed.experts[:3]


def trained_apart():
    twins = digit_twins(32)
    return {key: torch.zeros_like(tensor) for key, tensor in twins.base.items()}, twins.experts


@pytest.fixture(params=[random_models, trained_models, trained_apart], ids=lambda make: make.__name__)
def models(request):
    return request.param()


def by_mergekit(name, base, experts, *, with_base=True, each=None, **parameters):
    """Run a method of mergekit on each tensor, through its public interface."""
    registry = pytest.importorskip("mergekit.merge_methods.registry")
    group_of = pytest.importorskip("mergekit.merge_methods.base").TensorGroup.from_tensors
    for key, values in (each or {}).items():
        parameters[key] = dict(enumerate(values))
    merged = {}
    for key, theta in base.items():
        tensors = [theta.clone()] * with_base + [expert[key].clone() for expert in experts]
        group = group_of(tensors, base_index=0 if with_base else None)
        merged[key] = registry.get(name)([group], parameters=parameters)[0]
    return merged


def close(ours, theirs, atol=1e-5):
    assert ours.keys() == theirs.keys()
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-5, atol=atol)


@pytest.mark.parametrize("normalize", [True, False])
def test_average_is_mergekits_linear(models, normalize):
    base, experts = models
    weights = [1.0, 0.5, 2.0][: len(experts)]
    theirs = by_mergekit("linear", base, experts, with_base=False, each={"weight": weights}, normalize=normalize)
    close(average(base, experts, weights=weights, normalize=normalize), theirs)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_is_mergekits(models, t):
    base, experts = models
    close(slerp(base, experts[:2], t=t), by_mergekit("slerp", experts[0], experts[1:2], t=t))


@pytest.mark.parametrize("scope", ["tensor", "row"])
def test_model_stock_is_mergekits(models, scope):
    base, experts = models
    keys = list(base)
    if scope == "row":
        # mergekit's rows of a kernel lie along its last axis; and it lifts products of two lengths to 1e-6, so that
        # where rows hardly moved it and we mean different angles.
        taus = [task_vector(base, expert) for expert in experts]

        def shortest(key):
            return min(float(tau[key].norm(dim=-1).min()) for tau in taus)

        keys = [key for key, tensor in base.items() if tensor.ndim < 3 and shortest(key) > 2e-3]
    assert keys
    ours = model_stock(base, experts, scope=scope, clamp=False)
    theirs = by_mergekit("model_stock", base, experts, filter_wise=scope == "row")
    close({key: ours[key] for key in keys}, {key: theirs[key] for key in keys})


@pytest.mark.parametrize("density", [1.0, 0.6, 0.1])
def test_sce_is_mergekits(models, density):
    base, experts = models
    theirs = by_mergekit("sce", base, experts, select_topk=density)
    close(sce(base, experts, density=density, floor=1e-6), theirs)


def test_karcher_is_mergekits(models):
    base, experts = models
    close(karcher(base, experts), by_mergekit("karcher", base, experts, with_base=False))
    few = by_mergekit("karcher", base, experts, with_base=False, max_iter=1, tol=1e-3)
    close(karcher(base, experts, n_iterations=1, tolerance=1e-3), few)


# ---------------------------------------------------------------- peft
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 4)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def fresh():
    torch.manual_seed(3)
    return Net()


@pytest.fixture
def checkpoints():
    """Three checkpoints of one LoRA run, as they come from this kit."""
    model = fresh()
    attach(model, LoRA, targets="up|down", rank=2, alpha=6)
    start = {key: torch.randn_like(tensor) for key, tensor in adapter_weights(model).items()}
    return [{key: tensor + 0.2 * torch.randn_like(tensor) for key, tensor in start.items()} for _ in range(3)]


@pytest.mark.parametrize("space", ["factors", "product"])
def test_a_merged_adapter_loads_into_peft(checkpoints, space, tmp_path):
    peft = pytest.importorskip("peft")
    x, model = torch.randn(5, 6), fresh()
    attach(model, LoRA, targets="up|down", rank=2, alpha=6)
    merged = metrics_weighted(checkpoints[0], checkpoints, metrics=[0.3, 0.2, 0.1], penalty=1.0, space=space)
    load_adapter_weights(model, merged)
    save_peft(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(fresh(), tmp_path / "adapter")
    torch.testing.assert_close(theirs(x), fold(model)(x), rtol=1e-4, atol=1e-5)


def peft_states(checkpoints):
    """The same checkpoints as `get_peft_model_state_dict` gives them, and a model to load them into."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["up", "down"])
    model = peft.get_peft_model(fresh(), config)
    prefix, words = "base_model.model.", {"A": "lora_A.weight", "B": "lora_B.weight"}

    def rename(key):
        return f"{prefix}{key[:-1]}{words[key[-1]]}"

    states = [{rename(key): tensor for key, tensor in checkpoint.items()} for checkpoint in checkpoints]
    assert states[0].keys() == peft.get_peft_model_state_dict(model).keys()
    return peft, model, states


@pytest.mark.parametrize("space", ["factors", "product"])
def test_pefts_state_dicts_merge_like_the_kits(checkpoints, space):
    peft, model, states = peft_states(checkpoints)
    how = {"metrics": [0.3, 0.2, 0.1], "penalty": 1.0, "space": space}
    merged = metrics_weighted(states[0], states, **how)
    ours = metrics_weighted(checkpoints[0], checkpoints, **how)
    for one, other in zip(merged.values(), ours.values(), strict=True):
        torch.testing.assert_close(one, other)
    peft.set_peft_model_state_dict(model, merged)
    x, mine = torch.randn(5, 6), fresh()
    attach(mine, LoRA, targets="up|down", rank=2, alpha=6)
    load_adapter_weights(mine, ours)
    torch.testing.assert_close(model(x), mine(x), rtol=1e-4, atol=1e-5)


def test_products_are_pefts_cat(checkpoints, tmp_path):
    """peft's `cat` keeps every product, at rank 3 · 2; its `linear` of copies comes out as many times too strong."""
    peft, model, states = peft_states(checkpoints)
    config = model.peft_config["default"]
    for i, state in enumerate(states):
        model.add_adapter(f"c{i}", config)
        peft.set_peft_model_state_dict(model, state, adapter_name=f"c{i}")
    weights = [0.5, 0.3, 0.2]
    model.add_weighted_adapter(["c0", "c1", "c2"], weights, "cat", combination_type="cat")
    ours = product_of_pairs(checkpoints, weights=weights, scale=3.0)
    for name in ("up", "down"):
        theirs = model.base_model.model.get_submodule(name).get_delta_weight("cat")
        torch.testing.assert_close(ours[name], theirs, rtol=1e-4, atol=1e-5)
    copies = ["c0", "d1", "d2"]
    for name in copies[1:]:
        model.add_adapter(name, config)
        peft.set_peft_model_state_dict(model, states[0], adapter_name=name)
    model.add_weighted_adapter(copies, [1 / 3] * 3, "linear", combination_type="linear")

    def delta(name):
        return model.base_model.model.up.get_delta_weight(name)

    torch.testing.assert_close(delta("linear"), 3 * delta("c0"), rtol=1e-4, atol=1e-5)
    same = average(checkpoints[0], [checkpoints[0]] * 3)
    torch.testing.assert_close(product_of_pairs([same], scale=3.0)["up"], delta("c0"), rtol=1e-4, atol=1e-5)


def test_pefts_folder_comes_back(checkpoints, tmp_path):
    pytest.importorskip("peft")
    model = fresh()
    attach(model, LoRA, targets="up|down", rank=2, alpha=6)
    load_adapter_weights(model, metrics_weighted(checkpoints[0], checkpoints, metrics=[3, 2, 1], space="product"))
    save_peft(model, tmp_path / "adapter")
    again = fresh()
    load_peft(again, tmp_path / "adapter")
    x = torch.randn(5, 6)
    torch.testing.assert_close(again(x), model(x))
