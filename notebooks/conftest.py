"""nbval: printed results are compared where a cell asks for it; pictures and widgets are compared elsewhere."""

import os

os.environ.setdefault("NOTEBOOK_KIT_STRICT", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collectstart(collector):
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += (
            "application/vnd.jupyter.widget-view+json",
            "application/vnd.notebook_kit.claim+json",
            "image/png",
            "text/html",
            "stderr",
        )
