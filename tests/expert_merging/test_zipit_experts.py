import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from notebook_kit.alignment import permute, random_permutations
from notebook_kit.diagnostics.experts import plant_permuted_copies
from notebook_kit.expert_merging import average_experts, expert_view, usage_of, zipit_experts
from notebook_kit.expert_merging.align_experts import expert_of, expert_spec
from notebook_kit.expert_merging.zipit_experts import merge_units
from tests.expert_merging.moes import KINDS, Listed, ids, logits, made_up_trace, prepared, trace_of


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("matching", ["greedy", "fixed-dominant"])
def test_permuted_copies_zip_without_loss(kind, matching):
    model, trace, _ = prepared(kind)
    planted = plant_permuted_copies(model, usage_of(trace, model))
    before = logits(planted)
    trace = trace_of(planted)
    merged = zipit_experts(planted, trace, n_experts=4, matching=matching)
    assert [len(layer) for layer in expert_view(merged)] == [4] * len(expert_view(model))
    scale = before.abs().max()
    assert (logits(merged) - before).abs().max() < 1e-3 * scale
    assert (logits(average_experts(planted, trace, n_experts=4)) - before).abs().max() > 1e-2 * scale
    assert torch.equal(logits(planted), before)


def test_all_experts_kept_is_the_identity():
    model, trace, before = prepared()
    torch.testing.assert_close(logits(zipit_experts(model, trace, n_experts=8)), before, atol=1e-5, rtol=1e-5)


def test_columns_sum_and_rows_meet_as_means():
    """Two experts of two units: expert 0's units join, expert 1's second joins them."""
    one = {"gate": torch.tensor([[1.0], [3.0]]), "up": torch.tensor([[2.0], [4.0]]), "down": torch.tensor([[5.0, 7.0]])}
    two = {"gate": torch.tensor([[9.0], [5.0]]), "up": torch.tensor([[8.0], [6.0]]), "down": torch.tensor([[1.0, 2.0]])}
    gate, up, down = merge_units([one, two], (0.75, 0.25), torch.tensor([[0, 0], [1, 0]]))
    assert gate.tolist() == [[3.0], [9.0]]
    assert up.tolist() == [[4.0], [8.0]]
    assert down.tolist() == [[0.75 * 12 + 0.25 * 2, 0.25 * 1]]


def test_an_expert_with_doubled_units_keeps_its_function_where_means_would_not():
    torch.manual_seed(0)
    half = [torch.randn(3, 4), torch.randn(3, 4), torch.randn(4, 3)]
    twice = {"gate": half[0].repeat(2, 1), "up": half[1].repeat(2, 1), "down": torch.cat([half[2], -0.3 * half[2]], 1)}
    other = permute(expert_spec(6), random_permutations(expert_spec(6), 1), twice)
    order = random_permutations(expert_spec(6), 1)["units"]
    places = torch.stack([torch.arange(6) % 3, order % 3])
    gate, up, down = merge_units([twice, other], (0.5, 0.5), places)
    x = torch.randn(7, 4)

    def run(g, u, d):
        return (nn.functional.silu(x @ g.T) * (x @ u.T)) @ d.T

    torch.testing.assert_close(run(gate, up, down), run(*twice.values()))


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_the_result_saves_loads_and_generates(kind, tmp_path):
    model, trace, _ = prepared(kind)
    merged = zipit_experts(model, trace, n_experts=3, n_calibration=64)
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again), logits(merged))
    assert again.generate(ids(0, 1, 4), max_new_tokens=3, do_sample=False).shape == (1, 7)


def test_lists_of_experts_and_given_batches():
    torch.manual_seed(0)
    model = Listed().eval()
    layer = expert_view(model)[0]
    spec = expert_spec(5)
    copy = permute(spec, random_permutations(spec, 2), expert_of(layer, 0))
    with torch.no_grad():
        for name, weight in zip(layer.names, copy.values(), strict=True):
            getattr(model.block.experts[1], name).weight.copy_(weight)
        model.block.gate.weight[1] = model.block.gate.weight[0]
    x = torch.randn(30, 6)
    similar = torch.randn(100, 4)
    similar[:, 1] = similar[:, 0]
    trace = made_up_trace(model, (0.4, 0.1, 0.25, 0.25), logits_of=similar)
    with torch.no_grad():
        merged = zipit_experts(model, trace, n_experts=3, batches=[x])
        torch.testing.assert_close(merged(x), model(x), atol=1e-5, rtol=1e-4)
    assert len(expert_view(merged)[0]) == 3


def test_bad_input_is_named():
    model, trace, _ = prepared()
    with pytest.raises(ValueError, match=r"n_experts must be in \[1, 8\], got 9 \(zipit_experts\)"):
        zipit_experts(model, trace, n_experts=9)
    with pytest.raises(ValueError, match="matching must be one of 'greedy', 'fixed-dominant'"):
        zipit_experts(model, trace, matching="average")
    with pytest.raises(ValueError, match="at least one batch"):
        zipit_experts(model, trace, batches=[])
    with pytest.raises(ValueError, match="another model"):
        zipit_experts(prepared("deepseek_v3")[0], trace)
