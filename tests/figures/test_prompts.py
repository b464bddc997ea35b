"""Every prompt is drawn once, under either label."""

import numpy as np
import pytest

from notebook_kit.figures.prompts import prompt_view


@pytest.mark.parametrize("label", ["category", "best expert"])
def test_every_prompt_once_and_in_its_colour(label):
    points = np.random.default_rng(0).random((12, 2))
    labels = {"category": ["b", "a"] * 6, "best expert": [str(i % 4) for i in range(12)]}
    picture = prompt_view(points, labels, {"category": 0.9, "best expert": 0.4}, label=label)
    assert [trace.name for trace in picture.data] == (["a", "b"] if label == "category" else ["0", "1", "2", "3"])
    drawn = np.concatenate([np.stack([trace.x, trace.y], 1) for trace in picture.data])
    assert sorted(map(tuple, drawn)) == sorted(map(tuple, points))
    assert picture.layout.title.text.endswith("in 90% of cases" if label == "category" else "in 40% of cases")
    assert len({trace.marker.color for trace in picture.data}) == len(picture.data)
    with pytest.raises(KeyError):
        prompt_view(points, {"category": labels["category"]}, {"category": 1.0}, label="best expert")
