import copy

import pytest
import torch

from notebook_kit.alignment import (
    activation_matching,
    feature_correlation,
    ot_fusion,
    permutation_spec,
    permute,
    pleas,
    record_features,
    reset_batch_norm,
    straight_through,
    unit_activations,
    zipit,
)
from notebook_kit.alignment.taps import each, listening, run
from notebook_kit.models import MLP
from notebook_kit.weights import IncompatibleWeights
from tests.alignment.nets import build

X = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
NETS = [build("mlp", seed) for seed in (0, 1)]
SPEC = permutation_spec(NETS[0])
CALLS = {
    "activation_matching": lambda batches: activation_matching(SPEC, *NETS, batches),
    "unit_activations": lambda batches: unit_activations(SPEC, NETS[0], batches),
    "zipit": lambda batches: zipit(SPEC, NETS, batches),
    "record_features": lambda batches: ot_fusion(*NETS, batches),
    "pleas": lambda batches: pleas(*NETS, batches),
    "reset_batch_norm": lambda batches: reset_batch_norm(build("vgg"), batches),
}


@pytest.mark.parametrize("name", CALLS)
def test_batches_are_a_list_of_batches_with_rows(name):
    call = CALLS[name]
    with pytest.raises(TypeError, match=rf"one Tensor: pass \[batch\] \({name}\)"):
        call(X)
    with pytest.raises(ValueError, match=rf"batch 0 is empty \({name}\)"):
        call([X[:0]])
    with pytest.raises(ValueError, match=f"{name} needs at least one batch"):
        call([])
    with pytest.raises(TypeError, match="one dict"):
        call({"input_ids": X})


def test_each_gives_what_it_got():
    first, second = each(iter([X, {"x": X, "n": 3}]), "f")
    assert first is X
    assert second["x"] is X


def test_modes_and_hooks_are_what_they_were_even_after_an_error():
    model = build("vgg").train()
    first = next(module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d))
    first.eval()
    before = [module.training for module in model.modules()]
    handles = [first.register_forward_hook(lambda *_: None)]
    with listening(model, ()):
        assert not any(module.training for module in model.modules())
    with pytest.raises(RuntimeError, match="unflatten"), listening(model, handles):
        run(model, X)  # no image
    assert [module.training for module in model.modules()] == before
    assert not first._forward_hooks


def test_broken_numbers_are_refused():
    nan = X * float("nan")
    broken = copy.deepcopy(NETS[1])
    with torch.no_grad():
        broken.layers[0].bias[0] = float("inf")
    with pytest.raises(ValueError, match="activations hold NaN or Inf"):
        activation_matching(SPEC, *NETS, [nan])
    with pytest.raises(ValueError, match="activations hold NaN or Inf"):
        activation_matching(SPEC, NETS[0], broken, [X])
    with pytest.raises(ValueError, match="features hold NaN or Inf"):
        zipit(SPEC, NETS, [nan])
    with pytest.raises(ValueError, match="features hold NaN or Inf"):
        feature_correlation(nan)


def test_other_networks_are_refused():
    other = MLP([8, 20, 12, 5])
    with pytest.raises(IncompatibleWeights, match="of model_b has shape"):
        activation_matching(SPEC, NETS[0], other, [X])
    with pytest.raises(ValueError, match="no permutation is called 'nope'"):
        unit_activations(SPEC, NETS[0], [X], perms=["nope"])
    with pytest.raises(ValueError, match="depth must be at most the 2 permutations"):
        zipit(SPEC, NETS, [X], depth=3)
    vits = [build("vit", seed) for seed in (0, 1)]
    with pytest.raises(ValueError, match=r"no layer 'layers\.0': were they recorded on other networks"):
        ot_fusion(*NETS, features=record_features(*vits, [torch.randn(2, 1, 16, 16)]))
    with pytest.raises(TypeError, match="as tensors, got dict"):
        pleas(*NETS, [{"x": X}])
    with pytest.raises(ValueError, match=r"'layers\.0' must reorder 0\.\.15"):
        permute(SPEC, {"layers.0": torch.arange(16.0)}, NETS[0].state_dict())


def test_a_generator_of_batches_is_enough_for_straight_through():
    a, b = (net.state_dict() for net in NETS)

    def loss(weights, x):
        return torch.func.functional_call(NETS[0], weights, (x,)).square().mean()

    settings = {"steps": 3, "progress": False}
    once = straight_through(SPEC, a, b, loss, iter([X[:10], X[10:]]), **settings)
    assert once.objective == straight_through(SPEC, a, b, loss, [X[:10], X[10:]], **settings).objective
