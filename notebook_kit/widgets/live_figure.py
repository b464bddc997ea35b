"""LiveFigure: a plotly figure that is redrawn in place, from a few kilobytes, wherever anywidget works."""

import base64
import functools
import gzip
from pathlib import Path

import anywidget
import plotly.graph_objects as go
import traitlets

from notebook_kit.figures.static import to_png
from notebook_kit.widgets.wire import digest, encode

HERE = Path(__file__).parent


@functools.cache
def plotly_js() -> bytes:
    """plotly.js from the plotly wheel, compressed: 1.5 MB, sent once per page."""
    from plotly.offline import get_plotlyjs

    return gzip.compress(get_plotlyjs().encode(), compresslevel=6)


class LiveFigure(anywidget.AnyWidget):
    """A live plotly figure: `show` another one and the picture changes in place.

    Where no kernel or no widget support is at hand (GitHub, nbconvert, an untrusted notebook), the picture as it was
    when displayed stands there instead.

    Args:
        figure: what to draw first.
    """

    _esm = HERE / "live_figure.js"
    _css = HERE / "live_figure.css"

    frame = traitlets.Dict(help="the picture, as wire.encode gives it").tag(sync=True)
    controls = traitlets.List().tag(sync=True)
    settings = traitlets.Dict().tag(sync=True, echo_update=False)
    dragging = traitlets.Bool(False).tag(sync=True, echo_update=False)
    can_pin = traitlets.Bool(False).tag(sync=True)
    code = traitlets.Unicode("").tag(sync=True)
    note = traitlets.Unicode("").tag(sync=True)
    error = traitlets.Dict().tag(sync=True)
    pins = traitlets.List().tag(sync=True)

    def __init__(self, figure: go.Figure | None = None, **traits):
        self.figure = figure
        super().__init__(frame=encode(figure) if figure is not None else {}, **traits)
        self.on_msg(self._answer)

    def show(self, figure: go.Figure) -> None:
        """Draw another figure in place of the present one.

        Args:
            figure: if only its numbers differ from the present one's, only they cross the wire's slow part.
        """
        self.frame = encode(figure)
        self.figure = figure

    def _answer(self, _widget, message: dict, _buffers) -> None:
        if message.get("kind") == "plotly.js":
            self.send({"kind": "plotly.js"}, buffers=[plotly_js()])

    def __repr__(self):
        return f"{type(self).__name__}({digest(self.figure) if self.figure is not None else 'empty'})"

    def _repr_mimebundle_(self, **kwargs):
        bundle = super()._repr_mimebundle_(**kwargs)
        data, metadata = bundle if isinstance(bundle, tuple) else (bundle or {}, {})
        data = {**data, "text/plain": repr(self)}
        if self.figure is not None:
            data["image/png"] = base64.b64encode(to_png(self.figure)).decode()
        return data, metadata
