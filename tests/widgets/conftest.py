"""A front end played by hand: what crosses the wire to it is kept, and it can send what a browser would."""

import comm
import pytest


class FrontEnd:
    """Stands at the other end of the widgets' comms."""

    def __init__(self):
        self.sent = []  # (data, buffers), in the order of sending

    def updates(self, name=None):
        """The state updates sent, or only those that carry trait `name`."""
        states = [data["state"] for data, _ in self.sent if data.get("method") == "update"]
        return [state for state in states if name is None or name in state]

    def bytes(self):
        return sum(memoryview(buffer).nbytes for _, buffers in self.sent for buffer in buffers or ())

    def clear(self):
        self.sent.clear()

    def move(self, widget, **state):
        """Set traits as a browser does, in one message."""
        self._deliver(widget, {"method": "update", "state": state, "buffer_paths": []})

    def press(self, widget, **content):
        """Send a custom message, as a button does."""
        self._deliver(widget, {"method": "custom", "content": content})

    def _deliver(self, widget, data):
        widget._handle_msg({"content": {"data": data}, "buffers": []})


@pytest.fixture
def front_end(monkeypatch):
    end = FrontEnd()

    class Comm:
        comm_id = "test"
        kernel = "any"  # without one, ipywidgets sends nothing

        def __init__(self, data=None, buffers=None, **_):
            end.sent.append(({"method": "open", **(data or {})}, buffers))

        def send(self, data=None, buffers=None, **_):
            end.sent.append((data, buffers))

        def on_msg(self, *_):
            pass

        def close(self, *_, **__):
            pass

    monkeypatch.setattr(comm, "create_comm", lambda **options: Comm(**options))
    return end
