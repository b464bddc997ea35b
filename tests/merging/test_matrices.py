"""What counts as a matrix, and the linear algebra that the methods in subspaces share, against torch's own SVD."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from notebook_kit.merging.matrices import each_matrix, matrix_names, polar, thin_svd
from notebook_kit.models import tiny


# ---------------------------------------------------------------- which tensors
def test_vectors_convolutions_and_integers_are_no_matrices():
    base = {
        "w": torch.randn(3, 4),
        "b": torch.randn(3),
        "s": torch.tensor(1.0),
        "i": torch.ones(3, 4, dtype=torch.long),
    }
    base |= {"conv": torch.randn(3, 4, 2), "conv2": torch.randn(3, 4, 2, 2), "empty": torch.zeros(0, 4)}
    base |= {"mlp.experts.gate_up_proj": torch.randn(2, 6, 4)}
    assert matrix_names(base, "all") == {"w", "mlp.experts.gate_up_proj"}


@pytest.mark.parametrize(
    ("build", "lookups"),
    [
        (tiny.tiny_llama, {"model.embed_tokens.weight"}),
        (tiny.tiny_gpt2, {"transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"}),
        (tiny.tiny_bert, {f"embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")}),
        (tiny.tiny_mixtral, {"model.embed_tokens.weight"}),
        (tiny.tiny_vit, set()),
    ],
)
def test_embeddings_of_real_models_are_told_by_name(build, lookups):
    base = build().state_dict()
    assert matrix_names(base, "all") - matrix_names(base, "linear") == lookups


def test_a_tied_head_goes_with_its_embedding_and_t5s_position_bias_is_a_lookup():
    base = tiny.tiny_t5().state_dict()
    left_out = matrix_names(base, "all") - matrix_names(base, "linear")
    assert {"shared.weight", "encoder.embed_tokens.weight", "lm_head.weight"} <= left_out
    assert any("relative_attention_bias" in name for name in left_out)
    assert not any(".q." in name or ".wi" in name for name in left_out)
    assert "mlp.shared_experts.up.weight" in matrix_names({"mlp.shared_experts.up.weight": torch.ones(2, 2)}, "linear")


def test_fused_experts_are_a_batch():
    experts = torch.randn(3, 4, 5)
    doubled = each_matrix(lambda a, b: a + b, experts, experts)
    assert torch.equal(doubled, 2 * experts)
    assert torch.equal(each_matrix(lambda a: a.flip(0), experts), experts.flip(1))


# ---------------------------------------------------------------- linear algebra
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 10**6), st.sampled_from([torch.float32, torch.float64]))
@settings(deadline=None, max_examples=40)
def test_thin_svd_is_torchs(m, n, seed, dtype):
    a = torch.randn(m, n, generator=torch.Generator().manual_seed(seed)).to(dtype)
    u, s, vh = thin_svd(a)
    torch.testing.assert_close((u * s) @ vh, a, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(s, torch.linalg.svdvals(a), rtol=1e-4, atol=1e-5)
    k = max(1, min(m, n) // 2)
    u_k, s_k, vh_k = thin_svd(a, k)
    assert (u_k.shape, s_k.shape, vh_k.shape) == ((m, k), (k,), (k, n))
    torch.testing.assert_close(s_k, s[:k], rtol=1e-4, atol=1e-5)
    if k == min(m, n) or s[k - 1] > 1.05 * s[k]:  # else it is rounding that says where to cut
        torch.testing.assert_close((u_k * s_k) @ vh_k, (u[:, :k] * s[:k]) @ vh[:k], rtol=1e-3, atol=1e-4)


def test_the_gram_route_is_as_exact_as_an_svd_in_float32():
    g = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(40, 40, generator=g, dtype=torch.float64))
    p, _ = torch.linalg.qr(torch.randn(90, 40, generator=g, dtype=torch.float64))
    sigma = torch.logspace(0, -4, 40, dtype=torch.float64)
    a = ((q * sigma) @ p.T).float()
    u, s, vh = thin_svd(a)
    assert float((s - sigma).abs().max()) < 1e-6
    exact = torch.linalg.svd(a.double(), full_matrices=False)
    signs = (u.double() * exact.U).sum(0).sign()
    torch.testing.assert_close(u.double() * signs, exact.U, rtol=0, atol=1e-5)
    torch.testing.assert_close(vh @ vh.T, torch.eye(40), rtol=0, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_directions_that_are_not_there_are_zero(dtype, shape):
    g = torch.Generator().manual_seed(1)
    a = torch.randn(shape[0], 2, generator=g).to(dtype) @ torch.randn(2, shape[1], generator=g).to(dtype)
    u, s, vh = thin_svd(a)
    assert int((s > 0).sum()) == 2
    assert torch.equal(s[2:], torch.zeros(4, dtype=dtype))
    larger = vh if shape[0] < shape[1] else u.T
    assert not larger[2:].any()
    nearest, _ = polar(a)
    assert torch.linalg.matrix_rank(nearest, rtol=1e-3) == 2
    for zero in (thin_svd(torch.zeros(shape, dtype=dtype))[1], polar(torch.zeros(shape, dtype=dtype))[0]):
        assert not zero.any()


@given(st.integers(1, 10), st.integers(1, 10), st.integers(0, 10**6))
@settings(deadline=None, max_examples=40)
def test_polar_is_the_nearest_orthonormal_matrix(m, n, seed):
    a = torch.randn(m, n, generator=torch.Generator().manual_seed(seed))
    nearest, values = polar(a)
    u, s, vh = torch.linalg.svd(a, full_matrices=False)
    if float(s[-1]) > 1e-3 * float(s[0]):
        torch.testing.assert_close(nearest, u @ vh, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(values.flip(0), s, rtol=1e-3, atol=1e-4)
