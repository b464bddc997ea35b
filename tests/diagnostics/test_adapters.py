"""Diagnostics of adapters: against the full matrices, on every layout of host."""

import copy

import pytest
import torch
from torch import nn

from notebook_kit.adapters import Adapter, CannotFold, LoRA, ParallelBottleneck, SeriesBottleneck, attach, detach, fold
from notebook_kit.diagnostics.adapters import delta_spectra, delta_table, fold_error, folded_weights
from notebook_kit.models import MLP, tiny_gpt2, tiny_llama
from tests.adapters.conftest import IDS, disturb, run


def adapted(build, adapter, targets, **values):
    model = build()
    attach(model, adapter, targets=targets, **values)
    disturb(model, std=0.3)
    return model


CASES = [
    (tiny_llama, LoRA, r"(q|down)_proj$", {"rank": 3, "alpha": 5}),
    (tiny_gpt2, LoRA, r"c_(attn|fc)$", {"rank": 3}),
    (lambda: MLP([8, 16, 4]).eval(), ParallelBottleneck, "layers", {"rank": 3, "activation": "identity", "scale": 0.5}),
    (lambda: MLP([8, 16, 4]).eval(), SeriesBottleneck, "layers", {"rank": 3, "activation": "identity"}),
    (tiny_gpt2, SeriesBottleneck, r"c_fc$", {"rank": 3, "activation": "identity", "side": "input"}),
]


@pytest.mark.parametrize(("build", "adapter", "targets", "values"), CASES)
def test_spectra_and_table_equal_the_full_matrices(build, adapter, targets, values):
    model = adapted(build, adapter, targets, **values)
    spectra, table = delta_spectra(model), delta_table(model).set_index("module")
    assert list(spectra) == list(table.index)
    for name, s in spectra.items():
        module = model.get_submodule(name)
        full = torch.linalg.svdvals(module.delta()["weight"])
        assert s.shape == (3,)
        torch.testing.assert_close(s, full[:3], rtol=1e-4, atol=1e-5)
        assert full[3:].max() < 1e-4 * full[0]
        row = table.loc[name]
        assert row.norm == pytest.approx(module.delta()["weight"].norm().item(), rel=1e-4)
        assert row.relative_norm == pytest.approx(row.norm / module.host.weight.norm().item(), rel=1e-4)
        assert 1 <= row.stable_rank <= row.effective_rank <= 3.0001
        assert row["rank"] == 3


@pytest.mark.parametrize(("build", "adapter", "targets", "values"), CASES)
def test_folded_weights_at_full_rank_are_what_fold_gives(build, adapter, targets, values):
    model = adapted(build, adapter, targets, **values)
    before = copy.deepcopy(model.state_dict())
    base = detach(copy.deepcopy(model)).state_dict()
    whole = folded_weights(model, rank=3)
    nothing = folded_weights(model, rank=3, strength=0.0)
    cut = folded_weights(model, rank=1)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    spectra = delta_spectra(model)
    expected = fold(model).state_dict()
    assert list(whole) == list(expected)
    for key, tensor in expected.items():
        torch.testing.assert_close(whole[key], tensor, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(nothing[key], base[key])
    for name, s in spectra.items():
        key = f"{name}.weight"
        torch.testing.assert_close((cut[key] - base[key]).norm(), s[0], rtol=1e-3, atol=1e-4)


def test_an_adapter_with_a_delta_but_no_factors():
    class Sparse(Adapter):
        def __init__(self, host):
            super().__init__(host)
            self.change = nn.Parameter(torch.diag(torch.tensor([3.0, 2.0, 1.0])))

        def delta(self):
            return {"weight": self.change.detach()}

    model = nn.Sequential(nn.Linear(3, 3))
    attach(model, Sparse, targets="0")
    assert delta_spectra(model)["0"].tolist() == pytest.approx([3, 2, 1])


def test_fold_error_grows_as_the_format_shrinks():
    model = adapted(tiny_llama, LoRA, r"_proj$", rank=4)
    before = run(model, {"input_ids": IDS})
    frame = fold_error(model, {"input_ids": IDS}).set_index("dtype")
    assert frame.mean_error["float32"] < 1e-5
    assert frame.mean_error["float32"] < frame.mean_error["float16"] < frame.mean_error["bfloat16"]
    assert frame.lost["float32"] < 1e-6
    # bfloat16 keeps 8 bits: half a unit in the last place of W is about 0.2 % of W, more of a smaller ΔW.
    assert 1e-3 < frame.lost["bfloat16"] < 0.1
    assert (frame.max_error >= frame.mean_error).all()
    assert frame.format_error["float32"] == 0
    assert torch.equal(run(model, {"input_ids": IDS}), before)


def test_fold_error_takes_a_tensor():
    model = adapted(lambda: MLP([8, 4]).eval(), LoRA, "layers", rank=2)
    frame = fold_error(model, torch.randn(5, 8), dtypes=("bfloat16",))
    assert frame.shape == (1, 5)


def test_what_has_no_weight_space_form():
    model = adapted(tiny_llama, ParallelBottleneck, r"q_proj$", rank=2, activation="tanh")
    for measure in (delta_spectra, delta_table, folded_weights):
        with pytest.raises(
            CannotFold, match=r"layers\.0\.self_attn\.q_proj: ParallelBottleneck with activation='tanh'"
        ):
            measure(model)
    with pytest.raises(ValueError, match="LlamaForCausalLM carries no adapter"):
        delta_table(tiny_llama())


def test_an_untrained_lora_has_no_rank():
    model = tiny_llama()
    attach(model, LoRA, targets=r"q_proj$", rank=2)
    table = delta_table(model)
    assert table.norm.tolist() == [0, 0]
    assert table.stable_rank.isna().all()
