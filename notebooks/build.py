"""Run lessons and save them with their outputs, small and clean.

    python notebooks/build.py [notebooks/30_merging.py ...]     all of them by default
    python notebooks/build.py --check                           are text and notebook of each lesson the same?

The text (py:percent) is the source; the .ipynb beside it is made here. Widget views are replaced by the still picture
that they carry, so that a lesson opened on GitHub, or before it is run, shows its pictures and stays under 1 MB.
"""

import argparse
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
MAX_BYTES = 1_000_000
VIEW = "application/vnd.jupyter.widget-view+json"


def lessons() -> list[Path]:
    """The texts of all lessons, in order."""
    return sorted(HERE.glob("[0-9][0-9]_*.py"))


def build(text: Path) -> Path:
    """Run one lesson from first cell to last and write its notebook."""
    notebook = jupytext.read(text)
    for i, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{i}"  # stable ids keep diffs small
    started = time.perf_counter()
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(text.parent)}}
    ).execute()
    clean(notebook)
    path = text.with_suffix(".ipynb")
    content = nbformat.writes(notebook) + "\n"
    if len(content) > MAX_BYTES:
        raise ValueError(f"{path.name} would be {len(content):,} bytes; the limit is {MAX_BYTES:,}")
    path.write_text(content, "utf-8")
    print(f"{path.name}: {time.perf_counter() - started:.0f} s, {len(content) / 1000:.0f} kB")
    return path


def clean(notebook) -> None:
    """Drop widget state, views, times and execution noise; keep pictures and printed results."""
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code":
            continue
        kept = []
        for output in cell.outputs:
            if output.get("name") == "stderr":
                continue  # progress bars
            data = output.get("data", {})
            data.pop(VIEW, None)
            if data or output.output_type not in ("display_data", "execute_result", "update_display_data"):
                kept.append(output)
        cell.outputs = [output for output in kept if not _only_progress(output)]


def _only_progress(output) -> bool:
    text = output.get("data", {}).get("text/plain", "")
    return "image/png" not in output.get("data", {}) and (
        "it/s]" in text or "?it/s" in text or text.startswith("HBox(")
    )


def same(text: Path) -> bool:
    """Whether the notebook has the cells of its text."""
    path = text.with_suffix(".ipynb")
    if not path.is_file():
        return False
    sources = [
        [(cell.cell_type, cell.source) for cell in nb.cells] for nb in (jupytext.read(text), nbformat.read(path, 4))
    ]
    return sources[0] == sources[1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("texts", nargs="*", type=Path)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    chosen = arguments.texts or lessons()
    if arguments.check:
        stale = [text.name for text in chosen if not same(text)]
        sys.exit(f"rebuild with `make notebooks`: {', '.join(stale)}" if stale else 0)
    for lesson in chosen:
        build(lesson)
