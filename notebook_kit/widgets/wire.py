"""A plotly figure as it crosses the wire: a JSON skeleton, and its number arrays as binary buffers."""

import hashlib
import json
import math

import numpy as np
import plotly.graph_objects as go


def encode(figure: go.Figure) -> dict:
    """Split a figure into what a slider changes (arrays) and what it mostly does not (the rest).

    Args:
        figure: any plotly figure; its heatmaps should have zmin and zmax, or a colour would change its meaning.

    Returns:
        dict: data and layout with each number array replaced by {"$array": i}; arrays (dtype, shape); buffers; id,
        equal for two frames that differ in nothing but the contents of their arrays and the title's text.
    """
    if not isinstance(figure, go.Figure):
        raise TypeError(f"draw must return a plotly Figure, got {type(figure).__name__}")
    arrays: list[np.ndarray] = []

    def split(node):
        if isinstance(node, dict):
            return {key: split(value) for key, value in node.items() if not key.startswith("_")}
        if isinstance(node, np.ndarray):
            if node.dtype.kind == "M":
                return np.datetime_as_string(node).tolist()
            if node.dtype.kind in "fiub" and node.dtype.itemsize <= 8 and node.ndim <= 2 and node.size:
                arrays.append(_narrow(node))
                return {"$array": len(arrays) - 1}
            return [split(item) for item in node.tolist()]
        if isinstance(node, (list, tuple)):
            return [split(item) for item in node]
        node = node.item() if isinstance(node, np.generic) else node
        return None if isinstance(node, float) and not math.isfinite(node) else node  # JSON has no NaN

    data = [split(_with_arrays(trace.to_plotly_json())) for trace in figure.data]
    layout = split(figure.layout.to_plotly_json())
    layout.pop("template", None)
    shapes = [{"dtype": array.dtype.str[1:], "shape": list(array.shape)} for array in arrays]
    # A title may tell the numbers; it changes with them and is no change of the picture's build.
    untitled = {**layout, "title": {**layout.get("title", {}), "text": ""}}
    skeleton = json.dumps([data, untitled, shapes], default=str)
    return {
        "id": hashlib.blake2b(skeleton.encode(), digest_size=8).hexdigest(),
        "data": data,
        "layout": layout,
        "arrays": shapes,
        "buffers": [memoryview(array.reshape(-1)).cast("B") for array in arrays],
    }


def digest(figure: go.Figure) -> str:
    """One line that tells two pictures apart and is stable enough to compare: type, shape, range, sum of each trace."""
    parts = []
    for trace in figure.data:
        numbers = [
            np.asarray(value, dtype=np.float64)
            for key in ("z", "y", "x")
            if (value := getattr(trace, key, None)) is not None and _numeric(value)
        ]
        if not numbers:
            parts.append(trace.type)
            continue
        array = numbers[0][np.isfinite(numbers[0])]
        low, high, total = (array.min(), array.max(), array.sum()) if array.size else (0, 0, 0)
        shape = "x".join(map(str, numbers[0].shape))
        parts.append(f"{trace.type} {shape} in [{low:.2g}, {high:.2g}], sum {total:.2g}")
    return "; ".join(parts) or "empty"


def _with_arrays(trace: dict) -> dict:
    """Number lists of a user's own figure become arrays, so that they too travel as bytes."""
    for key in ("x", "y", "z"):
        if isinstance(trace.get(key), (list, tuple)) and _numeric(trace[key]):
            trace[key] = np.asarray(trace[key], dtype=np.float32)
    if trace.get("type") == "heatmap" and isinstance(trace.get("z"), np.ndarray) and "zmin" not in trace:
        finite = trace["z"][np.isfinite(trace["z"])]
        trace["zmin"], trace["zmax"] = float(finite.min(initial=0)), float(finite.max(initial=0))
    return trace


def _numeric(value) -> bool:
    try:
        return np.asarray(value).dtype.kind in "fiub"
    except ValueError:  # ragged
        return False


def _narrow(array: np.ndarray) -> np.ndarray:
    """float32 shows 7 digits, a screen has 4; integers too large for int32 become floats."""
    if array.dtype.kind in "iu" and array.dtype.itemsize >= 4:
        fits = array.size == 0 or (array.min() >= -(2**31) and array.max() < 2**31)
        return np.ascontiguousarray(array, dtype=np.int32 if fits else np.float32)
    kind = np.uint8 if array.dtype.kind == "b" else np.int32 if array.dtype.kind in "iu" else np.float32
    return np.ascontiguousarray(array, dtype=kind)
