"""A PNG of every widget of every lesson, taken in the real JupyterLab: `make screenshots`, then look at them.

python -m tests.browser.screenshots [--dark] [lesson ...]
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from tests.browser.lab import running_lab, write_notebook

ROOT = Path(__file__).parents[2]


README_CELLS = """
import torch; torch.set_num_threads(1)
from notebook_kit import explore
from notebook_kit.merging import ties
from notebook_kit.zoo import digit_labels
bed = digit_labels()
live = explore(ties, bed.base, bed.experts, score=bed.score)
for settings in ({"scale": 0.8, "density": 0.7}, {"elect": "none", "scale": 2.0}):
    live.settings = settings
    live.pin()
live.settings = {"elect": "mass", "scale": 0.6, "density": 0.5}
live
"""


def readme() -> None:
    """Write docs/explore_ties.png: a live widget with two pinned runs."""
    with tempfile.TemporaryDirectory() as folder:
        write_notebook(Path(folder) / "readme.ipynb", [README_CELLS])
        with running_lab(Path(folder)) as lab:
            lab.open("readme.ipynb", height=1300)
            lab.run_all()
            lab.wait_drawn(0)
            lab.page.wait_for_timeout(2000)
            lab.page.query_selector(".nbk").screenshot(path=ROOT / "docs" / "explore_ties.png")


def main() -> None:
    """Run the lessons and write screenshots/<lesson>-<n>.png."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("lessons", nargs="*", help="such as 30_merging; default: all")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--readme", action="store_true")
    options = parser.parse_args()
    if options.readme:
        return readme()
    out = ROOT / "screenshots"
    out.mkdir(exist_ok=True)
    suffix = "-dark" if options.dark else ""
    names = options.lessons or [path.stem for path in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))]
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            shutil.copy(ROOT / "notebooks" / f"{name}.ipynb", folder)
        with running_lab(Path(folder), theme="JupyterLab Dark" if options.dark else "JupyterLab Light") as lab:
            for name in names:
                lab.open(f"{name}.ipynb", height=12_000)
                lab.run_all()
                lab.page.wait_for_timeout(2500)
                problems = lab.errors()
                if problems:
                    print(f"{name}: {problems[0][:400]}")
                widgets = lab.page.query_selector_all(".jp-Notebook .nbk")
                for i, widget in enumerate(widgets):
                    widget.screenshot(path=out / f"{name}-{i}{suffix}.png")
                lab.page.query_selector(".jp-Notebook").screenshot(path=out / f"{name}{suffix}.png")
                print(f"{name}: {len(widgets)} widgets")


if __name__ == "__main__":
    main()
