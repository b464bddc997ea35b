"""A page that needs no kernel: the widget's own front end, answered from frames computed beforehand."""

import base64
import html
import itertools
import json
from pathlib import Path

from notebook_kit.checkpoints import atomic
from notebook_kit.hyperparameters import Hyperparameter
from notebook_kit.widgets.live_figure import HERE, plotly_js
from notebook_kit.widgets.wire import encode

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font-family: system-ui, sans-serif; margin: 24px; color: #222; background: #fff; }}
@media (prefers-color-scheme: dark) {{ body {{ color: #ddd; background: #161616; }} }}
{css}
</style>
<body>
<div id="widget"></div>
<script type="application/json" id="page">{page}</script>
<script type="text/plain" id="plotly">{plotly}</script>
<script type="module">
{esm}
</script>
"""

# Plays the kernel: settings in, the frame of the nearest grid point out.
STAND_IN = """
function start(widget) {
  const page = JSON.parse(document.getElementById("page").textContent);
  const bytes = (text) => new DataView(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
  const handlers = {};
  const fire = (event, ...args) => (handlers[event] ?? []).slice().forEach((act) => act(...args));
  const frameOf = (point) => ({ ...page.skeletons[point.skeleton], buffers: point.buffers.map(bytes) });
  const nearest = (settings) => {
    let index = 0;
    for (const { name, values } of page.axes) {
      const wanted = settings[name];
      const both = (value) => typeof value === "number" && typeof wanted === "number";
      const distance = (value) => (both(value) ? Math.abs(value - wanted) : value === wanted ? 0 : Infinity);
      const far = values.map(distance);
      index = index * values.length + far.indexOf(Math.min(...far));
    }
    return page.points[index];
  };
  const state = { ...page.state };
  const model = {
    get: (name) => state[name],
    set: (name, value) => (state[name] = value),
    on: (event, act) => (handlers[event] ??= []).push(act),
    off: (event, act) => (handlers[event] = (handlers[event] ?? []).filter((other) => other !== act)),
    send: (message) => {
      if (message.kind !== "plotly.js") return;
      const packed = bytes(document.getElementById("plotly").textContent);
      queueMicrotask(() => fire("msg:custom", { kind: "plotly.js" }, [packed]));
    },
    save_changes: () => {
      const point = nearest(state.settings);
      Object.assign(state, { frame: frameOf(point), code: point.code, note: point.note });
      ["frame", "code", "note"].forEach((name) => fire(`change:${name}`));
    },
  };
  state.frame = frameOf(nearest(state.settings));
  widget.render({ model, el: document.getElementById("widget") });
}
"""


def write_page(explorer, path: Path, vary: list[str], n_points: int, max_mb: float) -> Path:
    """Compute the grid, say how large the page will be, write it.

    Args:
        explorer: the Explorer to freeze; settings not in `vary` stay as they are.
        path: the .html file.
        vary: hyperparameters that stay movable.
        n_points: positions of each numeric one.
        max_mb: refuse more than this.
    """
    from tqdm.auto import tqdm

    schema = explorer._schema
    axes = {name: _positions(schema[name], explorer.settings[name], n_points) for name in vary}
    count = 1
    for values in axes.values():
        count *= len(values)
    skeletons, known, points, size = [], {}, [], 0
    before = explorer.value, explorer.score, explorer._milliseconds
    try:
        for values in tqdm(itertools.product(*axes.values()), total=count, desc="computing pictures", unit="picture"):
            settings = {**explorer.settings, **dict(zip(axes, values, strict=True))}
            figure, traits = explorer._run(settings)
            frame = encode(figure)
            buffers = [base64.b64encode(buffer).decode() for buffer in frame.pop("buffers")]
            if frame["id"] not in known:
                known[frame["id"]] = len(skeletons)
                skeletons.append(frame)
            points.append({"skeleton": known[frame["id"]], "buffers": buffers, **traits, "note": _note(traits["note"])})
            size += sum(map(len, buffers))
            if size > max_mb * 1e6:
                raise ValueError(
                    f"the page passes {max_mb:g} MB after {len(points)} of {count} pictures: vary fewer or use fewer"
                )
    finally:
        explorer.value, explorer.score, explorer._milliseconds = before

    controls = [{**control, "fixed": control["name"] not in axes} for control in explorer.controls]
    for control in controls:
        control["optional"] = None in axes.get(control["name"], ())
    state = {"controls": controls, "settings": dict(explorer.settings), "can_pin": False, "pins": [], "error": {}}
    state |= {"code": explorer.code, "note": "", "dragging": False}
    page = {"axes": [{"name": name, "values": values} for name, values in axes.items()], "skeletons": skeletons}
    page |= {"points": points, "state": state}
    esm = (HERE / "live_figure.js").read_text("utf-8").replace("export default { render };", "start({ render });")
    text = PAGE.format(
        title=html.escape(explorer._title or schema.owner),
        css=(HERE / "live_figure.css").read_text("utf-8"),
        # "<" never appears literally inside the script element, so nothing in the data can close it.
        page=json.dumps(page, default=str).replace("<", "\\u003c"),
        plotly=base64.b64encode(plotly_js()).decode(),
        esm=esm + STAND_IN,
    )
    if len(text) > max_mb * 1e6:
        raise ValueError(
            f"the page would be {len(text) / 1e6:.1f} MB, over max_mb={max_mb:g}: vary fewer, or fewer points"
        )
    print(f"{len(points)} pictures, {len(text) / 1e6:.1f} MB -> {path}")  # noqa: T201
    with atomic(path) as partial:
        partial.write_text(text, "utf-8")
    return path


def _positions(row: Hyperparameter, current, n_points: int) -> list:
    """The values a slider can take in the page; the current one is among them."""
    if row.kind in ("choice", "bool"):
        return list(row.options)
    steps = max(2, n_points) - 1
    if row.log:
        values = [row.low * (row.high / row.low) ** (i / steps) for i in range(steps + 1)]
    else:
        values = [row.low + (row.high - row.low) * i / steps for i in range(steps + 1)]
    if row.kind == "int":
        values = [round(value) for value in values]
    optional = [None] if row.default is None else []  # a slider that can be switched off
    return optional + sorted({*values, *([current] if current is not None else [])})


def _note(note: str) -> str:
    return ", ".join(part for part in note.split(", ") if not part.endswith("ms"))
