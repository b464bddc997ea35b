import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from notebook_kit import models
from notebook_kit.alignment import (
    Part,
    Permutations,
    PermutationSpec,
    compose,
    invert,
    permutation_spec,
    permute,
    random_permutations,
)
from notebook_kit.models import MLP
from notebook_kit.weights import IncompatibleWeights, save
from tests.alignment.nets import BUILD, WITHOUT_STREAM, build, outputs, weights_of, with_weights

CASES = [(name, False) for name in BUILD] + [(name, True) for name in BUILD if name not in WITHOUT_STREAM]


@pytest.mark.parametrize(("name", "residual"), CASES)
def test_a_random_permutation_leaves_the_logits_unchanged(name, residual):
    model = build(name)
    spec = permutation_spec(model, residual=residual)
    before = weights_of(model)
    given_weights = weights_of(model)
    permutations = random_permutations(spec, seed=3, signs=True)
    new = permute(spec, permutations, given_weights)
    assert all(torch.equal(given_weights[key], before[key]) for key in before)
    assert {key: (t.shape, t.dtype) for key, t in new.items()} == {k: (t.shape, t.dtype) for k, t in before.items()}
    # Every tensor that carries a permutation which is not the identity changes, or the test would prove little.
    moved = {perm for perm, share in permutations.moved().items() if share > 0}
    carriers = {key for perm in moved for key, _, _ in spec.uses[perm]}
    assert len(carriers) >= 5
    assert all(not torch.equal(new[key], before[key]) for key in carriers)
    difference = (outputs(with_weights(name, new)) - outputs(model)).abs().max()
    assert difference < 1e-5 * max(1.0, outputs(model).abs().max())


@pytest.mark.parametrize(("name", "residual"), CASES)
def test_inverting_and_composing(name, residual):
    weights = weights_of(build(name))
    spec = permutation_spec(build(name), residual=residual)
    p, q = (random_permutations(spec, seed=seed, signs=True) for seed in (1, 2))
    moved = permute(spec, p, weights)
    back = permute(spec, invert(spec, p), moved)
    assert all(torch.equal(back[key], weights[key]) for key in weights)
    one, two = permute(spec, compose(spec, q, p), weights), permute(spec, q, moved)
    assert all(torch.equal(one[key], two[key]) for key in weights)


def test_the_table_reads_as_declared():
    spec = permutation_spec(MLP([8, 16, 12, 5]))
    assert spec.axes["layers.1.weight"] == ((Part("layers.1"),), (Part("layers.0"),))
    assert spec.axes["layers.2.weight"] == ((), (Part("layers.1"),))
    assert spec.sizes == {"layers.0": 16, "layers.1": 12}
    places = [(name, axis) for name, axis, _ in spec.uses["layers.0"]]
    assert places == [("layers.0.weight", 0), ("layers.0.bias", 0), ("layers.1.weight", 1)]


def test_index_vectors_take():
    spec = PermutationSpec({"w": ("p", None), "v": (None, "p")}, {"p": 3})
    w = torch.arange(6.0).reshape(3, 2)
    new = permute(spec, {"p": torch.tensor([2, 0, 1])}, {"w": w, "v": w.T.contiguous()})
    assert new["w"].tolist() == [[4, 5], [0, 1], [2, 3]]
    assert torch.equal(new["v"], new["w"].T)


def test_one_permutation_moves_both_halves_of_one_slice():
    part = Part("p", signs=(False, True), slice=(0, 1))
    spec = PermutationSpec({"w": (None, part)}, {"p": 2})
    permutations = Permutations({"p": torch.tensor([1, 0])}, signs={"p": torch.tensor([1.0, -1.0])})
    new = permute(spec, permutations, {"w": torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]])})
    assert new["w"].tolist() == [[1, 2, 3, 4], [6, 5, 8, -7]]


def test_query_heads_move_with_their_group_and_inside_it():
    outer, inner = Part("kv", block=2), [Part(f"kv.{g}", start=2 * g) for g in range(2)]
    spec = PermutationSpec(
        {"q": ((outer, *inner),), "k": ("kv",)},
        {"kv": 2, "kv.0": 2, "kv.1": 2},
        inside={"kv.0": ("kv", 0), "kv.1": ("kv", 1)},
    )
    permutations = {"kv": torch.tensor([1, 0]), "kv.0": torch.tensor([1, 0]), "kv.1": torch.tensor([0, 1])}
    new = permute(spec, permutations, {"q": torch.tensor([10.0, 11, 20, 21]), "k": torch.tensor([1.0, 2])})
    assert new["q"].tolist() == [21, 20, 10, 11]
    assert new["k"].tolist() == [2, 1]


def test_nothing_may_move_inside_a_rotary_head():
    model = models.tiny_llama()
    weights = weights_of(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)
    weights, before = weights_of(model), outputs(model)
    order = torch.arange(32).reshape(4, 8).flip(1).flatten()
    for i in range(2):
        for letter, rows in (("q", order), ("k", order[:16])):
            key = f"model.layers.{i}.self_attn.{letter}_proj.weight"
            weights[key] = weights[key][rows]
    model.load_state_dict(weights)
    assert (outputs(model) - before).abs().max() > 1e-2


