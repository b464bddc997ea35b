import copy

import pytest
import torch
import transformers
from torch import nn

from notebook_kit import models
from notebook_kit.alignment import (
    interpolate,
    ot_fusion,
    permutation_spec,
    permute,
    random_permutations,
    record_features,
)
from notebook_kit.alignment.transport_flow import RESIDUAL
from notebook_kit.models import MLP
from notebook_kit.weights import IncompatibleWeights
from tests.alignment.nets import build, outputs, weights_of, with_weights
from tests.alignment.test_activation_matching import batches_for

HARD = {"method": "exact"}


def largest_difference(one, other):
    return max((one[key] - other[key]).abs().max().item() for key in other if other[key].is_floating_point())


def fill(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize("align", ["activation", "weight"])
@pytest.mark.parametrize("name", ["mlp", "sequential", "vit", "bert"])
def test_a_network_with_itself_is_the_identity(name, align):
    model = build(name)
    fused = ot_fusion(model, build(name), batches_for(name), align=align, **HARD)
    assert largest_difference(fused, weights_of(model)) < 1e-5
    assert list(fused) == list(model.state_dict())


@pytest.mark.parametrize("qk", ["separate", "shared", "joint"])
@pytest.mark.parametrize("residual", [policy for policy in RESIDUAL if policy != "identity"])
@pytest.mark.parametrize("name", ["vit", "bert"])
def test_a_permuted_transformer_fused_hard_gives_the_original_back(name, residual, qk):
    model = build(name)
    a, spec = weights_of(model), permutation_spec(model, residual=True)
    b = with_weights(name, permute(spec, random_permutations(spec, seed=3), a))
    features = record_features(model, b, batches_for(name))
    for align in ("activation", "weight"):
        fused = ot_fusion(model, b, features=features, align=align, residual=residual, qk=qk, **HARD)
        assert largest_difference(fused, a) < 1e-5
        assert (outputs(with_weights(name, fused)) - outputs(model)).abs().max() < 1e-4
    naive = interpolate(a, b.state_dict(), 0.5)
    assert largest_difference(naive, a) > 0.1


@pytest.mark.parametrize("name", ["mlp", "sequential"])
def test_a_permuted_chain_fused_hard_gives_the_original_back(name):
    model = build(name)
    a, spec = weights_of(model), permutation_spec(model)
    b = with_weights(name, permute(spec, random_permutations(spec, seed=3), a))
    for align in ("activation", "weight"):
        assert largest_difference(ot_fusion(model, b, batches_for(name), align=align, **HARD), a) < 1e-5


def test_a_permuted_convolutional_net_comes_back():
    torch.manual_seed(0)
    model = fill(models.VGG((4, 6), hidden=8))
    a, spec = weights_of(model), permutation_spec(model)
    other = copy.deepcopy(model)
    other.load_state_dict(permute(spec, random_permutations(spec, seed=3), a))
    fused = ot_fusion(model, other, [torch.rand(60, 64)], **HARD)
    assert largest_difference(fused, a) < 1e-5


def test_the_identity_policy_is_for_streams_in_one_order():
    model = build("vit")
    a, spec = weights_of(model), permutation_spec(model)  # heads and hidden units, not the stream
    b = with_weights("vit", permute(spec, random_permutations(spec, seed=3), a))
    assert largest_difference(ot_fusion(model, b, batches_for("vit"), residual="identity", **HARD), a) < 1e-5
    wide = fill(models.tiny_vit(hidden_size=48))
    with pytest.raises(ValueError, match=r"identity.*equal width, got 32 in a and 48 in b"):
        ot_fusion(model, wide, align="weight", residual="identity")


def doubled_mlp(model):
    """Every hidden unit twice, what it sends out halved."""
    wide = MLP([8, 32, 24, 5])
    with torch.no_grad():
        for i, (new, old) in enumerate(zip(wide.layers, model.layers, strict=True)):
            rows = old.weight if i == 2 else old.weight.repeat(2, 1)
            new.weight.copy_(rows if i == 0 else torch.cat([rows, rows], 1) / 2)
            new.bias.copy_(old.bias if i == 2 else old.bias.repeat(2))
    return wide


@pytest.mark.parametrize("align", ["activation", "weight"])
def test_duplicated_units_of_a_wider_copy_fuse_to_the_function(align):
    model, x = build("mlp"), torch.randn(100, 8)
    wide = doubled_mlp(model)
    assert (wide(x) - model(x)).abs().max() < 1e-5
    narrow = ot_fusion(model, wide, [x], align=align, t=1.0, **HARD)
    assert largest_difference(narrow, weights_of(model)) < 1e-5
    # and the other way: units of the narrow one are sent to two each
    broad = copy.deepcopy(wide)
    broad.load_state_dict(ot_fusion(wide, model, [x], align=align, t=1.0, **HARD))
    assert (broad(x) - model(x)).abs().max() < 1e-4


def test_duplicated_stream_and_hidden_units_of_a_wider_vit_fuse_to_the_function():
    narrow = build("vit")
    a, d = narrow.state_dict(), 32
    wide = models.tiny_vit(hidden_size=2 * d, num_attention_heads=8, intermediate_size=128)
    copies = {}
    for name, tensor in a.items():
        target = wide.state_dict()[name].shape
        for axis, (n, m) in enumerate(zip(tensor.shape, target, strict=True)):
            if n != m:  # inputs (axis 1 of a matrix) are shared out; everything else is repeated
                tensor = torch.cat([tensor, tensor], axis) / (2 if tensor.dim() == 2 and axis == 1 else 1)
        copies[name] = tensor
    wide.load_state_dict(copies)
    x = batches_for("vit")
    assert (wide(x[0]).logits - narrow(x[0]).logits).abs().max() < 1e-4
    for align in ("activation", "weight"):
        fused = ot_fusion(narrow, wide, x, align=align, t=1.0, **HARD)
        assert (outputs(with_weights("vit", fused)) - outputs(narrow)).abs().max() < 1e-3


def test_wider_heads_keep_the_size_of_the_attention_logits():
    narrow, wide = build("vit"), models.tiny_vit(hidden_size=32, num_attention_heads=2)
    wide.load_state_dict(narrow.state_dict())
    fused = ot_fusion(narrow, wide, align="weight", t=1.0, **HARD)
    q = "vit.layers.0.attention.q_proj.weight"
    # heads of 16 against heads of 8: q and k grow by 2^(1/4) each, q·k by √2, as √d_head does
    assert torch.allclose(fused[q], 2**0.25 * narrow.state_dict()[q], atol=1e-5)


def test_the_ends_of_the_line_and_the_limits_of_epsilon():
    a, b = build("mlp", 0), build("mlp", 1)
    x = batches_for("mlp")
    assert largest_difference(ot_fusion(a, b, x, t=0.0), weights_of(a)) == 0.0
    blurred = ot_fusion(a, b, x, t=1.0, epsilon=10.0)
    first = b.layers[0].weight.detach()
    assert (blurred["layers.0.weight"] - first.mean(0)).abs().max() < 0.1 * first.abs().max()
    hard, nearly = ot_fusion(a, b, x, **HARD), ot_fusion(a, b, x, epsilon=1e-4, max_iter=5000)
    assert largest_difference(nearly, hard) < 1e-3
    self_soft = [largest_difference(ot_fusion(a, a, x, epsilon=e), weights_of(a)) for e in (0.3, 0.03, 0.003)]
    assert self_soft[0] > self_soft[1] > self_soft[2]


def test_inputs_are_not_modified_and_plans_have_their_shapes():
    a, b = build("mlp", 0), MLP([8, 20, 12, 5])
    before = [weights_of(model) for model in (a, b)]
    a.train()
    fused = ot_fusion(a, b, batches_for("mlp"))
    assert a.training
    for model, weights in zip((a, b), before, strict=True):
        assert all(torch.equal(weights[key], tensor) for key, tensor in model.state_dict().items())
    assert {name: tuple(plan.shape) for name, plan in fused.plans.items()} == {
        "layers.0": (20, 16),
        "layers.1": (12, 12),
    }
    assert all(fused[key].dtype == tensor.dtype for key, tensor in a.state_dict().items())


def test_bad_input():
    mlp = build("mlp")
    with pytest.raises(ValueError, match='align="activation" needs batches'):
        ot_fusion(mlp, build("mlp"))
    with pytest.raises(ValueError, match="residual='weighted_scalar' needs batches"):
        ot_fusion(build("vit"), build("vit", 1), align="weight", residual="weighted_scalar")
    with pytest.raises(ValueError, match="at least one batch"):
        ot_fusion(mlp, build("mlp"), [])
    with pytest.raises(IncompatibleWeights, match="one architecture"):
        ot_fusion(mlp, build("sequential"), align="weight")
    with pytest.raises(IncompatibleWeights, match="same layers"):
        ot_fusion(mlp, MLP([8, 16, 5]), align="weight")
    with pytest.raises(IncompatibleWeights, match="only hidden widths may differ"):
        ot_fusion(mlp, MLP([8, 16, 12, 6]), align="weight")
    with pytest.raises(IncompatibleWeights, match="only hidden widths may differ"):
        ot_fusion(mlp, MLP([9, 16, 12, 5]), align="weight")
    with pytest.raises(ValueError, match="no rules for model type 'llama'"):
        ot_fusion(build("llama"), build("llama"), align="weight")
    with pytest.raises(ValueError, match="no permutation spec for Embedding"):
        ot_fusion(nn.Embedding(3, 4), nn.Embedding(3, 4), align="weight")
    masked = transformers.BertForMaskedLM(build("bert").config)
    with pytest.raises(ValueError, match=r"no rule carries 'cls.predictions.bias'.* of BertForMaskedLM over"):
        ot_fusion(masked, masked, align="weight", **HARD)
    broken = build("mlp")
    broken.layers[1].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"'layers.1.weight' of model_b holds NaN"):
        ot_fusion(mlp, broken, align="weight")
    with pytest.raises(ValueError, match="epsilon must be in"):
        ot_fusion(mlp, build("mlp"), align="weight", epsilon=0.0)
