"""Every control of every widget of every lesson is moved in a real kernel, where an exception is an error."""

import os

import jupytext
import pytest
from nbclient import NotebookClient

from tests.notebooks.test_lessons import LESSONS

# Appended to the lesson. Every explorer alive is driven through the ends of each range and through all options.
DRIVE = """
import gc
from notebook_kit.widgets import Explorer

explorers = [item for item in gc.get_objects() if issubclass(type(item), Explorer)]
assert explorers, "a lesson has at least one live widget"
for explorer in explorers:
    before = explorer.figure
    for name, row in explorer._schema.items():
        values = list(row.options) or [row.low, row.high]
        for value in values[:8]:
            explorer.settings = {name: value}
            assert not explorer.error, explorer.error
        explorer.settings = {name: row.default}
    explorer.pin()
    explorer.reset()
    assert explorer.value is not None
print(len(explorers), "explorers driven")
"""


@pytest.mark.parametrize("text", LESSONS, ids=lambda path: path.stem)
def test_widgets_of_a_lesson_survive_their_controls(text, monkeypatch):
    monkeypatch.setenv("NOTEBOOK_KIT_STRICT", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = jupytext.read(text)
    notebook.cells.append(jupytext.reads(DRIVE, "py:light").cells[0])
    notebook.cells[-1].source = DRIVE
    client = NotebookClient(notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": text.parent}})
    client.execute(env=dict(os.environ))
    assert "explorers driven" in notebook.cells[-1].outputs[-1]["text"]
