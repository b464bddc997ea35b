"""Claims: what a paper says, measured here, held against the verdict that claims.toml expects."""

import functools
import html
import json
import tomllib
from dataclasses import asdict, dataclass
from importlib import resources

MIME = "application/vnd.notebook_kit.claim+json"


class ClaimChanged(AssertionError):
    """A measured verdict differs from the one in claims.toml."""


@dataclass(frozen=True)
class Verdict:
    """What `claim` measured; a notebook shows it as a coloured line."""

    paper: str
    statement: str
    holds: bool
    figure: str
    expected: bool | None = None

    @property
    def text(self) -> str:
        return "holds" if self.holds else "does not hold at this scale"

    def __repr__(self):
        return f"{self.text}: {self.statement} [{self.figure}] ({self.paper})"

    def _repr_mimebundle_(self, include=None, exclude=None):
        colour = "#009E73" if self.holds else "#D55E00"
        parts = [html.escape(part) for part in (self.text, self.statement, self.figure, self.paper)]
        line = (
            f'<div style="border-left:4px solid {colour};padding:2px 10px"><b style="color:{colour}">{parts[0]}</b> '
            f'{parts[1]} <span style="opacity:.75">[{parts[2]}] ({parts[3]})</span></div>'
        )
        return {"text/plain": repr(self), "text/html": line, MIME: asdict(self)}


@functools.cache
def expected_verdicts() -> dict[tuple[str, str], bool]:
    """claims.toml as (paper, statement) to whether it is expected to hold here."""
    board = tomllib.loads(resources.files("notebook_kit").joinpath("claims.toml").read_text("utf-8"))
    return {(paper, row["statement"]): row["holds"] for paper, rows in board.items() for row in rows}


def claim(paper: str, statement: str, holds: bool, figure: str = "") -> Verdict:
    """State whether a paper's claim holds here, and fail if that is not what claims.toml expects.

    Args:
        paper: the paper's slug in papers.toml.
        statement: the claim, in the small, as one sentence.
        holds: the measured verdict.
        figure: the numbers behind it, such as "0.66 against 0.54".

    Returns:
        Verdict: shown by the notebook when it is the last line of a cell.

    Raises:
        ClaimChanged: the verdict differs from claims.toml, in either direction.
        ValueError: an empty statement.
    """
    if not statement.strip():
        raise ValueError("claim needs a statement, got an empty text")
    expected = expected_verdicts().get((paper, statement))
    verdict = Verdict(paper, statement, bool(holds), str(figure), expected)
    if expected is not None and expected != verdict.holds:
        raise ClaimChanged(f"claims.toml expects that this {'holds' if expected else 'does not hold'}: {verdict!r}")
    return verdict


def board(notebooks: list) -> str:
    """Write the Markdown table of all verdicts found in executed notebooks.

    Args:
        notebooks: paths of .ipynb files saved with outputs.
    """
    rows = []
    for path in notebooks:
        for cell in json.loads(path.read_text("utf-8"))["cells"]:
            for output in cell.get("outputs", []):
                row = output.get("data", {}).get(MIME)
                if row:
                    verdict = "holds" if row["holds"] else "does not, at this scale"
                    cells = (row["paper"], row["statement"], verdict, row["figure"], path.stem)
                    rows.append("| " + " | ".join(str(text).replace("|", "\\|") for text in cells) + " |")
    head = [
        "# Claims",
        "",
        "What the papers say, measured in the lessons on the shipped models. Written by `make claims`.",
        "",
        "| paper | claim | verdict | measured | lesson |",
        "|---|---|---|---|---|",
    ]
    return "\n".join(head + rows) + "\n"
