"""The checkpoint recorder and the plain averages of checkpoints."""

import pytest
import torch
from torch import nn

from notebook_kit.adapters import LoRA, adapter_weights, attach
from notebook_kit.merging import CheckpointRecorder, average_checkpoints
from notebook_kit.training import fit

BASE = {"w": torch.zeros(3)}
RUN = [{"w": torch.full((3,), value)} for value in (1.0, 2.0, 4.0, 8.0)]


def squared(model, batch):
    return (model(batch) ** 2).mean()


def draw(generator):
    return torch.randn(4, 3, generator=generator)


def test_it_stores_what_the_model_was_and_the_mean_loss_since():
    model = nn.Linear(3, 2)
    recorder = CheckpointRecorder(squared)
    history = fit(model, draw, recorder.loss, steps=7, progress=False, evaluate=recorder.evaluate, evaluate_every=3)
    assert recorder.steps == [3, 6, 7]
    means = [history["loss"][a:b].mean() for a, b in ((0, 3), (3, 6), (6, 7))]
    assert recorder.losses == pytest.approx(means)
    assert history["window_loss"].dropna().tolist() == pytest.approx(means)
    assert all(torch.equal(tensor, recorder.checkpoints[-1][key]) for key, tensor in model.state_dict().items())
    assert not torch.equal(recorder.checkpoints[0]["weight"], recorder.checkpoints[1]["weight"])


def test_a_window_and_another_training_loop():
    model = nn.Linear(1, 1)
    recorder = CheckpointRecorder(window=2)
    for value in (4.0, 2.0, torch.tensor(1.0, requires_grad=True)):
        recorder.saw(value)
    assert recorder.store(model) == 1.5
    recorder.saw(5.0)
    assert recorder.store(model) == 3.0
    assert recorder.steps == [3, 4]
    with torch.no_grad():
        model.weight.zero_()
    assert recorder.checkpoints[0]["weight"] != 0  # a copy, not the parameter


def test_adapters_alone_can_be_kept():
    model = nn.Sequential(nn.Linear(3, 3))
    attach(model, LoRA, targets="0", rank=2)
    recorder = CheckpointRecorder(squared, weights=adapter_weights)
    fit(model, draw, recorder.loss, steps=2, progress=False, evaluate=recorder.evaluate, evaluate_every=1)
    assert [set(checkpoint) for checkpoint in recorder.checkpoints] == [{"0.A", "0.B"}] * 2


def test_misuse_of_the_recorder():
    with pytest.raises(ValueError, match="window must be at least 1 batch, got 0"):
        CheckpointRecorder(window=0)
    recorder = CheckpointRecorder()
    with pytest.raises(ValueError, match="made without a loss: call `saw`"):
        recorder.loss(nn.Linear(1, 1), None)
    with pytest.raises(ValueError, match="no batch was seen since the last checkpoint, at step 0"):
        recorder.store(nn.Linear(1, 1))
    recorder.saw(1.0)
    recorder.store(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="at step 1"):
        recorder.store(nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 3.75),
        ({"n_last": 2}, 6.0),
        ({"n_last": 2, "stride": 2}, 5.0),
        ({"rule": "last"}, 8.0),
        ({"rule": "best", "metrics": [0.3, 0.1, 0.2, 0.4]}, 2.0),
        ({"rule": "best", "metrics": [0.3, 0.1, 0.2, 0.4], "n_last": 2}, 4.0),
        # 1 -> 1.5 -> 2.75 -> 5.375
        ({"rule": "ema", "decay": 0.5}, 5.375),
        ({"rule": "ema", "decay": 0.0}, 8.0),
        ({"rule": "ema", "decay": 0.5, "n_last": 1}, 8.0),
    ],
)
def test_the_plain_rules_by_hand(settings, expected):
    assert average_checkpoints(BASE, RUN, **settings)["w"].tolist() == pytest.approx([expected] * 3)


def test_best_needs_losses():
    with pytest.raises(ValueError, match="needs one loss per checkpoint in metrics, 4, got none"):
        average_checkpoints(BASE, RUN, rule="best")
    with pytest.raises(ValueError, match="4, got 2"):
        average_checkpoints(BASE, RUN, rule="best", metrics=[1, 2])
