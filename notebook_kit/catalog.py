"""The catalogue: which method implements which paper, found by decorator and papers.toml."""

import difflib
import functools
import importlib
import inspect
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources

from notebook_kit.hyperparameters import hyperparameters, validate

ROOMS = ("adapters", "routers", "mixtures", "merging", "alignment", "expert_merging", "compression", "serving")


@dataclass(frozen=True)
class Method:
    """One entry: a function or class, its family (room) and the papers behind it (slugs of papers.toml)."""

    name: str
    family: str
    papers: tuple[str, ...]
    object: Callable
    statistics: Callable | None = None


_methods: dict[str, Method] = {}


def method(*, family: str, paper: str | tuple[str, ...], statistics: Callable | None = None) -> Callable:
    """Enter a function or class into the catalogue, and check its hyperparameters whenever it is called.

    Args:
        family: the room it lives in, such as "merging".
        paper: slug or slugs in papers.toml.
        statistics: for merges that look at the whole model before they can treat one tensor:
            `statistics(base, experts, **hyperparameters)` returns the named arguments that carry what it saw,
            so that `merge_files` can stream.

    Returns:
        A decorator. Its result behaves as the original, and raises ValueError on a hyperparameter out of range.
    """
    papers = (paper,) if isinstance(paper, str) else tuple(paper)

    def register(obj: Callable) -> Callable:
        function = obj.__init__ if inspect.isclass(obj) else obj
        schema = functools.cache(lambda: hyperparameters(obj))

        @functools.wraps(function)
        def checked(*args, **kwargs):
            validate(schema(), {name: kwargs[name] for name in kwargs if name in schema()})
            return function(*args, **kwargs)

        if inspect.isclass(obj):
            obj.__init__ = checked
            checked = obj
        _methods[obj.__name__] = Method(obj.__name__, family, papers, checked, statistics)
        return checked

    return register


def methods() -> dict[str, Method]:
    """Every method of the kit by name; imports all rooms."""
    for room in ROOMS:
        if resources.files("notebook_kit").joinpath(room, "__init__.py").is_file():
            importlib.import_module(f"notebook_kit.{room}")
    return dict(sorted(_methods.items(), key=lambda item: (ROOMS.index(item[1].family), item[0].lower())))


def entry_of(obj: Callable) -> Method | None:
    """The entry of a registered function or class, None for any other; imports nothing, unlike `methods`."""
    entry = _methods.get(getattr(obj, "__name__", ""))
    return entry if entry is not None and inspect.unwrap(entry.object) is inspect.unwrap(obj) else None


@functools.cache
def papers() -> dict[str, dict]:
    """papers.toml: slug to title, authors, year, arxiv, venue, code."""
    return tomllib.loads(resources.files("notebook_kit").joinpath("papers.toml").read_text("utf-8"))


def catalog():
    """List every method of the kit.

    Returns:
        DataFrame: one row a method: name, family, what it does, paper, year, arxiv, hyperparameters.
    """
    import pandas as pd

    rows = []
    for entry in methods().values():
        sources = [papers()[slug] for slug in entry.papers]
        rows.append(
            {
                "name": entry.name,
                "family": entry.family,
                "summary": (inspect.getdoc(entry.object) or "").split("\n")[0],
                "paper": "; ".join(source["title"] for source in sources),
                "year": min(source["year"] for source in sources),
                "arxiv": ", ".join(source["arxiv"] for source in sources if source.get("arxiv")),
                "hyperparameters": ", ".join(hyperparameters(entry.object)),
            }
        )
    return pd.DataFrame(rows, columns=["name", "family", "summary", "paper", "year", "arxiv", "hyperparameters"])


def cite(name: str | Callable) -> str:
    """Give the BibTeX of the papers behind a method.

    Args:
        name: a method, its name, or a paper's slug.

    Returns:
        One BibTeX entry for each paper.

    Raises:
        ValueError: nothing by that name; the nearest names are given.
    """
    key = name if isinstance(name, str) else getattr(name, "__name__", str(name))
    if key in papers():
        return _bibtex(key)
    known = _methods if key in _methods else methods()  # all rooms are imported only to look for it
    if key not in known:
        near = difflib.get_close_matches(key, [*known, *papers()], n=3)
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise ValueError(f"no method or paper is called {key!r}{hint}")
    return "\n\n".join(_bibtex(slug) for slug in known[key].papers)


def _bibtex(slug: str) -> str:
    paper = papers()[slug]
    fields = {"title": "{" + paper["title"] + "}", "author": " and ".join(paper["authors"]), "year": paper["year"]}
    if paper.get("venue"):
        fields["booktitle"] = paper["venue"]
    if paper.get("arxiv"):
        fields |= {"eprint": paper["arxiv"], "archiveprefix": "arXiv"}
    body = ",\n".join(f"  {field} = {{{value}}}" for field, value in fields.items())
    return f"@{'inproceedings' if paper.get('venue') else 'misc'}{{{slug},\n{body}\n}}"
