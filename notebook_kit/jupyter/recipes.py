"""Recipes: what to merge, how, and where to, in a TOML of the kit or a YAML of mergekit."""

import difflib
import inspect
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from notebook_kit.checkpoints import Checkpoint
from notebook_kit.diagnostics.merges import known_merges
from notebook_kit.hyperparameters import hyperparameters, validate

KEYS = ("method", "base", "experts", "out", "dtype", "hyperparameters", "arguments")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True)
class Recipe:
    """A merge, ready to run.

    Args:
        method: its name.
        function: called as `function(base, experts, **values, **data)`.
        values: hyperparameters.
        data: arguments read from disk, tensor by tensor.
        base: path of the base.
        experts: paths of experts.
        out: path to write; None if the recipe names none.
        read_as: dtype that floating tensors are cast to when read (mergekit's `dtype`); None leaves them.
        write_as: dtype of the result's floating tensors; None is base's, as read.
        notes: what the reader should know.
        source: the recipe file.
    """

    method: str
    function: Callable
    values: dict[str, object]
    data: dict[str, object]
    base: Path
    experts: tuple[Path, ...]
    out: Path | None
    read_as: torch.dtype | None
    write_as: torch.dtype | None
    notes: tuple[str, ...]
    source: Path


def read_recipe(path: str | Path, out: str | Path | None = None) -> Recipe:
    """Read a recipe; nothing but the recipe file is opened, except data named under [arguments].

    Args:
        path: a .toml, .yml or .yaml file.
        out: where to write; overrules the recipe.

    Raises:
        FileNotFoundError: the recipe, or a path in it, is not there.
        ValueError: a key that is unknown, missing or wrong; the text names file and key.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no recipe at {path}")
    if path.suffix not in (".toml", ".yml", ".yaml"):
        raise ValueError(
            f"{path}: a recipe is a .toml file, or mergekit's .yml or .yaml, got {path.suffix or 'none'!r}"
        )
    try:
        read = _from_toml if path.suffix == ".toml" else _from_yaml
        return read(path, None if out is None else Path(out))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


def _from_toml(path: Path, out: Path | None) -> Recipe:
    recipe = tomllib.loads(path.read_text("utf-8"))
    for key in recipe:
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1)
            raise ValueError(
                f"unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else f"; there are {KEYS}")
            )
    for key, kind in (("method", str), ("base", str), ("experts", list)):
        if not isinstance(recipe.get(key), kind) or not recipe[key]:
            raise ValueError(f"{key} is missing, or no {'text' if kind is str else 'list of paths'}")
    if not all(isinstance(expert, str) for expert in recipe["experts"]):
        raise ValueError("experts must be a list of paths")
    known = known_merges()
    name = recipe["method"]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        raise ValueError(f"method {name!r} is none of the kit's; {'near it' if near else 'there are'}: "
                         f"{', '.join(near or known)}")  # fmt: skip
    values, given = (dict(recipe.get(key, {})) for key in ("hyperparameters", "arguments"))
    schema = hyperparameters(known[name])
    validate(schema, {key: value for key, value in values.items() if key in schema})
    parameters = inspect.signature(known[name]).parameters
    for key in [*values, *given]:
        if key not in list(parameters)[2:]:
            near = difflib.get_close_matches(key, list(parameters)[2:], n=1)
            raise ValueError(f"{name} has no argument {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    lacking = [
        key
        for key, p in parameters.items()
        if p.kind is p.KEYWORD_ONLY and p.default is p.empty and key not in {*values, *given}
    ]
    if lacking:
        why = "files go under [arguments]; with a model or a score call it from Python"
        raise ValueError(f"{name} needs {', '.join(lacking)}: {why}")
    folder = path.absolute().parent
    return Recipe(
        method=name,
        function=known[name],
        values=values,
        data={key: _data(key, value, folder) for key, value in given.items()},
        base=_input(recipe["base"], folder, "base"),
        experts=tuple(_input(expert, folder, f"experts[{i}]") for i, expert in enumerate(recipe["experts"])),
        out=_out(recipe.get("out"), folder, out),
        read_as=None,
        write_as=_dtype(recipe.get("dtype"), "dtype"),
        notes=(),
        source=path,
    )


def _from_yaml(path: Path, out: Path | None) -> Recipe:
    import yaml

    from notebook_kit.jupyter.mergekit import translate

    try:
        config = yaml.safe_load(path.read_text("utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"not a YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(config, Mapping):
        raise ValueError(f"expected mergekit's keys, got {type(config).__name__}")
    found = translate(config)
    folder = path.absolute().parent
    experts = []
    for expert in found.experts:
        model, plus, adapter = expert.partition("+")  # mergekit's "model+adapter"
        if plus and model != found.base:
            raise ValueError(f"models: {expert!r} puts an adapter on another model than base_model {found.base!r}")
        experts.append(_input(adapter or model, folder, "models"))
    read_as = _dtype(found.dtype, "dtype")
    return Recipe(
        method=found.method,
        function=found.function,
        values=found.values,
        data={},
        base=_input(found.base, folder, "base_model"),
        experts=tuple(experts),
        out=_out(None, folder, out),
        read_as=read_as,
        write_as=_dtype(found.out_dtype, "out_dtype") or read_as,
        notes=found.notes,
        source=path,
    )


def _input(text: str, folder: Path, key: str) -> Path:
    """A path beside the recipe, or from here."""
    for path in (folder / text, Path(text)):
        if path.exists():
            return path
    raise FileNotFoundError(f"{key}: nothing at {text!r}, neither beside the recipe nor from here; names on a hub are "
                            "not fetched")  # fmt: skip


def _out(text: object, folder: Path, given: Path | None) -> Path | None:
    if given is not None:
        return given
    if text is None:
        return None
    if not isinstance(text, str):
        raise ValueError(f"out must be a path, got {text!r}")
    return folder / text


def _dtype(text: object, key: str) -> torch.dtype | None:
    if text is None:
        return None
    if text not in DTYPES:
        raise ValueError(f"{key} must be one of {', '.join(DTYPES)}, got {text!r}")
    return DTYPES[text]


def _data(key: str, value: object, folder: Path) -> object:
    paths = value if isinstance(value, list) else [value]
    if not all(isinstance(path, str) for path in paths):
        raise ValueError(f"arguments.{key} must be a path or a list of paths; numbers go under [hyperparameters]")
    opened = [Checkpoint(_input(path, folder, f"arguments.{key}")) for path in paths]
    return opened if isinstance(value, list) else opened[0]
