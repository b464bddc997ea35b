"""A claim is a verdict that must be the expected one, and text that is safe to show."""

import json
import tomllib
from pathlib import Path

import pytest

import notebook_kit
from notebook_kit import claims
from notebook_kit.catalog import papers
from notebook_kit.claims import MIME, ClaimChanged, board, claim


@pytest.fixture
def expected(monkeypatch):
    table = {("ties-merging", "it helps"): True, ("dare", "it helps"): False}
    monkeypatch.setattr(claims, "expected_verdicts", lambda: table)


def test_a_verdict_that_changed_raises_in_both_directions(expected):
    assert claim("ties-merging", "it helps", holds=True).expected is True
    assert claim("dare", "it helps", holds=False).holds is False
    with pytest.raises(ClaimChanged, match="expects that this holds: does not hold at this scale: it helps"):
        claim("ties-merging", "it helps", holds=False, figure="1 against 2")
    with pytest.raises(ClaimChanged, match="expects that this does not hold: holds: it helps"):
        claim("dare", "it helps", holds=True)
    assert issubclass(ClaimChanged, AssertionError)


def test_a_claim_not_on_the_board_is_only_shown(expected):
    verdict = claim("ties-merging", "it is new", holds=True, figure="0.5")
    assert verdict.holds is True
    assert verdict.expected is None
    assert repr(verdict) == "holds: it is new [0.5] (ties-merging)"


def test_a_claim_says_something():
    with pytest.raises(ValueError, match="needs a statement"):
        claim("ties-merging", "  ", holds=True)


def test_text_is_escaped_where_it_meets_html(expected):
    bundle = claim("<i>slug</i>", "<script>alert(1)</script>", True, "a < b & c")._repr_mimebundle_()
    shown = bundle["text/html"]
    assert "<script>" not in shown
    assert "&lt;script&gt;" in shown
    assert "&lt;i&gt;slug" in shown
    assert "a &lt; b &amp; c" in shown
    assert bundle[MIME]["statement"] == "<script>alert(1)</script>"
    assert json.dumps(bundle)


def test_the_board_lists_what_executed_lessons_measured(expected, tmp_path):
    outputs = [
        {"data": claim("ties-merging", "it helps", True, "1 | 2")._repr_mimebundle_()},
        {"output_type": "stream", "text": "x"},
        {"data": claim("dare", "it helps", False, "3")._repr_mimebundle_()},
    ]
    cells = [{"cell_type": "markdown"}, {"cell_type": "code", "outputs": outputs}]
    path = tmp_path / "30_merging.ipynb"
    path.write_text(json.dumps({"cells": cells}))
    lines = board([path]).splitlines()
    assert "| ties-merging | it helps | holds | 1 \\| 2 | 30_merging |" in lines
    assert "| dare | it helps | does not, at this scale | 3 | 30_merging |" in lines
    assert board([]).endswith("|---|---|---|---|---|\n")


def test_claims_toml_is_complete():
    table = tomllib.loads((Path(notebook_kit.__file__).parent / "claims.toml").read_text("utf-8"))
    for paper, rows in table.items():
        assert paper in papers()
        for row in rows:
            assert set(row) == {"statement", "holds", "lesson"}
            assert isinstance(row["holds"], bool)
    assert len(claims.expected_verdicts()) == sum(map(len, table.values()))
