"""nbval runs every lesson's cells; then, in the same kernel, every control of every widget is moved to its ends.

Printed results are compared where a cell asks for it; pictures and widgets are compared elsewhere. Widgets are driven
in strict mode, where an exception in a callback is an error.
"""

import os
from queue import Empty

import pytest

os.environ.setdefault("NOTEBOOK_KIT_STRICT", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

TIMEOUT = 240  # seconds
DRIVE = """
import gc as _gc
from notebook_kit.widgets import Explorer as _Explorer

_explorers = [item for item in _gc.get_objects() if issubclass(type(item), _Explorer)]
assert _explorers, "a lesson has at least one live widget"
for _explorer in _explorers:
    for _name, _row in _explorer._schema.items():
        for _value in (list(_row.options) or [_row.low, _row.high])[:8]:
            _explorer.settings = {_name: _value}
            assert not _explorer.error, _explorer.error
        _explorer.settings = {_name: _row.default}
    _explorer.pin()
    _explorer.reset()
    assert _explorer.value is not None
"""


def pytest_collectstart(collector):
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += (
            "application/vnd.jupyter.widget-view+json",
            "application/vnd.notebook_kit.claim+json",
            "image/png",
            "text/html",
            "stderr",
        )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Put one more item behind the cells of each notebook."""
    last = {item.parent: place for place, item in enumerate(items) if hasattr(item.parent, "kernel")}
    for lesson, place in sorted(last.items(), key=lambda pair: -pair[1]):
        items.insert(place + 1, WidgetsSurviveTheirControls.from_parent(lesson, name="widgets survive their controls"))


class WidgetsSurviveTheirControls(pytest.Item):
    """Every explorer alive is driven through the ends of each range and through all options."""

    def runtest(self):
        kernel = self.parent.kernel
        message = kernel.execute_cell_input(DRIVE, allow_stdin=False)
        try:
            reply = kernel.get_message(stream="shell", timeout=TIMEOUT)
            while reply["parent_header"].get("msg_id") != message:
                reply = kernel.get_message(stream="shell", timeout=TIMEOUT)
        except Empty:
            kernel.interrupt()
            pytest.fail(f"the widgets were not through after {TIMEOUT} s", pytrace=False)
        if reply["content"]["status"] != "ok":
            pytest.fail("\n".join(reply["content"].get("traceback", [str(reply)])), pytrace=False)

    def reportinfo(self):
        return self.path, 0, f"{self.path.name}: {self.name}"
