import pytest
import torch

from notebook_kit.data import class_increments, digits


@pytest.mark.parametrize("n_tasks", [1, 2, 5, 10])
@pytest.mark.parametrize("seed", [None, 3])
def test_tasks_share_no_class_and_lose_no_image(n_tasks, seed):
    tasks = class_increments("train", n_tasks=n_tasks, seed=seed)
    classes = [set(y.tolist()) for _, y in tasks]
    assert [len(c) for c in classes] == [10 // n_tasks] * n_tasks
    assert set.union(*classes) == set(range(10))
    x, y = digits("train")
    assert sum(len(images) for images, _ in tasks) == len(x)
    assert tasks[0][0].shape[1:] == (1, 8, 8)
    first = torch.isin(y, torch.tensor(sorted(classes[0])))
    assert torch.equal(tasks[0][0].flatten(1), x[first])


def test_classes_arrive_in_order_unless_a_seed_is_given_and_alike_in_all_splits():
    assert [sorted(set(y.tolist())) for _, y in class_increments("val")][:2] == [[0, 1], [2, 3]]
    orders = [[set(y.tolist()) for _, y in class_increments(split, seed=1)] for split in ("train", "test")]
    assert orders[0] == orders[1] != [set(y.tolist()) for _, y in class_increments("train")]


def test_bad_input():
    with pytest.raises(ValueError, match=r"n_tasks must be 1, 2, 5 or 10, .* got 3"):
        class_increments("train", n_tasks=3)
    with pytest.raises(ValueError, match="unknown split"):
        class_increments("all")
