"""Lessons, methods, papers and claims hold together; notebooks are what their texts say, small and clean."""

import ast
import json
import re
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest

from notebook_kit.catalog import methods, papers
from notebook_kit.claims import MIME, expected_verdicts

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
sys.path.insert(0, str(NOTEBOOKS))
import build  # noqa: E402

LESSONS = build.lessons()
lesson = pytest.mark.parametrize("text", LESSONS, ids=lambda path: path.stem)


def notebook_of(text: Path):
    return nbformat.read(text.with_suffix(".ipynb"), as_version=4)


def code_of(text: Path) -> str:
    return "\n".join(cell.source for cell in jupytext.read(text).cells if cell.cell_type == "code")


def claims_shown_in(text: Path) -> list[dict]:
    outputs = [output for cell in notebook_of(text).cells for output in cell.get("outputs", [])]
    return [output["data"][MIME] for output in outputs if MIME in output.get("data", {})]


def methods_of(text: Path) -> list[str]:
    return jupytext.read(text).metadata["notebook_kit"]["methods"]


@lesson
def test_notebook_is_built_from_its_text(text):
    assert build.same(text), "run `make notebooks`"


@lesson
def test_notebook_is_small_and_clean(text):
    path = text.with_suffix(".ipynb")
    notebook = notebook_of(text)
    assert path.stat().st_size < build.MAX_BYTES
    assert "widgets" not in notebook.metadata
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not any(output.output_type == "error" for output in outputs)
    assert any(outputs)
    assert str(Path.home()) not in path.read_text("utf-8")


@lesson
def test_every_picture_has_a_still_and_a_digest(text):
    found = 0
    for cell in notebook_of(text).cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if re.match(r"(LiveFigure|\w*Explorer)\(", data.get("text/plain", "")):
                found += 1
                assert "image/png" in data
    assert found


@lesson
def test_a_lesson_asserts_a_claim_that_is_on_the_board(text):
    code = code_of(text)
    assert "assert " in code
    rows = claims_shown_in(text)
    assert rows
    for row in rows:
        assert expected_verdicts().get((row["paper"], row["statement"])) is row["holds"], row["statement"]


@lesson
def test_cells_are_short_and_each_has_a_word_before_it(text):
    cells = jupytext.read(text).cells
    for cell in cells:
        if cell.cell_type == "code":
            lines = [line for line in cell.source.splitlines() if line.strip()]
            assert len(lines) <= 20, cell.source


@lesson
def test_the_methods_a_lesson_names_are_in_it(text):
    names = {node.id for node in ast.walk(ast.parse(code_of(text))) if isinstance(node, ast.Name)}
    names |= {node.attr for node in ast.walk(ast.parse(code_of(text))) if isinstance(node, ast.Attribute)}
    assert set(methods_of(text)) <= names & set(methods())


def test_every_method_has_a_lesson():
    taught = {name for text in LESSONS for name in methods_of(text)}
    assert set(methods()) == taught


def test_every_paper_has_a_method_and_every_method_its_papers():
    used = {slug for entry in methods().values() for slug in entry.papers}
    assert used == set(papers())


def test_every_claim_on_the_board_is_made_in_its_lesson():
    import tomllib

    board = tomllib.loads((NOTEBOOKS.parent / "notebook_kit" / "claims.toml").read_text("utf-8"))
    shown = {text.stem: {(row["paper"], row["statement"]) for row in claims_shown_in(text)} for text in LESSONS}
    for paper, rows in board.items():
        assert paper in papers()
        for row in rows:
            assert (paper, row["statement"]) in shown[row["lesson"]]


def test_claims_board_is_up_to_date():
    from notebook_kit.claims import board

    paths = [text.with_suffix(".ipynb") for text in LESSONS]
    assert (NOTEBOOKS.parent / "CLAIMS.md").read_text("utf-8") == board(paths), "run `make claims`"


def test_same_notices_a_changed_cell(tmp_path):
    text = tmp_path / "x.py"
    text.write_text("# %%\n1 + 1\n")
    (tmp_path / "x.ipynb").write_text(json.dumps(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 + 2")])))
    assert not build.same(text)
