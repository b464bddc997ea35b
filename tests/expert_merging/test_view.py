import pytest
import torch
from torch import nn

from notebook_kit import models
from notebook_kit.expert_merging import UnknownExperts, expert_view
from notebook_kit.expert_merging.align_experts import expert_of
from notebook_kit.expert_merging.layout import fused_parts
from notebook_kit.expert_merging.outputs import expert_output
from tests.expert_merging.moes import KINDS, Listed, moe


@pytest.mark.parametrize("kind", KINDS)
def test_the_parts_are_what_the_model_computes_with(kind):
    model = moe(kind)
    for layer in expert_view(model):
        x, e = torch.randn(7, 32), 3
        chosen = torch.full((7, 1), e)
        expected = layer.experts(x, chosen, torch.ones(7, 1))
        torch.testing.assert_close(expert_output(layer, expert_of(layer, e), x), expected, atol=1e-5, rtol=1e-4)
        if kind != "gpt_oss":
            hidden = nn.functional.silu(x @ layer.gate[e].T) * (x @ layer.up[e].T)
            torch.testing.assert_close(hidden @ layer.down[e].T, expected, atol=1e-5, rtol=1e-4)
        assert (layer.biased, layer.signed) == (kind == "gpt_oss", kind != "gpt_oss")
        assert len(layer) == 8
        assert layer.router.shape == (8, 32)
        assert layer.expert_map == tuple(range(8))


def test_writing_goes_to_the_model_and_reading_is_a_view():
    model = moe()
    layer = expert_view(model)[0]
    gate, up, down = layer.gate.clone(), layer.up.clone(), layer.down.clone()
    layer.write(2 * gate, up, down)
    assert torch.equal(layer.gate, 2 * gate)
    assert torch.equal(model.model.layers[0].mlp.experts.gate_up_proj[:, :64], 2 * gate)
    assert torch.equal(layer.up, up)
    with pytest.raises(ValueError, match="must have shape"):
        layer.write(gate[:, :5], up[:, :5], down[..., :5])


def test_a_list_is_read_and_written_through_the_same_view():
    model = Listed()
    (layer,) = expert_view(model)
    assert (layer.name, layer.gate.shape, layer.down.shape) == ("block", (4, 5, 6), (4, 6, 5))
    assert torch.equal(layer.up[2], model.block.experts[2].w3.weight)
    layer.write(layer.gate, 3 * layer.up, layer.down)
    assert torch.equal(layer.up[2], model.block.experts[2].w3.weight)
    model.block.experts[1] = model.block.experts[0]
    assert (len(layer), layer.expert_map) == (3, (0, 0, 1, 2))


class Fused(nn.Module):
    is_transposed, is_concatenated, has_gate, has_bias = False, True, True, False

    def __init__(self, gate_up, down):
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Parameter(gate_up), nn.Parameter(down)


def test_orientation_comes_from_the_class_where_shapes_could_not_tell():
    # 2f = d: [E, 2f, d] and [E, d, 2f] look alike.
    both, down = torch.randn(2, 4, 4), torch.randn(2, 4, 2)
    straight = Fused(both, down)
    gate, up, down_read = fused_parts(straight)
    assert torch.equal(gate, both[:, :2])
    assert torch.equal(up, both[:, 2:])
    turned = Fused(both, down.transpose(1, 2).contiguous())
    turned.is_transposed, turned.is_concatenated = True, False
    gate, up, down_read = fused_parts(turned)
    assert torch.equal(gate, both[:, :, 0::2].transpose(1, 2))
    assert torch.equal(up, both[:, :, 1::2].transpose(1, 2))
    assert torch.equal(down_read, down)
    gate.zero_()
    assert (turned.gate_up_proj[:, :, 0::2] == 0).all()


def test_fused_experts_without_a_gate_have_two_parts():
    up, down = torch.randn(2, 3, 4), torch.randn(2, 4, 3)
    plain = nn.Module()
    plain.has_gate, plain.has_bias, plain.is_concatenated, plain.is_transposed = False, False, False, True
    plain.up_proj, plain.down_proj = nn.Parameter(up.mT.contiguous()), nn.Parameter(down.mT.contiguous())
    assert all(torch.equal(*pair) for pair in zip(fused_parts(plain), (up, down), strict=True))
    block = nn.Module()
    block.experts, block.gate = plain, nn.Linear(4, 2)
    (layer,) = expert_view(nn.ModuleDict({"a": block}))
    assert (layer.parts, len(layer), layer.width, layer.signed) == (("up", "down"), 2, 3, False)
    layer.write(2 * up, down)
    assert torch.equal(plain.up_proj, 2 * up.mT)
    plain.has_bias = True
    with pytest.raises(UnknownExperts, match="biases and no gate"):
        fused_parts(plain)
    plain.has_gate = True
    with pytest.raises(UnknownExperts, match="no gate_up_proj"):
        fused_parts(plain)


def test_bad_input_is_named():
    with pytest.raises(UnknownExperts, match="no routed experts in LlamaForCausalLM"):
        expert_view(models.tiny_llama())
    block = nn.Module()
    block.experts, block.gate = nn.ModuleList([nn.Linear(2, 2)]), nn.Linear(2, 1)
    with pytest.raises(UnknownExperts, match="holds Linear; known are"):
        expert_view(nn.ModuleDict({"a": block}))
    for flag, text in (("has_bias", "biases"), ("is_transposed", "does not say")):
        experts = Fused(torch.zeros(1, 2, 2), torch.zeros(1, 2, 1))
        setattr(experts, flag, True if flag == "has_bias" else None)
        with pytest.raises(UnknownExperts, match=text):
            fused_parts(experts)
    with pytest.raises(UnknownExperts, match="no gate_up_proj"):
        fused_parts(nn.Linear(2, 2))
