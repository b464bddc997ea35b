import numpy as np
import pytest
import torch

from notebook_kit.diagnostics.incremental import (
    StreamRecord,
    accuracy_curve,
    accuracy_matrix,
    confusion_matrix,
    forgetting,
    incremental_view,
    paths_frame,
    record_stream,
    retrieval_matrix,
)
from tests.expert_merging.test_model_surgery import TASKS, learner


def planted() -> StreamRecord:
    """Two tasks, classes 7 and 9; four images, two of each. After task 1 one of the sevens is taken for a nine."""
    labels = torch.tensor([7, 7, 9, 9])
    first = torch.ones(1, 4, 1)
    says = torch.tensor([[5.0, 0.0], [0.0, 5.0], [0.0, 5.0], [0.0, 5.0]])
    near = torch.tensor([[0.9, 0.0], [0.9, 0.0], [0.0, 0.9], [0.9, 0.0]])
    return StreamRecord((7, 9), (0, 1), labels, [first, torch.stack([says, says])], [torch.ones(4, 1), near])


def test_accuracies_of_a_planted_stream():
    record = planted()
    assert accuracy_curve(record, ensemble=False).tolist() == [1.0, 0.75]
    matrix = accuracy_matrix(record, ensemble=False)
    np.testing.assert_array_equal(matrix, [[1.0, np.nan], [0.5, 1.0]])
    assert forgetting(matrix) == 0.5
    assert accuracy_curve(record, use="prototypes").tolist() == [1.0, 0.75]
    assert accuracy_curve(record, use="last adapter").tolist() == [1.0, 0.75]
    assert forgetting(matrix[:1, :1]) == 0


def test_who_asks_whom():
    record = planted()
    np.testing.assert_array_equal(retrieval_matrix(record, rounds=1), [[1, 0], [0.5, 0.5]])
    np.testing.assert_array_equal(retrieval_matrix(record), [[0.5, 0.5], [0, 1]])
    np.testing.assert_array_equal(retrieval_matrix(record, after=0), [[1.0]])
    np.testing.assert_array_equal(confusion_matrix(record, after=1, ensemble=False), [[0.5, 0.5], [0, 1]])


def test_paths_are_told_in_words():
    frame = paths_frame(planted())
    assert frame["path"].tolist() == ["0", "0 → 1", "1", "0 → 1"]
    assert frame["task"].tolist() == [0, 0, 1, 1]
    assert frame["label"].tolist() == [7, 7, 9, 9]


def test_a_recorded_stream_answers_as_the_learner_does():
    tasks = TASKS[:3]
    surgery = learner(alignment_epochs=10)
    record = record_stream(surgery, tasks, tasks)
    x = torch.cat([images for images, _ in tasks])
    for how in ({}, {"rounds": 1}, {"ensemble": False}):
        predicted, rows = record.predictions(2, **how)
        assert torch.equal(predicted, surgery.predict(x, **how))
        assert torch.equal(rows, torch.arange(len(x)))
    assert len(record.predictions(0)[0]) == len(tasks[0][0])
    assert accuracy_curve(record)[0] == pytest.approx(accuracy_matrix(record)[0, 0])
    right, _ = record.predictions(2, use="right adapter")
    own = surgery.logits(tasks[1][0])[0][1].argmax(1)
    assert torch.equal(right[24:48], torch.tensor(surgery.classes)[own])


@pytest.mark.parametrize("show", ["classes", "adapters", "tasks"])
def test_one_look(show):
    view = incremental_view({0.1: planted()}, {"other": np.ones(2)}, tasks_seen=2, show=show, ensemble=False)
    assert view.curve.tolist() == [1.0, 0.75]
    assert view.matrix.shape == (2, 2)
    assert view.names == (("7", "9") if show == "classes" else ("0", "1"))


def test_bad_input():
    record = planted()
    with pytest.raises(ValueError, match=r"no record with adapter_momentum=0\.1, only 0\.5"):
        incremental_view({0.5: record}, tasks_seen=1)
    with pytest.raises(ValueError, match=r"tasks_seen must be in \[1, 2\], got 3"):
        incremental_view({0.1: record}, tasks_seen=3)
    with pytest.raises(ValueError, match=r"after must be in \[0, 1\], got 2"):
        record.retrieve(2)
    with pytest.raises(ValueError, match="use must be one of retrieval"):
        record.predictions(1, use="luck")
    with pytest.raises(ValueError, match="fresh learner"):
        record_stream(learner(1), TASKS[1:2], TASKS[1:2])
    with pytest.raises(ValueError, match="fresh learner and at least one task"):
        record_stream(learner(), [], TASKS[:1])
    with pytest.raises(ValueError, match=r"test images must be of the classes taught, \[0, 1\], got \[2, 3\]"):
        record_stream(learner(), TASKS[:1], TASKS[1:2])
