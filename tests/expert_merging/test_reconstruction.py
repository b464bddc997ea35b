import itertools

import pytest
import torch

from notebook_kit.diagnostics.experts import subset_losses_frame
from notebook_kit.expert_merging import best_subset, calibration_inputs, drop_experts, expert_view
from notebook_kit.expert_merging.outputs import expert_outputs
from notebook_kit.expert_merging.reconstruction import mixture, router_logits
from tests.expert_merging.moes import KINDS, logits, moe, prepared, trace_of

FREE = [kind for kind in KINDS if kind != "deepseek_v3"]


@pytest.mark.parametrize("kind", FREE)
def test_the_whole_set_gives_the_layers_own_output(kind):
    model, trace, before = prepared(kind)
    layer = expert_view(model)[0]
    x, chosen = calibration_inputs(model, trace, None)[layer.name]
    routed = mixture(expert_outputs(layer, x), router_logits(layer, x), tuple(range(8)), trace)
    _, weights, experts = layer.router_module(x)
    torch.testing.assert_close(routed, layer.experts(x, experts, weights), atol=1e-4, rtol=1e-4)
    assert torch.equal(experts, chosen)
    new = drop_experts(model, trace, n_experts=8, by="reconstruction")
    assert (logits(new) - before).abs().max() < 1e-6


def test_all_70_sets_are_tried_and_greedy_never_beats_them():
    model, trace, _ = prepared()
    layer = expert_view(model)[1]
    x = calibration_inputs(model, trace, None)[layer.name][0]
    kept, losses = best_subset(layer, x, trace, 4)
    assert set(losses) == set(itertools.combinations(range(8), 4))
    assert losses[kept] == min(losses.values()) > 0
    for n in (2, 4, 6):
        exhaustive = best_subset(layer, x, trace, n, greedy=False)
        greedy = best_subset(layer, x, trace, n, greedy=True)
        assert len(greedy[0]) == n
        assert exhaustive[1][exhaustive[0]] <= greedy[1][greedy[0]] + 1e-6
    assert best_subset(layer, x, trace, 8)[1] == {tuple(range(8)): 0.0}
    assert best_subset(layer, x, trace, 8, greedy=True)[0] == tuple(range(8))
    # The loss is that of the smaller layer.
    smaller = expert_view(drop_experts(model, trace, n_experts=4, by="reconstruction"))[1]
    z, z_small = (one.block(x[None])[0] for one in (layer, smaller))
    assert losses[kept] == pytest.approx((z - z_small).norm().item(), rel=1e-3)


def test_an_expert_that_is_never_used_is_found():
    model = moe()
    with torch.no_grad():
        for layer in expert_view(model):
            layer.router[2] = layer.router[[0, 1, 3, 4, 5]].mean(0)
            layer.block.gate.top_k = 1
    model.config.num_experts_per_tok = 1
    trace, before = trace_of(model), logits(model)
    new = drop_experts(model, trace, n_experts=7, by="reconstruction")
    torch.testing.assert_close(logits(new), before, atol=1e-5, rtol=1e-5)
    frame = subset_losses_frame(model, trace, n_experts=7)
    assert frame["kept"][0] == (0, 1, 3, 4, 5, 6, 7)
    assert frame["loss"][0] < 1e-4 < frame["loss"][1]


def test_rows_may_be_led_to_kept_experts_instead():
    model, trace, _ = prepared()
    new = drop_experts(model, trace, n_experts=3, by="reconstruction", router="map")
    assert all((len(layer), len(layer.router)) == (3, 8) for layer in expert_view(new))


def test_bad_input_is_named():
    model, trace, _ = prepared("deepseek_v3")
    with pytest.raises(ValueError, match="scores with a sigmoid"):
        drop_experts(model, trace, by="reconstruction")
    model, trace, _ = prepared()
    with pytest.raises(ValueError, match="adaptive compares layers"):
        drop_experts(model, trace, by="reconstruction", router="map", adaptive=True)
    with pytest.raises(ValueError, match="n_calibration"):
        drop_experts(model, trace, n_calibration=3)
