"""Self-refined retrieval on logits alone, and the Gaussians that classes leave behind."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from notebook_kit.expert_merging import ClassGaussian, align_head, fit_gaussian, refine_retrieval
from tests.untyped import untyped


@st.composite
def streams(draw):
    tasks = torch.arange(draw(st.integers(1, 4))).repeat_interleave(draw(st.integers(1, 3)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    n = draw(st.integers(1, 6))
    adapted = 3 * torch.randn(int(tasks[-1]) + 1, n, len(tasks), generator=generator)
    return adapted, 2 * torch.rand(n, len(tasks), generator=generator) - 1, tasks


def one_by_one(adapted, prototypes, tasks, rounds):
    """The method as a sentence: an image at a time."""
    path = [int(tasks[prototypes.argmax()])]
    while True:
        logits = adapted[path[-1]]
        path.append(int(tasks[logits.argmax()]))
        if path[-1] == path[-2] or len(path) == rounds + 1:
            return path, logits


@given(streams(), st.integers(1, 6), st.booleans())
@settings(deadline=None, max_examples=40)
def test_all_images_at_once_are_each_image_alone(stream, rounds, ensemble):
    adapted, prototypes, tasks = stream
    found = refine_retrieval(adapted, prototypes, tasks, rounds=rounds, ensemble=ensemble)
    for i in range(len(prototypes)):
        path, logits = one_by_one(adapted[:, i], prototypes[i], tasks, rounds)
        assert found.path[i].tolist() == path + [path[-1]] * (rounds + 1 - len(path))
        assert int(found.used[i]) == len(path) - 1 <= rounds
        assert int(found.adapter[i]) == path[-2]
        output = logits.softmax(0)
        if ensemble:
            output = output + (len(adapted) * prototypes[i]).softmax(0)
        torch.testing.assert_close(found.output[i], output)


@given(streams())
@settings(deadline=None, max_examples=20)
def test_one_round_is_the_prototypes_choice(stream):
    found = refine_retrieval(*stream, rounds=1)
    assert torch.equal(found.adapter, stream[2][stream[1].argmax(1)])
    assert (found.used == 1).all()


@given(st.integers(1, 8), st.integers(0, 1000))
@settings(deadline=None, max_examples=20)
def test_one_task_has_one_adapter(rounds, seed):
    generator = torch.Generator().manual_seed(seed)
    adapted = torch.randn(1, 4, 3, generator=generator)
    tasks = torch.zeros(3, dtype=torch.long)
    found = refine_retrieval(adapted, torch.rand(4, 3, generator=generator), tasks, rounds=rounds)
    assert (found.path == 0).all()
    assert (found.used == 1).all()


def test_a_right_guess_confirms_itself_and_stops():
    adapted = torch.tensor([[[0.0, 5.0]], [[0.0, 5.0]]])
    found = refine_retrieval(adapted, torch.tensor([[0.0, 1.0]]), torch.tensor([0, 1]))
    assert found.path[0].tolist() == [1, 1, 1, 1, 1]
    assert found.used.tolist() == [1]


def test_a_wrong_guess_is_mended_by_hand():
    # Prototypes say class 2 (task 1); adapter 1 sees class 0 (task 0); adapter 0 sees class 1 (task 0): settled.
    adapted = torch.tensor([[[1.0, 2.0, 0.0]], [[3.0, 0.0, 1.0]]])
    tasks = torch.tensor([0, 0, 1])
    found = refine_retrieval(adapted, torch.tensor([[0.1, 0.0, 0.3]]), tasks)
    assert found.path[0].tolist() == [1, 0, 0, 0, 0]
    assert (found.used.tolist(), found.adapter.tolist(), found.column.tolist()) == ([2], [0], [1])


def test_two_adapters_may_disagree_for_ever_and_the_last_logits_count():
    adapted = torch.tensor([[[0.0, 1.0]], [[2.0, 0.0]]])
    for rounds, path, adapter, column in ((3, [0, 1, 0, 1], 0, 1), (4, [0, 1, 0, 1, 0], 1, 0)):
        found = refine_retrieval(
            adapted, torch.tensor([[1.0, 0.0]]), torch.tensor([0, 1]), rounds=rounds, ensemble=False
        )
        assert found.path[0].tolist() == path
        assert (found.adapter.item(), found.column.item()) == (adapter, column)


def test_the_output_by_hand():
    adapted = torch.tensor([[[math.log(3), 0.0]]] * 2)
    zero = torch.zeros(1, 2)
    with_both = refine_retrieval(adapted, zero, torch.tensor([0, 1]))
    torch.testing.assert_close(with_both.output, torch.tensor([[0.75 + 0.5, 0.25 + 0.5]]))
    alone = refine_retrieval(adapted, zero, torch.tensor([0, 1]), ensemble=False)
    torch.testing.assert_close(alone.output, torch.tensor([[0.75, 0.25]]))


def test_prototypes_sharpen_as_tasks_grow():
    cosines = torch.tensor([[0.5, 0.1]])
    shares = []
    for n_tasks in (1, 2, 5):
        found = refine_retrieval(torch.zeros(n_tasks, 1, 2), cosines, torch.tensor([0, 0]))
        shares.append(found.output[0, 0].item() - 0.5)
    expected = [1 / (1 + math.exp(-0.4 * n_tasks)) for n_tasks in (1, 2, 5)]
    assert shares == pytest.approx(expected)


@pytest.mark.parametrize(
    ("adapted", "prototypes", "tasks", "text"),
    [
        (torch.zeros(2, 3, 4), torch.zeros(3, 5), torch.tensor([0, 0, 1, 1]), r"prototypes must be \[3, 4\]"),
        (
            torch.zeros(2, 3, 2),
            torch.zeros(3, 2),
            torch.tensor([0, 2]),
            r"tasks must name adapters 0 to 1, got \[0, 2\]",
        ),
        (torch.zeros(1, 3, 2), torch.zeros(3, 2), torch.tensor([-1, 0]), "tasks must name adapters 0 to 0"),
        (torch.full((1, 3, 2), float("nan")), torch.zeros(3, 2), torch.tensor([0, 0]), "logits must be finite"),
    ],
)
def test_logits_that_do_not_fit_are_refused(adapted, prototypes, tasks, text):
    with untyped(), pytest.raises(ValueError, match=text):
        refine_retrieval(adapted, prototypes, tasks)


def test_rounds_are_checked():
    with pytest.raises(ValueError, match=r"rounds must be in \[1, 64\], got 0 \(refine_retrieval\)"):
        refine_retrieval(torch.zeros(1, 1, 1), torch.zeros(1, 1), torch.tensor([0]), rounds=0)


# ---------------------------------------------------------------- Gaussians
def test_draws_have_the_mean_and_covariance_of_the_class():
    mix = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.5, 0.0], [-0.3, 0.2, 0.4]])
    features = torch.randn(400, 3) @ mix.T + torch.tensor([1.0, -2.0, 0.5])
    n = 20_000
    drawn = fit_gaussian(features).sample(n, torch.Generator().manual_seed(0))
    covariance = torch.cov(features.T) + 1e-4 * torch.eye(3)
    deviation = covariance.diagonal().sqrt()
    assert ((drawn.mean(0) - features.mean(0)).abs() < 3 * deviation / n**0.5).all()
    # The standard error of entry ij of a Gaussian's covariance is sqrt((s_ii s_jj + s_ij^2) / n).
    error = ((deviation[:, None] * deviation).square() + covariance.square()).sqrt() / n**0.5
    assert ((torch.cov(drawn.T) - covariance).abs() < 3 * error).all()


def test_variance_forgets_how_features_go_together():
    features = torch.randn(200, 1).repeat(1, 2) + 0.1 * torch.randn(200, 2)
    whole, only = fit_gaussian(features), fit_gaussian(features, "variance")
    assert whole.factor[0, 1, 0] > 0.5
    assert only.factor[0, 1, 0] == 0
    torch.testing.assert_close((whole.factor[0] @ whole.factor[0].T).diagonal(), only.factor[0].diagonal().square())


def test_centroids_find_two_clouds():
    features = torch.cat([torch.randn(30, 2) + 20, torch.randn(10, 2) - 20])
    found = fit_gaussian(features, "centroids", n_centroids=2)
    assert sorted(found.share.tolist()) == [0.25, 0.75]
    torch.testing.assert_close(found.centre, features.mean(0))
    assert (found.sample(200, torch.Generator().manual_seed(0)).abs() > 10).all()


def test_few_images_give_few_centroids():
    assert fit_gaussian(torch.randn(5, 3), "centroids").share.sum() == pytest.approx(1)
    assert len(fit_gaussian(torch.randn(5, 3), "centroids").share) <= 2


def test_fewer_images_than_dimensions_are_enough():
    assert torch.isfinite(fit_gaussian(torch.randn(2, 16)).sample(5, torch.Generator().manual_seed(0))).all()


def test_a_head_is_aligned_to_what_classes_left():
    clouds = [fit_gaussian(torch.randn(50, 4) + 4 * torch.eye(4)[c]) for c in range(3)]
    weight, bias = torch.zeros(3, 4), torch.zeros(3)
    new = align_head(weight, bias, clouds, epochs=20, draws=60, generator=torch.Generator().manual_seed(0))
    drawn = torch.cat([cloud.sample(100, torch.Generator().manual_seed(1)) for cloud in clouds])
    right = (drawn @ new[0].T + new[1]).argmax(1) == torch.arange(3).repeat_interleave(100)
    assert right.float().mean() > 0.9
    assert not weight.any()
    assert not bias.any()


def test_no_epochs_leave_the_head_alone():
    weight, bias = torch.randn(1, 2), torch.randn(1)
    gaussian = ClassGaussian(torch.ones(1), torch.zeros(1, 2), torch.eye(2)[None])
    same = align_head(weight, bias, [gaussian], epochs=0, draws=4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(same[0], weight)
    assert torch.equal(same[1], bias)


def test_gaussians_refuse_bad_input():
    with pytest.raises(ValueError, match="at least 2 images"):
        fit_gaussian(torch.randn(1, 3))
    with pytest.raises(ValueError, match="kind must be one of covariance, variance, centroids"):
        fit_gaussian(torch.randn(4, 3), "mean")
