"""notebook_kit: modular deep learning you can read, run and drag.

Four subjects (adapters, routers, merges, expert merging with permutation alignment), each method in one short
file, with widgets that sweep its hyperparameters live. torch and transformers load on first use.
"""

import importlib

from notebook_kit.catalog import catalog, cite
from notebook_kit.claims import claim

__version__ = "0.1.0"
__all__ = ["catalog", "cite", "claim", "compare_merges", "compare_routers", "doctor", "explore", "sweep"]

_LAZY = {
    "compare_merges": "notebook_kit.widgets",
    "compare_routers": "notebook_kit.widgets",
    "explore": "notebook_kit.widgets",
    "sweep": "notebook_kit.widgets",
    "doctor": "notebook_kit.jupyter.doctor",
}


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'notebook_kit' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_LAZY])
