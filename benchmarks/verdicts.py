"""Do the verdicts of the lessons depend on their seeds? Every lesson is run again with all of its seeds moved.

    python benchmarks/verdicts.py [notebooks/21_balance.py ...] [--moves 1000 2000]

Shipped models, data and their splits stay as they are; what a lesson draws, initialises and trains itself changes.
Prints each claim whose verdict, or assertion beside it, comes out otherwise than claims.toml expects.
"""

import argparse
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

from notebook_kit.claims import MIME, expected_verdicts

LESSONS = Path(__file__).parents[1] / "notebooks"
PREAMBLE = """
import sys
import torch
import notebook_kit.claims

notebook_kit.claims.expected_verdicts = dict  # a verdict is noted, not held against the board
_FIXED = ("notebook_kit.data", "notebook_kit.zoo", "notebook_kit.models")
_seed_all = torch.manual_seed


def _moved(seed):
    caller = sys._getframe(2).f_globals.get("__name__", "")
    return seed if caller.startswith(_FIXED) else seed + {move}


class _Generator(torch.Generator):
    def manual_seed(self, seed):
        return super().manual_seed(_moved(seed))


torch.Generator = _Generator
torch.manual_seed = lambda seed: _seed_all(_moved(seed))
"""


def run(text: Path, move: int) -> tuple[dict[tuple[str, str], dict], list[str]]:
    """What a lesson claims with its seeds moved, and the errors of its cells."""
    notebook = jupytext.read(text)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(PREAMBLE.replace("{move}", str(move))))
    place = {"metadata": {"path": str(text.parent)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", allow_errors=True, resources=place).execute()
    verdicts, errors = {}, []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if row := output.get("data", {}).get(MIME):
                verdicts[row["paper"], row["statement"]] = row
            if output.output_type == "error":
                line = next((line for line in cell.source.splitlines() if line.startswith("assert")), "")
                errors.append(f"{output.ename}: {output.evalue[:200]} [{line[:120]}]")
    return verdicts, errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("texts", nargs="*", type=Path)
    parser.add_argument("--moves", type=int, nargs="+", default=[1000])
    arguments = parser.parse_args()
    expected, changed, seen = expected_verdicts(), 0, 0
    for text in arguments.texts or sorted(LESSONS.glob("[0-9][0-9]_*.py")):
        for move in arguments.moves:
            started = time.perf_counter()
            verdicts, errors = run(text, move)
            other = [row for key, row in verdicts.items() if expected.get(key) is not row["holds"]]
            seen, changed = seen + len(verdicts), changed + len(other)
            seconds = time.perf_counter() - started
            print(f"{text.stem}, seeds + {move}: {len(verdicts)} verdicts, {len(other)} changed ({seconds:.0f} s)")
            for row in other:
                print(f"  {'holds' if row['holds'] else 'does not hold'} now: {row['statement']} [{row['figure']}]")
            for error in errors:
                print(f"  {error}")
            sys.stdout.flush()
    print(f"{changed} of {seen} verdicts changed")


if __name__ == "__main__":
    main()
