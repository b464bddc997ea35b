"""Widgets: controls beside numbers and pictures, live."""

import importlib

from notebook_kit.widgets.explorer import Explorer, explore
from notebook_kit.widgets.live_figure import LiveFigure
from notebook_kit.widgets.sweeps import SweepResult, sweep

_LAZY = {
    "RouterExplorer": "router_explorer",
    "WeightExplorer": "weight_explorer",
    "AlignmentExplorer": "alignment_explorer",
    "ExpertMergeExplorer": "expert_merge_explorer",
    "MergeComparison": "merge_comparison",
    "compare_merges": "merge_comparison",
    "RouterComparison": "router_comparison",
    "compare_routers": "router_comparison",
}
__all__ = ["Explorer", "LiveFigure", "SweepResult", "explore", "sweep", *_LAZY]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(f"notebook_kit.widgets.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'notebook_kit.widgets' has no attribute {name!r}")
