"""Courses of training beside each other."""

import pandas as pd
import pytest

from notebook_kit.figures.lora_courses import course_figure


def table(**more):
    return pd.DataFrame({"step": [0, 10, 20], "old": [0.9, 0.8, 0.7], "new": [0.5, 0.7, 0.8], **more})


def test_two_lines_a_way_and_the_shares_of_one():
    shares = {"known": [0.5, 0.4, 0.3], "fresh": [0.5, 0.6, 0.7]}
    picture = course_figure({"LoRA": table(), "localised": table(**shares)}, run="localised", title="t")
    assert len(picture.data) == 2 * 2 + 2
    assert [trace.name for trace in picture.data if trace.yaxis == "y3"] == ["knowledge (type 1)", "new tasks (type 0)"]
    assert list(picture.data[-1].y) == shares["fresh"]
    assert all(axis.title.text for axis in (picture.layout.xaxis, picture.layout.xaxis2, picture.layout.xaxis3))
    assert picture.layout.yaxis3.title.text == "share of group 1 (localised)"


@pytest.mark.parametrize("run", ["LoRA", "elsewhere"])
def test_a_run_without_shares_is_refused(run):
    with pytest.raises(ValueError, match=f"columns known and fresh, got '{run}' of LoRA"):
        course_figure({"LoRA": table()}, run=run)
