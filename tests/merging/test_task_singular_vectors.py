"""TSV-Merge: the card's numbers, orthogonal tasks, copies, and more experts than directions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from notebook_kit.merging import average, task_singular_vectors


def star(*taus, **options):
    """The merged task vector of one matrix, from a base of zeros."""
    base = {"w": torch.zeros(taus[0].shape)}
    return task_singular_vectors(base, [{"w": tau} for tau in taus], **options)["w"]


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_orthogonal_tasks_give_their_exact_sum():
    merged = star(torch.diag(torch.tensor([3.0, 0.0])), torch.diag(torch.tensor([0.0, 2.0])))
    torch.testing.assert_close(merged, torch.diag(torch.tensor([3.0, 2.0])))


def test_by_hand():
    # u_1 = e_1, u_2 = (e_1 + e_2) / √2: turned apart symmetrically, by 22.5° each; v_1 = e_1, v_2 = e_2 stay
    tilted = torch.tensor([[0.0, 2.0], [0.0, 2.0]]) / 2**0.5
    angle = torch.tensor(torch.pi / 8)
    one, two = torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])
    torch.testing.assert_close(star(torch.diag(torch.tensor([1.0, 0.0])), tilted), torch.stack([one, 2 * two], 1))


def test_tasks_that_share_a_direction_exactly_stay_in_it():
    one, two = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), 2**0.5 * torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    merged = star(one, two)
    assert not merged[1].any()  # neither task writes to the second output
    assert merged[0].norm().item() == pytest.approx(2.5**0.5, rel=1e-4)


@given(st.integers(1, 4), st.integers(0, 10**6), st.sampled_from([(8, 8), (8, 13), (13, 8)]))
@settings(deadline=None, max_examples=30)
def test_singular_values_are_the_kept_ones(count, seed, shape):
    taus = [random(seed + i, *shape) for i in range(count)]
    k = 8 // count
    kept = torch.cat([torch.linalg.svdvals(tau)[:k] for tau in taus]).sort(descending=True).values
    values = torch.linalg.svdvals(star(*taus))
    torch.testing.assert_close(values[: len(kept)], kept, rtol=1e-3, atol=1e-4)
    assert not (values[len(kept) :] > 1e-4).any()


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)])
def test_one_task_is_itself_and_copies_are_their_leading_part(shape):
    tau = random(0, *shape)
    torch.testing.assert_close(star(tau), tau, rtol=1e-4, atol=1e-5)
    u, s, vh = torch.linalg.svd(tau, full_matrices=False)
    k = min(shape) // 2
    torch.testing.assert_close(star(tau, tau), (u[:, :k] * s[:k]) @ vh[:k], rtol=1e-3, atol=1e-4)


def test_scale_rank_fraction_and_weights():
    taus = [random(i, 8, 8) for i in range(2)]
    torch.testing.assert_close(star(*taus, scale=0.5), 0.5 * star(*taus))
    torch.testing.assert_close(star(*taus, rank_fraction=0.5), star(*taus))
    assert torch.linalg.matrix_rank(star(*taus, rank_fraction=0.25), rtol=1e-3) == 4
    assert torch.linalg.matrix_rank(star(*taus, rank_fraction=1.0), rtol=1e-3) == 8  # more than fit: on their range
    torch.testing.assert_close(star(*taus, weights=[2.0, 2.0]), 2 * star(*taus))
    torch.testing.assert_close(star(*taus, weights=[1.0, 0.0], rank_fraction=1.0), taus[0], rtol=1e-3, atol=1e-4)


def test_more_experts_than_directions_give_the_mean():
    base = {"w": random(9, 3, 5), "b": random(8, 3)}
    experts = [{"w": random(i, 3, 5), "b": random(i, 3)} for i in range(4)]
    merged, mean = task_singular_vectors(base, experts), average(base, experts)
    for name in base:
        torch.testing.assert_close(merged[name], mean[name])
    torch.testing.assert_close(star(*(random(i, 3, 5) for i in range(3)), rank_fraction=0.0),
                               torch.stack([random(i, 3, 5) for i in range(3)]).mean(0))  # fmt: skip


def test_embeddings_are_matrices_for_the_paper_and_rows_for_linear():
    base = {"embed_tokens.weight": random(0, 8, 8)}
    experts = [{"embed_tokens.weight": random(i, 8, 8)} for i in (1, 2)]
    mean = average(base, experts)["embed_tokens.weight"]
    torch.testing.assert_close(task_singular_vectors(base, experts, matrices="linear")["embed_tokens.weight"], mean)
    assert not torch.allclose(task_singular_vectors(base, experts)["embed_tokens.weight"], mean, atol=0.1)


def test_fused_experts_are_merged_one_by_one():
    taus = [random(i, 3, 6, 5) for i in range(2)]
    merged = task_singular_vectors({"experts.w": torch.zeros(3, 6, 5)}, [{"experts.w": tau} for tau in taus])
    for e in range(3):
        torch.testing.assert_close(merged["experts.w"][e], star(taus[0][e], taus[1][e]))
