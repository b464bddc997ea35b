"""Hyperparameters, declared once in a signature: sliders, sweeps, the catalogue and input checks read them here.

    def ties(base, experts, *, density: Annotated[float, Range(0, 1)] = 0.2): ...

`hyperparameters(ties)` reads that line back; `validate` holds values against it.
"""

import difflib
import inspect
import math
import numbers
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Range:
    """The closed interval of a numeric hyperparameter, with a slider's step and scale."""

    low: float
    high: float
    step: float | None = None
    log: bool = False

    def __post_init__(self):
        if not self.low <= self.high:
            raise ValueError(f"Range needs low <= high, got {self.low} and {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"Range on a log scale needs low > 0, got {self.low}")


@dataclass(frozen=True, init=False)
class Choice:
    """The finite set of values of a hyperparameter."""

    options: tuple

    def __init__(self, *options):
        if not options:
            raise ValueError("Choice needs at least one option")
        object.__setattr__(self, "options", options)


@dataclass(frozen=True)
class Hyperparameter:
    """One row of a schema; `kind` is "float", "int", "bool" or "choice"."""

    name: str
    kind: str
    default: object
    low: float | None = None
    high: float | None = None
    step: float | None = None
    options: tuple = ()
    help: str = ""
    log: bool = False

    def check(self, value, owner: str = "") -> None:
        """Raise ValueError unless `value` is admissible (None is, where it is the default)."""
        if value is None and self.default is None:
            return
        suffix = f" ({owner})" if owner else ""
        if self.kind == "choice":
            # True == 1 in Python; here they are different words.
            if not any(value == option and type(value) is type(option) for option in self.options):
                options = ", ".join(map(repr, self.options))
                raise ValueError(f"{self.name} must be one of {options}, got {value!r}{suffix}")
            return
        if self.kind == "bool":
            if not isinstance(value, bool):
                raise ValueError(f"{self.name} must be True or False, got {value!r}{suffix}")
            return
        expected = f"in [{_short(self.low)}, {_short(self.high)}]"
        number = numbers.Integral if self.kind == "int" else numbers.Real
        if isinstance(value, bool) or not isinstance(value, number):
            noun = "an integer" if self.kind == "int" else "a number"
            raise ValueError(f"{self.name} must be {noun} {expected}, got {value!r}{suffix}")
        if math.isnan(value) or not self.low <= value <= self.high:
            raise ValueError(f"{self.name} must be {expected}, got {value}{suffix}")


class Schema(dict[str, Hyperparameter]):
    """`dict[name, Hyperparameter]` that remembers whose it is, for error texts."""

    owner: str = ""


def hyperparameters(obj: Callable) -> Schema:
    """Read the hyperparameters that a function or class declares in its signature.

    Args:
        obj: a function, a class (its `__init__` counts) or a callable object. A parameter counts when it is
            annotated with `Annotated[type, Range(...)]` or `Annotated[type, Choice(...)]`, or is a `bool`
            with a default.

    Returns:
        Schema: name to `Hyperparameter`, in the order of the signature; help from the docstring's Args.
    """
    function = inspect.unwrap(obj.__init__ if inspect.isclass(obj) else obj)
    if not inspect.isroutine(function):
        function = inspect.unwrap(type(obj).__call__)
    hints = typing.get_type_hints(function, include_extras=True)
    helps = _args_of(f"{inspect.getdoc(obj) or ''}\n{inspect.getdoc(function) or ''}")
    schema = Schema()
    schema.owner = getattr(obj, "__name__", type(obj).__name__)
    for name, parameter in inspect.signature(function).parameters.items():
        row = _read(name, hints.get(name), parameter.default, helps.get(name, ""))
        if row is not None:
            schema[name] = row
    return schema


def validate(schema: Mapping[str, Hyperparameter], values: Mapping[str, object]) -> None:
    """Hold values against a schema.

    Args:
        schema: what `hyperparameters` returned.
        values: hyperparameters by name; those left out keep their defaults.

    Raises:
        ValueError: a value is out of range, or a name is unknown; the text names it, what was expected, what came.
    """
    owner = getattr(schema, "owner", "")
    for name, value in values.items():
        if name not in schema:
            near = difflib.get_close_matches(name, schema, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{owner or 'schema'} has no hyperparameter {name!r}, only {', '.join(schema)}{hint}")
        schema[name].check(value, owner)


def _read(name: str, hint, default, text: str) -> Hyperparameter | None:
    default = None if default is inspect.Parameter.empty else default
    if hint is bool and isinstance(default, bool):
        return Hyperparameter(name, "bool", default, options=(False, True), help=text)
    for mark in getattr(hint, "__metadata__", ()):
        if isinstance(mark, Choice):
            return Hyperparameter(name, "choice", default, options=mark.options, help=text)
        if isinstance(mark, Range):
            kind = "int" if int in (hint.__origin__, *typing.get_args(hint.__origin__)) else "float"
            step = mark.step or (1 if kind == "int" else None)
            return Hyperparameter(name, kind, default, mark.low, mark.high, step, help=text, log=mark.log)
    return None


def _args_of(docstring: str) -> dict[str, str]:
    """The entries of a Google-style Args block, continuation lines joined."""
    helps, name, indent = {}, None, None
    inside = False
    for line in docstring.splitlines():
        if line.strip() in ("Args:", "Arguments:"):
            inside, indent = True, None
            continue
        if inside and line.strip():
            depth = len(line) - len(line.lstrip())
            if depth == 0:
                inside = False
                continue
            indent = depth if indent is None else indent
            entry = re.match(r"\s*\*{0,2}(\w+)\s*(?:\([^)]*\))?:\s*(.*)", line)
            if depth == indent and entry:
                name = entry[1]
                helps[name] = entry[2].strip()
            elif name:
                helps[name] += " " + line.strip()
    return helps


def _short(number: float) -> str:
    return f"{number:g}" if isinstance(number, float) else str(number)
