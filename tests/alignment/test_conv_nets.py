import copy

import pytest
import torch
import transformers
from torch import nn

from notebook_kit.alignment import (
    Part,
    activation_matching,
    permutation_spec,
    permute,
    random_permutations,
    reset_batch_norm,
)
from notebook_kit.models import MLP, VGG, ResNet, tiny_t5
from tests.alignment.nets import build, outputs, weights_of, with_weights


def test_a_flattened_channel_is_a_block_of_columns():
    spec = permutation_spec(VGG((4, 6), hidden=8))
    assert spec.axes["conv1.weight"] == ((Part("conv1"),), (Part("conv0"),), (), ())
    assert spec.axes["hidden.weight"] == ((Part("hidden"),), (Part("conv3", block=4),))
    assert spec.axes["norm2.running_var"] == ((Part("conv2"),),)
    assert spec.passive == {f"norm{i}.running_{what}" for i in range(4) for what in ("mean", "var")}
    assert spec.sizes == {"conv0": 4, "conv1": 4, "conv2": 6, "conv3": 6, "hidden": 8}


def test_one_permutation_for_each_residual_stream():
    spec = permutation_spec(ResNet((4, 6), blocks=2), residual=True)
    on = {name: tuple(part[0].perm if part else None for part in row[:2]) for name, row in spec.axes.items()}
    assert on["stem.conv.weight"] == ("stream.0", None)
    assert on["stages.0.0.second.conv.weight"] == ("stream.0", "stages.0.0.first")
    assert on["stages.0.1.second.conv.weight"] == ("stream.0", "stages.0.1.first")
    assert on["stages.1.0.first.conv.weight"] == ("stages.1.0.first", "stream.0")
    assert on["stages.1.0.shortcut.conv.weight"] == ("stream.1", "stream.0")
    assert on["stages.1.1.second.conv.weight"] == ("stream.1", "stages.1.1.first")
    assert on["head.weight"] == (None, "stream.1")
    assert set(permutation_spec(ResNet((4, 6))).sizes) == {"stages.0.0.first", "stages.1.0.first"}
    model = build("resnet of transformers, bottleneck")
    theirs = permutation_spec(model, residual=True)
    assert theirs.sizes["stream.1"] == 32
    assert theirs.axes == permutation_spec(model.config, residual=True, weights=model.state_dict()).axes
    inner = permutation_spec(transformers.ResNetConfig(hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"))
    assert "encoder.stages.0.layers.0.layer.0" in inner.sizes


@pytest.mark.parametrize("name", ["vgg", "resnet", "resnet of transformers", "t5"])
def test_planted_units_come_back_by_their_activations(name):
    model = build(name)
    residual = name != "vgg"
    a, spec = weights_of(model), permutation_spec(model, residual=residual)
    b = permute(spec, random_permutations(spec, seed=3), a)
    generator = torch.Generator().manual_seed(5)
    if name == "t5":
        ids = torch.randint(0, 256, (2, 16, 12), generator=generator)
        batch = {"input_ids": ids[0], "decoder_input_ids": ids[1]}
    elif name == "resnet of transformers":
        batch = torch.randn(20, 1, 16, 16, generator=generator)
    else:
        batch = torch.randn(40, 64, generator=generator)
    found = activation_matching(spec, model, with_weights(name, b), [batch])
    recovered = permute(spec, found, b)
    half = {key: (a[key] + recovered[key]) / 2 if a[key].is_floating_point() else a[key] for key in a}
    naive = {key: (a[key] + b[key]) / 2 if a[key].is_floating_point() else a[key] for key in a}
    scale = outputs(model).abs().max()
    assert (outputs(with_weights(name, half)) - outputs(model)).abs().max() < 1e-3 * scale
    assert (outputs(with_weights(name, naive)) - outputs(model)).abs().max() > 5e-2 * scale


def test_a_t5_head_moves_with_its_column_of_the_bias_table():
    spec = permutation_spec(tiny_t5(), residual=True)
    table = "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert spec.axes[table] == ((), (Part("decoder.heads"),))
    assert spec.axes["decoder.block.1.layer.0.SelfAttention.q.weight"][0] == (Part("decoder.heads", block=8),)
    assert spec.axes["decoder.block.1.layer.1.EncDecAttention.k.weight"][1] == (Part("residual"),)
    assert {perm for perm in spec.sizes if "cross" in perm} == {"decoder.0.cross_heads", "decoder.1.cross_heads"}
    encoder = transformers.T5EncoderModel(tiny_t5().config)
    assert set(permutation_spec(encoder).sizes) == {"encoder.heads", "encoder.0.ffn", "encoder.1.ffn"}


def test_reset_batch_norm_measures_what_the_layer_sees():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.9), nn.Linear(4, 2))
    model[1].running_mean.fill_(9.0)
    model.eval()
    model[3].train()
    batches = [torch.randn(50, 3), torch.randn(50, 3) + 1]
    expected = torch.stack([model[0](x).mean(0) for x in batches]).mean(0)
    variance = torch.stack([model[0](x).var(0) for x in batches]).mean(0)
    weights = copy.deepcopy(list(model.parameters()))
    reset_batch_norm(model, batches)
    torch.testing.assert_close(model[1].running_mean, expected.detach(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(model[1].running_var, variance.detach(), atol=1e-6, rtol=1e-5)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), weights, strict=True))
    assert [layer.training for layer in model] == [False, False, False, True]
    assert model[1].momentum == 0.1


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="no batch norm"):
        reset_batch_norm(MLP([2, 3, 2]), [torch.zeros(2, 2)])
    with pytest.raises(ValueError, match="at least one batch"):
        reset_batch_norm(VGG(), [])
    conv = nn.Conv2d(2, 4, 1)
    with pytest.raises(ValueError, match=r"'0' has 2 groups"):
        permutation_spec(nn.Sequential(nn.Conv2d(2, 4, 1, groups=2), nn.Conv2d(4, 2, 1)))
    with pytest.raises(ValueError, match=r"'1' is a Linear.*before a Flatten"):
        permutation_spec(nn.Sequential(conv, nn.Linear(4, 4)))
    with pytest.raises(ValueError, match=r"'1' is a LayerNorm"):
        permutation_spec(nn.Sequential(conv, nn.LayerNorm(4), nn.Conv2d(4, 4, 1)))
    with pytest.raises(ValueError, match=r"'1' is a Unflatten"):
        permutation_spec(nn.Sequential(nn.Linear(4, 4), nn.Unflatten(-1, (1, 2, 2)), nn.Conv2d(1, 4, 1)))
