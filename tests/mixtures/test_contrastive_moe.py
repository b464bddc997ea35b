"""Upcycling changes nothing, domains keep apart, and the ranking losses by hand."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from notebook_kit.mixtures import ContrastiveMoE, mnr_loss, mnr_plus_loss
from notebook_kit.mixtures.ranking_loss import mnr_plus_targets
from notebook_kit.models import tiny_bert, tiny_llama


def texts(n=6, length=9, seed=0):
    ids = torch.randint(1, 256, (n, length), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = 0
    return ids


def tiny_modernbert():
    from transformers import ModernBertConfig, ModernBertModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"intermediate_size": 48, "pad_token_id": None, "attn_implementation": "eager"}
    return ModernBertModel(ModernBertConfig(**sizes, **more)).eval()


def distinct(model):
    """Make the experts differ."""
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if ".experts." in name:
            p.data += 0.3 * torch.randn_like(p)
    return model


@pytest.mark.parametrize("make", [tiny_bert, tiny_modernbert])
@pytest.mark.parametrize("options", [{}, {"which": "middle"}, {"layers": [0]}, {"tokens": False}])
def test_after_upcycling_every_domain_is_the_dense_model(make, options):
    dense, ids = make(), texts()
    model = ContrastiveMoE(dense, 3, **options).eval()
    expected = model.head(dense(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state.mean(1))
    for domains in (torch.zeros(6).long(), torch.tensor([0, 1, 2, 2, 1, 0])):
        torch.testing.assert_close(model(ids, domains), expected, atol=1e-6, rtol=1e-5)
    table = model.encoder.get_input_embeddings().weight
    assert torch.equal(table[256:], table[:1].expand(3, -1))


def test_a_widened_mlp_is_the_old_one_at_the_start():
    dense, ids, domains = tiny_bert(), texts(), torch.tensor([0, 1, 0, 1, 1, 1])
    plain, wide = (ContrastiveMoE(dense, 2, glu=glu).eval() for glu in (False, True))
    torch.testing.assert_close(wide(ids, domains), plain(ids, domains), atol=1e-6, rtol=1e-5)
    assert wide.total_parameters > plain.total_parameters


def test_a_mixed_batch_is_the_domains_one_by_one():
    model = distinct(ContrastiveMoE(tiny_bert(), 3)).eval()
    ids, domains = texts(), torch.tensor([2, 0, 1, 0, 2, 2])
    together = model(ids, domains)
    for e in range(3):
        alone = model(ids[domains == e], domains[domains == e])
        torch.testing.assert_close(together[domains == e], alone, atol=1e-6, rtol=1e-5)
    assert (model(ids, (domains + 1) % 3) - together).abs().min(1).values.max() > 1e-4
    assert model(ids[:0], domains[:0]).shape == (0, 32)


def test_the_domain_may_stand_in_the_text():
    model, ids = distinct(ContrastiveMoE(tiny_bert(), 3)).eval(), texts(3)
    domains = torch.tensor([1, 2, 0])
    marked = ids.clone()
    marked[:, 0] = model.first_domain_id + domains
    assert torch.equal(model(marked), model(ids, domains))


def test_padding_does_not_count():
    model, ids, domains = ContrastiveMoE(tiny_bert(), 2).eval(), texts(2, 5), torch.tensor([0, 1])
    longer = torch.cat([ids, texts(2, 4, seed=3)], 1)
    mask = (torch.arange(9) < 5).long().expand(2, -1)
    torch.testing.assert_close(model(longer, domains, attention_mask=mask), model(ids, domains), atol=1e-5, rtol=1e-5)


def test_gradients_stay_in_the_domain():
    model, ids = ContrastiveMoE(tiny_bert(), 3), texts()
    model(ids, torch.zeros(6).long()).square().sum().backward()
    for name, p in model.encoder.named_parameters():
        used = p.grad is not None and p.grad.abs().sum() > 0
        if ".experts." in name:
            assert used == (".experts.0." in name), name
        if "attention" in name and "weight" in name:
            assert used, name


def test_parameters_are_counted():
    dense = tiny_bert()
    size, mlp = sum(p.numel() for p in dense.parameters()), 32 * 64 * 2 + 64 + 32
    for which, layers in (("all", 2), ("middle", 1), ("none", 0)):
        model = ContrastiveMoE(dense, 4, which=which)
        assert model.active_parameters == size
        assert model.total_parameters == size + 3 * mlp * layers
    assert ContrastiveMoE(dense, 4, which="middle").layers == [1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    model = ContrastiveMoE(copy.deepcopy(tiny_bert()).to(dtype), 2)
    u = model(texts(), torch.tensor([0, 1, 0, 1, 0, 1]))
    assert u.dtype == dtype
    assert mnr_loss(u, u).dtype == torch.float32


def test_bad_input():
    model = ContrastiveMoE(tiny_bert(), 3)
    with pytest.raises(ValueError, match=r"each of 6 texts needs a domain in \[0, 2\]"):
        model(texts(), torch.full((6,), 3))
    with pytest.raises(ValueError, match="begin the text with the token 256"):
        model(texts())
    with pytest.raises(ValueError, match=r"token ids must be in \[0, 258\], domain tokens included"):
        model(texts().where(torch.arange(9) != 4, 259), torch.zeros(6).long())
    with pytest.raises(ValueError, match=r"attention_mask must have the shape of the ids \[6, 9\], got \[6, 8\]"):
        model(texts(), torch.zeros(6).long(), attention_mask=torch.ones(6, 8))
    with pytest.raises(ValueError, match="call the ContrastiveMoE"):
        model.encoder(input_ids=texts())
    with pytest.raises(ValueError, match="LlamaForCausalLM is no BertModel"):
        ContrastiveMoE(tiny_llama(), 2)
    with pytest.raises(ValueError, match=r"layers must be in \[0, 1\], got 2"):
        ContrastiveMoE(tiny_bert(), 2, layers=[2])
    with pytest.raises(ValueError, match="cls_id"):
        ContrastiveMoE(tiny_bert(), 2, cls_id=256)
    with pytest.raises(ValueError, match="have a gate"):
        ContrastiveMoE(tiny_modernbert(), 2, glu=True)


@pytest.mark.parametrize("loss", [mnr_loss, mnr_plus_loss])
def test_two_orthogonal_pairs_by_hand(loss):
    eye = torch.eye(2)
    assert loss(eye, eye, scale=1.0).item() == pytest.approx(0.3133, abs=1e-4)
    assert loss(eye, eye, scale=1.0, normalize=False).item() == pytest.approx(0.3133, abs=1e-4)
    assert loss(eye.double(), eye.double()).item() < 1e-8
    assert loss(eye[:1], eye[:1]).item() == 0


def test_a_long_vector_steals_the_target():
    u = torch.tensor([[1.0, 0], [3, 0]])
    rows, _ = mnr_plus_targets(u, u, normalize=False)
    assert rows.tolist() == [1, 1]
    assert [t.tolist() for t in mnr_plus_targets(u, u)] == [[0, 1], [0, 1]]


@given(st.integers(1, 8), st.integers(0, 10_000))
@settings(deadline=None, max_examples=30)
def test_the_order_of_the_pairs_is_nothing(n, seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, n, 5, generator=generator)
    order = torch.randperm(n, generator=generator)
    for loss in (mnr_loss, mnr_plus_loss):
        torch.testing.assert_close(loss(a[order], b[order]), loss(a, b), atol=1e-5, rtol=1e-4)
    both = (mnr_loss(a, b) + mnr_loss(b, a)) / 2
    torch.testing.assert_close(mnr_plus_loss(a, b), both, atol=1e-5, rtol=1e-4)