def test_planes_of_a_rotary_head_may_be_turned_and_scaled():
    g = torch.Generator().manual_seed(0)
    d, n = 8, 6  # of one head, and positions
    q, k = (torch.randn(n, d, generator=g, dtype=torch.float64) for _ in "qk")
    angles = torch.arange(n)[:, None] / 10000 ** (torch.arange(0, d, 2) / d)
    cos, sin = (torch.cat([f(angles.double())] * 2, -1) for f in (torch.cos, torch.sin))

    def scores(q, k):
        q, k = (x[None, None] for x in (q, k))
        q, k = apply_rotary_pos_emb(q, k, cos[None], sin[None])
        return (q @ k.transpose(-1, -2))[0, 0]

    def turned(x, scale):  # plane j holds entries j and j + d/2: a complex number each
        phi, z = torch.rand(d // 2, generator=torch.Generator().manual_seed(1)) * 6, torch.complex(*x.chunk(2, -1))
        z = z * torch.polar(scale, phi.double())
        return torch.cat([z.real, z.imag], -1)

    a = 0.5 + torch.rand(d // 2, generator=g, dtype=torch.float64)
    assert (scores(turned(q, a), turned(k, 1 / a)) - scores(q, k)).abs().max() < 1e-13
    order = torch.randperm(d, generator=g)
    assert (scores(q[:, order], k[:, order]) - scores(q, k)).abs().max() > 0.1


def test_the_free_sign_of_gated_units_keeps_an_expert_to_1e_12():
    torch.manual_seed(0)
    x, w = torch.randn(9, 6).double(), {n: torch.randn(8, 6).double() for n in ("gate", "up")}
    w["down"] = torch.randn(6, 8).double()
    signed = Part("p", signs=(True,))
    spec = PermutationSpec({"gate": ("p", None), "up": (signed, None), "down": (None, signed)}, {"p": 8})
    permutations = random_permutations(spec, seed=1, signs=True)
    assert (permutations.signs["p"] < 0).any()

    def expert(v):
        return (nn.functional.silu(x @ v["gate"].T) * (x @ v["up"].T)) @ v["down"].T

    assert (expert(permute(spec, permutations, w)) - expert(w)).abs().max() < 1e-12


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 9), min_size=3, max_size=5), st.integers(0, 99))
def test_any_mlp_keeps_its_function(widths, seed):
    torch.manual_seed(seed)
    model, x = MLP(widths), torch.randn(5, widths[0])
    spec = permutation_spec(model)
    new = MLP(widths)
    new.load_state_dict(permute(spec, random_permutations(spec, seed), model.state_dict()))
    torch.testing.assert_close(new(x), model(x), atol=1e-5, rtol=1e-5)


def test_a_configuration_is_enough_and_files_of_mixtral_keep_experts_apart(tmp_path):
    model = models.tiny_mixtral()
    spec = permutation_spec(model.config)
    assert spec.sizes == permutation_spec(model).sizes
    assert spec.sizes["layers.1.experts.7"] == 64
    on_disk = {f"model.layers.{i}.block_sparse_moe.gate.weight": torch.zeros(8, 32) for i in range(2)}
    for i in range(2):
        for w, shape in (("q", (32, 32)), ("k", (16, 32)), ("v", (16, 32)), ("o", (32, 32))):
            on_disk[f"model.layers.{i}.self_attn.{w}_proj.weight"] = torch.zeros(shape)
        for e in range(8):
            for w, shape in (("w1", (64, 32)), ("w2", (32, 64)), ("w3", (64, 32))):
                on_disk[f"model.layers.{i}.block_sparse_moe.experts.{e}.{w}.weight"] = torch.zeros(shape)
    listed = permutation_spec(model.config, weights=on_disk)
    assert listed.sizes == spec.sizes
    listed.check(on_disk)
    from notebook_kit.weights import Checkpoint

    save(on_disk, tmp_path / "w.safetensors")
    assert permutation_spec(model.config, weights=Checkpoint(tmp_path / "w.safetensors")).axes == listed.axes


def test_sixteen_bit_weights_stay_sixteen_bit():
    model = models.tiny_mixtral().to(torch.bfloat16)
    spec = permutation_spec(model)
    new = permute(spec, random_permutations(spec, 0, signs=True), model.state_dict())
    assert {tensor.dtype for tensor in new.values()} == {torch.bfloat16}


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"'gpt2'.*known are llama"):
        permutation_spec(models.tiny_gpt2())
    with pytest.raises(ValueError, match=r"known are MLP"):
        permutation_spec(nn.TransformerEncoderLayer(8, 2))
    with pytest.raises(ValueError, match=r"'1' is a Conv1d"):
        permutation_spec(nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 1), nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="hidden units need two"):
        permutation_spec(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match=r"'p'.*two axes of 'w'"):
        PermutationSpec({"w": ("p", "p")}, {"p": 3})
    with pytest.raises(ValueError, match=r"'p'.*no size"):
        PermutationSpec({"w": ("p", None)}, {})
    config = transformers.BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    masked = transformers.BertForMaskedLM(config)
    with pytest.raises(ValueError, match="residual=False"):
        permutation_spec(masked, residual=True)
    spec, weights = permutation_spec(MLP([4, 3, 2])), MLP([4, 3, 2]).state_dict()
    with pytest.raises(ValueError, match=r"must reorder 0\.\.2"):
        permute(spec, {"layers.0": torch.tensor([0, 0, 1])}, weights)
    with pytest.raises(ValueError, match="no permutation is called 'q'"):
        permute(spec, {"q": torch.tensor([0, 1, 2])}, weights)
    with pytest.raises(IncompatibleWeights, match=r"no tensor 'layers\.0\.weight'"):
        permute(spec, {}, {})
    with pytest.raises(IncompatibleWeights, match="needs 3 on axis 0"):
        permute(spec, {}, MLP([4, 5, 2]).state_dict())
    with pytest.raises(ValueError, match=r"no 'model\.layers"):
        permutation_spec(models.tiny_llama().config, weights={"model.norm.weight": torch.zeros(32)})
