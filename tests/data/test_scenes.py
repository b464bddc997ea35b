"""Scenes: four things in four corners, and answers that fit them."""

import pytest
import torch

from notebook_kit.data.scenes import QUESTIONS, scenes


def test_shapes_ranges_and_seeds():
    one = scenes("train", 50)
    assert one.images.shape == (50, 3, 16, 16)
    assert one.answers.shape == (50, len(QUESTIONS))
    assert 0 <= one.images.min()
    assert one.images.max() <= 1
    for column, answers in zip(one.answers.T, QUESTIONS.values(), strict=True):
        assert set(column.tolist()) == set(range(len(answers)))
    assert torch.equal(scenes("train", 50).images, one.images)
    assert not torch.equal(scenes("train", 50, seed=1).images, one.images)
    assert scenes("test", 0).images.shape == (0, 3, 16, 16)


def test_the_tallest_bar_is_the_tallest_and_the_disc_has_its_colour():
    one = scenes("val", 80)
    bars = one.images[:, 0, :8, 8:].sum(1)[:, [0, 3, 6]]
    assert torch.equal(bars.argmax(1), one.answers[:, 1])
    assert (bars.topk(2).values.diff() < 0).all()
    assert torch.equal(one.images[:, :, 8:, 8:].sum((2, 3)).argmax(1), one.answers[:, 3])


def test_digits_are_the_splits():
    from notebook_kit.data import digits

    pixels, labels = digits("test")
    one = scenes("test", 20)
    for picture, label in zip(one.images[:, 0, :8, :8].flatten(1), one.answers[:, 0], strict=True):
        assert label in labels[(pixels == picture).all(1)]


def test_an_unknown_split():
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        scenes("dev", 1)
