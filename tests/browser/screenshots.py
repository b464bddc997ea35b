"""A PNG of every widget of every lesson, taken in the real JupyterLab: `make screenshots`, then look at them.

python -m tests.browser.screenshots [--dark] [lesson ...]
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from tests.browser.lab import running_lab

ROOT = Path(__file__).parents[2]


def main() -> None:
    """Run the lessons and write screenshots/<lesson>-<n>.png."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("lessons", nargs="*", help="such as 30_merging; default: all")
    parser.add_argument("--dark", action="store_true")
    options = parser.parse_args()
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
