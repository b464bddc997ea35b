"""Score and Bed: a float that remembers its tasks, and a score that refuses what does not fit."""

import copy
import pickle

import pytest
import torch

from notebook_kit import zoo
from notebook_kit.weights import IncompatibleWeights
from notebook_kit.zoo import Score


def test_score_is_the_mean_and_a_float():
    score = Score({"a": 0.5, "b": 1.0})
    assert score == 0.75
    assert repr(score) == "0.75"
    assert f"{score:.1f}" == "0.8"
    assert max(score, 0.2) is score
    assert score.tasks == {"a": 0.5, "b": 1.0}
    assert type(score + 1) is float
    with pytest.raises(ValueError, match=r"at least one task"):
        Score({})


@pytest.mark.parametrize("move", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_score_keeps_its_tasks_when_it_travels(move):
    moved = move(Score({"a": 0.5, "b": 1.0}))
    assert moved == 0.75
    assert moved.tasks == {"a": 0.5, "b": 1.0}


def test_a_bed_travels_to_another_process():
    bed = zoo.digit_labels()
    again = pickle.loads(pickle.dumps(bed))
    assert again.score(again.experts[0]).tasks == bed.score(bed.experts[0]).tasks


def test_a_model_and_its_weights_score_the_same_and_the_mode_is_kept():
    bed = zoo.digit_twins(32)
    model = copy.deepcopy(bed.model).train()
    model.load_state_dict(bed.experts[1])
    assert bed.score(model).tasks == bed.score(bed.experts[1]).tasks
    assert model.training


def test_scoring_modifies_nothing():
    bed = zoo.digit_labels()
    before = {key: tensor.clone() for key, tensor in bed.model.state_dict().items()}
    bed.score(bed.experts[3])
    assert all(torch.equal(before[key], tensor) for key, tensor in bed.model.state_dict().items())
    assert all(p.grad is None for p in bed.model.parameters())


def test_each_load_is_fresh():
    first, second = zoo.digit_views(), zoo.digit_views()
    first.base["layers.0.weight"].zero_()
    first.experts[0]["layers.0.weight"].zero_()
    first.batches("test")["identity"][0].zero_()
    with torch.no_grad():
        first.model.layers[0].weight.zero_()
    third = zoo.digit_views()
    for bed in (second, third):
        assert bed.base["layers.0.weight"].abs().sum() > 0
        assert bed.experts[0]["layers.0.weight"].abs().sum() > 0
        assert torch.equal(bed.model.layers[0].weight, bed.base["layers.0.weight"])
    assert third.score(third.base) == second.score(second.base)


def test_what_does_not_fit_is_refused_with_its_name():
    bed = zoo.digit_twins(64)
    with pytest.raises(IncompatibleWeights, match=r"layers\.0"):
        bed.score(zoo.digit_twins(32).base)
    with pytest.raises(ValueError, match=r"layers\.1\.bias"):
        bed.score(bed.base | {"layers.1.bias": torch.full((64,), float("nan"))})
    with pytest.raises(ValueError, match=r"'dev'.*train, val, test"):
        bed.score(bed.base, "dev")
    with pytest.raises(ValueError, match=r"width 48.*32, 64, 128"):
        zoo.digit_twins(48)
