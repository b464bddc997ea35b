"""Every method is in the catalogue with its papers, and can be cited."""

import re
from typing import Annotated

import pytest

from notebook_kit import catalog as catalog_function
from notebook_kit import cite
from notebook_kit.catalog import ROOMS, _methods, method, methods, papers
from notebook_kit.hyperparameters import Range, hyperparameters
from notebook_kit.merging import ties


def test_every_paper_of_every_method_stands_in_papers_toml():
    missing = {(name, slug) for name, entry in methods().items() for slug in entry.papers if slug not in papers()}
    assert not missing
    assert {"average", "task_arithmetic", "slerp", "ties", "dare"} <= set(methods())
    assert {entry.family for entry in methods().values()} <= set(ROOMS)


def test_every_paper_has_what_a_citation_needs():
    for slug, paper in papers().items():
        assert paper["title"], slug
        assert isinstance(paper["authors"], list), slug
        assert paper["authors"], slug
        assert 1900 < paper["year"] < 2100, slug
        assert re.fullmatch(r"\d{4}\.\d{4,5}|[a-z-]+/\d{7}", paper.get("arxiv", "0000.0000")), slug


def test_the_table_has_a_row_for_each_method():
    frame = catalog_function()
    assert list(frame.columns) == ["name", "family", "summary", "paper", "year", "arxiv", "hyperparameters"]
    assert list(frame["name"]) == list(methods())
    assert frame["name"].is_unique
    assert (frame["summary"].str.len() > 10).all()
    row = frame.set_index("name").loc["ties"]
    assert (row["family"], row["year"], row["arxiv"]) == ("merging", 2023, "2306.01708")
    assert row["hyperparameters"].startswith("density, scale, scope")


def test_each_public_hyperparameter_is_explained():
    unexplained = [
        f"{name}.{row.name}"
        for name, entry in methods().items()
        for row in hyperparameters(entry.object).values()
        if not row.help
    ]
    assert not unexplained


@pytest.mark.parametrize("what", ["ties", ties, "ties-merging"])
def test_cite_gives_bibtex(what):
    text = cite(what)
    assert text.startswith("@inproceedings{ties-merging,\n")
    assert "eprint = {2306.01708}" in text
    assert "author = {Yadav, Prateek and " in text


def test_every_citation_is_well_formed():
    for slug in papers():
        text = cite(slug)
        assert re.fullmatch(r"@(inproceedings|misc)\{[\w.-]+,\n(  \w+ = \{.*\},?\n)+\}", text), slug
        assert text.count("{") == text.count("}"), slug
        assert len(re.findall(r"^  \w+ = ", text, re.M)) == len(re.findall(r"\},?$", text, re.M)) - 1, slug


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(ValueError, match=r"no method or paper is called 'tie'; near it: .*ties"):
        cite("tie")
    with pytest.raises(ValueError, match=r"no method or paper is called 'qqqqqqq'$"):
        cite("qqqqqqq")


@pytest.fixture
def registry(monkeypatch):
    before = dict(_methods)
    yield
    _methods.clear()
    _methods.update(before)


def test_the_decorator_checks_functions_and_classes(registry):
    @method(family="merging", paper=("ties-merging", "dare"))
    def halve(x, *, t: Annotated[float, Range(0, 1)] = 0.5):
        """Halve."""
        return x * t

    @method(family="adapters", paper="lora")
    class Thing:
        """A thing."""

        def __init__(self, *, rank: Annotated[int, Range(1, 4)] = 2):
            self.rank = rank

    assert halve(4) == 2
    assert halve.__name__ == "halve"
    assert halve.__doc__ == "Halve."
    assert Thing(rank=3).rank == 3
    with pytest.raises(ValueError, match=r"t must be in \[0, 1\], got 2 \(halve\)"):
        halve(4, t=2)
    with pytest.raises(ValueError, match=r"rank must be in \[1, 4\], got 9 \(Thing\)"):
        Thing(rank=9)
    assert cite(halve).count("@") == 2
    assert methods()["halve"].papers == ("ties-merging", "dare")
