"""The digits: splits that do not overlap, labelings that mean what they say, views that can be undone."""

import pytest
import torch

from notebook_kit.data import VIEWS, digit_labelings, digit_views, digits


def test_splits_have_their_sizes_and_together_hold_every_image_once():
    parts = [digits(split) for split in ("train", "val", "test")]
    assert [len(x) for x, _ in parts] == [1000, 200, 597]
    everything = torch.cat([torch.cat([x, y[:, None]], 1) for x, y in parts])
    from sklearn.datasets import load_digits

    bunch = load_digits()
    source = torch.cat([torch.tensor(bunch.data / 16).float(), torch.tensor(bunch.target)[:, None]], 1)
    assert sorted(everything.tolist()) == sorted(source.tolist())


def test_splits_are_deterministic_and_follow_the_seed():
    assert torch.equal(digits("test")[0], digits("test")[0])
    assert not torch.equal(digits("test")[0], digits("test", seed=1)[0])


def test_a_caller_who_changes_the_pixels_changes_only_a_copy():
    digits("val")[0].zero_()
    assert digits("val")[0].sum() > 0


def test_pixels_are_in_the_unit_interval():
    x, y = digits("train")
    assert x.min() == 0
    assert x.max() == 1
    assert set(y.tolist()) == set(range(10))


def test_unknown_split_names_the_options():
    with pytest.raises(ValueError, match=r"'dev'.*train, val, test"):
        digits("dev")


def test_labelings_of_the_digit_itself():
    y = torch.arange(10)
    x = torch.zeros(10, 64)
    classes = {name: labeling(x, y).tolist() for name, labeling in digit_labelings().items()}
    assert classes["digit"] == list(range(10))
    assert classes["parity"] == [0, 1] * 5
    assert classes["at_least_five"] == [0] * 5 + [1] * 5
    assert classes["mod_three"] == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    assert [d for d in range(10) if classes["loop"][d]] == [0, 4, 6, 8, 9]
    assert [d for d in range(10) if classes["prime"][d]] == [2, 3, 5, 7]


def test_labelings_of_the_ink_look_at_pixels_only():
    labelings = digit_labelings()
    x = torch.zeros(2, 64)
    x[0, :32] = 1  # heavy at the top, and much ink
    x[1, 60] = 1
    y = torch.tensor([3, 3])
    assert labelings["top_heavy"](x, y).tolist() == [1, 0]
    assert labelings["ink"](x, y).tolist() == [1, 0]


def test_labelings_are_balanced_enough_to_learn_and_use_every_class():
    for split in ("train", "test"):
        x, y = digits(split)
        for name, labeling in digit_labelings().items():
            shares = labeling(x, y).bincount(minlength=labeling.n_classes) / len(y)
            assert len(shares) == labeling.n_classes, name
            assert shares.min() > 0.7 * 0.8 / labeling.n_classes, name


def test_views_keep_shape_range_and_input():
    x, _ = digits("val")
    before = x.clone()
    for name, view in digit_views(x).items():
        assert view.shape == x.shape, name
        assert view.min() >= 0, name
        assert view.max() <= 1, name
        assert name == "identity" or not torch.equal(view, x)
    assert torch.equal(x, before)


def test_views_that_can_be_undone_are_undone():
    x, _ = digits("val")
    assert torch.allclose(VIEWS["invert"](VIEWS["invert"](x)), x)
    assert torch.equal(VIEWS["hflip"](VIEWS["hflip"](x)), x)
    turned = x
    for _ in range(4):
        turned = VIEWS["rot90"](turned)
    assert torch.equal(turned, x)
    back = torch.roll(VIEWS["roll"](x).reshape(-1, 8, 8), (-2, -1), (1, 2)).reshape(-1, 64)
    assert torch.equal(back, x)


def test_views_move_one_pixel_where_they_say():
    x = torch.zeros(1, 8, 8)
    x[0, 1, 2] = 1
    place = {n: v.reshape(8, 8).nonzero().tolist() for n, v in digit_views(x.reshape(1, 64)).items()}
    assert place["hflip"] == [[1, 5]]
    assert place["roll"] == [[3, 3]]
    assert place["rot90"] == [[5, 1]]
