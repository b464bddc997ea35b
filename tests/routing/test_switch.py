"""Switch Transformers' routers in a trace: an encoder and a decoder, one expert a token, capacity."""

import pytest
import torch
from torch import nn

from notebook_kit import models
from notebook_kit.routing import RoutingTrace, record_routing
from notebook_kit.routing.switch import heard_by, is_switch_router, stack_of, switch_decision

READ = torch.arange(2, 42).reshape(2, 20) * 5 % 256
WRITTEN = torch.arange(2, 26).reshape(2, 12) * 7 % 256
NAMES = ("encoder.block.1.layer.1.mlp", "decoder.block.1.layer.2.mlp")


def test_a_decision_by_hand():
    mask = torch.tensor([[[0, 1, 0], [0, 0, 0], [1, 0, 0]]])  # the second token found no place
    logits = torch.arange(9.0).reshape(1, 3, 3)
    said = switch_decision((mask, torch.tensor([[[0.5], [0.6], [0.7]]]), logits))
    assert torch.equal(said[0], logits[0])
    torch.testing.assert_close(said[1], torch.tensor([[0.5], [0.0], [0.7]]))
    assert said[2].tolist() == [[1], [-1], [0]]


def test_names_say_what_a_block_is_part_of():
    assert [stack_of(name) for name in NAMES] == ["encoder", "decoder"]
    assert stack_of("base_model.model.encoder.block.3.layer.1.mlp") == "base_model.model.encoder"
    assert stack_of("model.layers.3.mlp") == stack_of("block.1.layer.1.mlp") == ""
    assert not is_switch_router(nn.Linear(2, 2))
    assert not is_switch_router(None)


@torch.no_grad()
def test_both_stacks_are_recorded_and_each_hears_its_own_text():
    model = models.tiny_switch()
    with record_routing(model) as trace:
        said = model(input_ids=READ, decoder_input_ids=WRITTEN, output_router_logits=True)
    assert trace.layers == NAMES
    assert (len(trace), trace.k, trace.normalize, trace.scoring) == (64, 1, False, "softmax")
    assert torch.equal(trace.tokens, torch.cat([READ.flatten(), WRITTEN.flatten()]))
    assert torch.bincount(trace.sequences).tolist() == [20, 20, 12, 12]
    assert trace.positions[39:42].tolist() == [19, 0, 1]
    for i, logits in enumerate((said.encoder_router_logits[0], said.decoder_router_logits[0])):
        heard, routing, logits = heard_by(trace, i), trace.layer(i), logits.flatten(0, 1)
        assert torch.equal(heard, (torch.arange(64) < 40) == (i == 0))
        torch.testing.assert_close(routing.logits[heard], logits)
        assert torch.equal(routing.experts[heard, 0], logits.argmax(1))
        torch.testing.assert_close(routing.weights[heard, 0], logits.softmax(1).amax(1))
        assert (routing.experts[~heard] == -1).all()
        assert (routing.weights[~heard] == 0).all()
        torch.testing.assert_close(routing.load, torch.bincount(logits.argmax(1), minlength=8) / len(logits))


@torch.no_grad()
def test_tokens_beyond_an_experts_capacity_are_not_counted():
    model = models.tiny_switch(expert_capacity=2)
    with record_routing(model) as trace:
        model(input_ids=READ, decoder_input_ids=WRITTEN)
    routing = trace.layer(0)
    served, chosen = routing.experts[:40, 0].reshape(2, 20), routing.logits[:40].argmax(1).reshape(2, 20)
    for sequence, wanted in zip(served, chosen, strict=True):
        for e in range(8):  # the first two of each sequence are served
            places = (wanted == e).nonzero().flatten()
            assert (sequence[places[:2]] == e).all()
            assert (sequence[places[2:]] == -1).all()
    assert (served == -1).any()
    assert (routing.weights[:40, 0][served.flatten() == -1] == 0).all()
    torch.testing.assert_close(routing.load, torch.bincount(served[served >= 0], minlength=8) / (served >= 0).sum())


@torch.no_grad()
def test_padding_labels_and_generation(tmp_path):
    model = models.tiny_switch()
    mask, written = torch.ones_like(READ), torch.ones_like(WRITTEN)
    mask[0, 15:], written[1, 10:] = 0, 0
    with record_routing(model) as trace:
        with trace.labelled(["eng", "deu"]):
            model(READ, mask, WRITTEN, written)
        text = model.generate(READ, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert torch.bincount(trace.sequences).tolist() == [15, 20, 12, 10, 20, 20, 4, 4]
    assert torch.bincount(trace.labels).tolist() == [27, 30, 48]
    for row in range(2):  # the last token written is never read
        mine = trace.sequences == 6 + row
        assert torch.equal(trace.tokens[mine], text[row, :-1])
        assert trace.positions[mine].tolist() == [0, 1, 2, 3]
    again = RoutingTrace.load(trace.save(tmp_path / "trace.safetensors"))
    assert torch.equal(again.layer(1).experts, trace.layer(1).experts)


@torch.no_grad()
def test_a_stack_alone_or_inside_another_module():
    model = models.tiny_switch()
    with record_routing(model.encoder) as trace:
        model.encoder(READ)
    assert trace.layers == ("block.1.layer.1.mlp",)
    assert heard_by(trace, 0).all()
    outer = nn.Sequential(model)
    with record_routing(outer) as trace:
        model(input_ids=READ[:, :12], decoder_input_ids=WRITTEN)  # of one length, and still told apart
    assert trace.layers == tuple(f"0.{name}" for name in NAMES)
    assert torch.equal(heard_by(trace, 0), torch.arange(48) < 24)


def test_training_goes_on_while_it_is_recorded():
    model = models.tiny_switch().train()
    with record_routing(model) as trace:
        model(input_ids=READ, labels=WRITTEN, output_router_logits=True).loss.backward()
    assert len(trace) == 64
    assert all(not layer.requires_grad for layer in (trace.layer(0).logits, trace.layer(1).weights))


@torch.no_grad()
@pytest.mark.parametrize("build", [models.tiny_switch, models.tiny_mixtral])
def test_embeddings_have_no_token_ids_whatever_mask_comes_with_them(build):
    model, mask = build(), torch.ones(2, 12, dtype=torch.long)
    mask[0, 9:] = 0
    written = {"decoder_input_ids": WRITTEN} if model.config.is_encoder_decoder else {}
    with record_routing(model) as trace:
        model(inputs_embeds=torch.randn(2, 12, 32), attention_mask=mask, **written)
    assert (trace.tokens[heard_by(trace, 0)] == -1).all()
    assert torch.bincount(trace.sequences).tolist()[:2] == [9, 12]


def test_a_broken_router_is_named():
    model = models.tiny_switch()
    with torch.no_grad():
        model.decoder.block[1].layer[2].mlp.router.classifier.weight[3, 0] = torch.nan
    with record_routing(model), pytest.raises(ValueError, match=r"NaN|decoder\.block\.1\.layer\.2\.mlp"):
        model(input_ids=READ, decoder_input_ids=WRITTEN)
