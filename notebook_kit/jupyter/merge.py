"""`notebook-kit merge`: a recipe, its plan and price, and the merge on disk, tensor by tensor."""

import copy
import inspect
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from notebook_kit.adapters.merged import add_delta
from notebook_kit.adapters.read import AdapterFactors, is_adapter_folder, read_adapter
from notebook_kit.catalog import entry_of
from notebook_kit.checkpoints import INDEX, Checkpoint, TensorWriter, atomic
from notebook_kit.jupyter.recipes import Recipe, read_recipe
from notebook_kit.weights import SHOWN, IncompatibleWeights, Weights, check_out, copy_small_files, preflight

SORTING = 24  # bytes an entry: magnitudes, their order as int64, and torch's own copies
PROBE = 4_000_000  # entries of the tensors that a plan times


class View(Checkpoint):
    """A checkpoint as a recipe sees it: cast, and with a LoRA adapter's change added, while a tensor is read.

    Args:
        path: of the checkpoint.
        dtype: what floating tensors are cast to; None leaves them.
        adapter: what is added to it.
    """

    def __init__(self, path: Path, dtype: torch.dtype | None = None, adapter: AdapterFactors | None = None):
        super().__init__(path)
        self.dtype, self.adapter, self.bytes_read = dtype, adapter, 0
        self.changes: dict[str, tuple[Tensor, Tensor]] = {}
        if adapter is not None:
            self.changes = adapter.keys_in(self)

    def __getitem__(self, name: str) -> Tensor:
        tensor = super().__getitem__(name)
        self.bytes_read += tensor.nbytes
        if name in self.changes:
            tensor = add_delta(tensor, *self.changes[name], self.adapter.fan_in_fan_out)
        return tensor.to(self.dtype) if self.dtype is not None and tensor.is_floating_point() else tensor

    def spec(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every tensor, as it is given out."""
        return {name: (shape, _cast(dtype, self.dtype)) for name, (shape, dtype) in super().spec().items()}

    @property
    def bytes(self) -> int:
        """What its tensors take on disk."""
        return sum(_bytes(*value) for value in super().spec().values())

    def only(self, names: Sequence[str]) -> "View":
        """The same, with some of its tensors only; counts the bytes read through it."""
        part = copy.copy(self)
        part._entries, part.bytes_read = {name: self._entries[name] for name in names}, 0
        return part


@dataclass(frozen=True)
class Plan:
    """What a recipe would do, and what it would cost; `print` it.

    Args:
        recipe: the recipe.
        table: one row a tensor, as `preflight` gives it.
        bytes_read: every pass over the files counted, as measured on a few tensors.
        bytes_written: of the result's tensors.
        peak_bytes: estimated for the work on the largest tensor; what a method keeps of the whole model comes on top.
        seconds: estimated from a few tensors; NaN where the models do not fit.
        problems: what would stop the merge.
    """

    recipe: Recipe
    table: object = field(repr=False)
    bytes_read: int
    bytes_written: int
    peak_bytes: int
    seconds: float
    problems: tuple[str, ...] = ()

    def __str__(self):
        recipe, verdicts = self.recipe, self.table["verdict"]
        values = ", ".join(
            f"{name}={value!r}" for name, value in {**recipe.values, **dict.fromkeys(recipe.data, "...")}.items()
        )
        lines = [
            f"method    {recipe.method}({values})",
            f"base      {recipe.base}",
            *(f"expert    {path}{'  (LoRA on base)' if is_adapter_folder(path) else ''}" for path in recipe.experts),
            f"out       {recipe.out or 'not named: give --out'}",
            f"tensors   {(verdicts == 'merge').sum()} merged, {(verdicts == 'copy from base').sum()} copied from base",
            f"disk      {_size(self.bytes_read)} read, {_size(self.bytes_written)} written",
            f"memory    about {_size(self.peak_bytes)} for the largest tensor"
            + (", and what the survey of the whole model keeps" if _statistics(recipe) else ""),
            f"time      about {_duration(self.seconds)}",
            *(f"note      {note}" for note in recipe.notes),
            *(f"problem   {problem}" for problem in self.problems),
        ]
        return "\n".join(lines)


def plan_merge(recipe: Recipe) -> Plan:
    """Say what a recipe would do: headers are read, a few tensors are merged to measure the pace, nothing is written.

    Args:
        recipe: from `read_recipe`.

    Raises:
        BadCheckpoint: a file is damaged.
    """
    base, experts = _open(recipe)
    table = preflight(base, experts, names=_names(recipe))
    errors = table[table["verdict"].str.startswith("error: ")]
    problems = [f"{row.tensor}: {row.verdict[7:]}" for row in errors.itertuples()]
    if recipe.out is not None:
        problems += _complaint(lambda: check_out(recipe.base, [base, *experts], recipe.out))
    spec = {key: value for key, value in base.spec().items() if value[1].is_floating_point}
    written = sum(_bytes(shape, _cast(dtype, recipe.write_as)) for shape, dtype in base.spec().values())
    largest = max((_bytes(shape, torch.int8) for shape, _ in spec.values()), default=0)
    stored = sum(max((dtype.itemsize for _, dtype in view.spec().values()), default=4) for view in (base, *experts))
    # The tensors as stored; in float32 the base, each task vector, their stack, the result; what sorting one takes.
    peak = largest * (stored + 4 * (2 * len(experts) + 3) + SORTING)
    seconds, passes = float("nan"), 1.0
    if errors.empty and spec:
        try:
            pace, passes = _probe(recipe, base, experts, spec)
            seconds = pace * base.bytes
        except (ValueError, TypeError, KeyError) as error:
            problems.append(" ".join(str(error).split()))
    n_read = int(passes * sum(view.bytes for view in (base, *experts)))
    return Plan(recipe, table, n_read, written, peak, seconds, tuple(problems))


def run_merge(recipe: Recipe, *, progress: bool = True) -> Path:
    """Merge as a recipe says, one tensor in memory at a time; the result appears only when it is complete.

    Args:
        recipe: from `read_recipe`.
        progress: show a bar.

    Returns:
        The path written: a file, or a folder with base's small files, sharded like base, and the recipe in it.

    Raises:
        IncompatibleWeights: the models do not fit each other; nothing is written.
        ValueError: no place to write is named, or what the method raises; FileExistsError: the place is taken.
    """
    from tqdm.auto import tqdm

    if recipe.out is None:
        raise ValueError(f"{recipe.source} names no `out`: give --out")
    base, experts = _open(recipe)
    check_out(recipe.base, [base, *experts], recipe.out)
    _check_fit(preflight(base, experts, names=_names(recipe)))
    arguments = _arguments(recipe, base, experts)
    spec = {key: (shape, _cast(dtype, recipe.write_as)) for key, (shape, dtype) in base.spec().items()}
    with atomic(recipe.out) as partial:
        if recipe.base.is_dir():
            partial.mkdir()
            copy_small_files(recipe.base, partial)
            _tell_dtype(partial, recipe.write_as, sum(_bytes(*value) for value in spec.values()))
            shutil.copyfile(recipe.source, partial / f"merge_recipe{recipe.source.suffix}")
        with tqdm(total=len(base), desc=f"merging with {recipe.method}", unit="tensor", disable=not progress) as bar:
            for file in base.files:
                keys = [key for key in base if base.file_of(key) == file]
                target = partial / file.name if recipe.base.is_dir() else partial
                with TensorWriter(target, {key: spec[key] for key in keys}) as writer:
                    for key in keys:
                        writer.write(key, _merge_one(recipe, key, base, experts, arguments).to(spec[key][1]))
                        bar.update()
    return recipe.out


def merge_recipe(path: str | Path, *, out: str | Path | None = None, dry_run: bool = False, progress: bool = True):
    """Run a recipe file, or say what it would do.

    Args:
        path: .toml, or mergekit's .yml or .yaml.
        out: where to write; overrules the recipe.
        dry_run: return the plan and write nothing.
        progress: show a bar.

    Returns:
        The path written, or the `Plan`.

    Raises:
        ValueError, FileNotFoundError, FileExistsError, IncompatibleWeights: as `read_recipe` and `run_merge`.
    """
    recipe = read_recipe(path, out)
    return plan_merge(recipe) if dry_run else run_merge(recipe, progress=progress)


def _open(recipe: Recipe) -> tuple[View, list[View]]:
    base = View(recipe.base, recipe.read_as)
    experts = [
        View(recipe.base, recipe.read_as, read_adapter(path)) if is_adapter_folder(path) else View(path, recipe.read_as)
        for path in recipe.experts
    ]
    return base, experts


def _names(recipe: Recipe) -> list[str]:
    return [f"experts[{i}] ({path.name})" for i, path in enumerate(recipe.experts)]


def _statistics(recipe: Recipe) -> Callable | None:
    entry = entry_of(recipe.function)
    return entry.statistics if entry is not None else None


def _arguments(recipe: Recipe, base: Weights, experts: Sequence[Weights]) -> dict[str, object]:
    """The method's arguments, with what it must know of the whole model."""
    arguments = {**recipe.values, **recipe.data}
    inspect.signature(recipe.function).bind({}, [], **arguments)
    statistics = _statistics(recipe)
    return arguments | (statistics(base, experts, **arguments) if statistics is not None else {})


def _merge_one(recipe: Recipe, key: str, base: Weights, experts: Sequence[Weights], arguments: Mapping) -> Tensor:
    one = {name: _only(key, arguments[name]) if name in recipe.data else arguments[name] for name in arguments}
    merged = recipe.function({key: base[key]}, [{key: expert[key]} for expert in experts], **one)
    if not isinstance(merged, Mapping):
        raise ValueError(f"{recipe.method} makes {type(merged).__name__}, not one model: call it from Python")
    return merged[key]


def _only(key: str, data: object) -> object:
    """State dicts on disk, cut down to one tensor."""
    if isinstance(data, list):
        return [_only(key, each) for each in data]
    return {key: data[key]} if key in data else {}


def _probe(recipe: Recipe, base: View, experts: Sequence[View], spec: Mapping) -> tuple[float, float]:
    """Merge a few tensors: seconds a byte of the base, and how often a byte of the models is read."""
    chosen, entries = [], 0
    for key, (shape, _) in sorted(spec.items(), key=lambda item: -_bytes(item[1][0], torch.int8)):
        size = _bytes(shape, torch.int8)
        if entries + size <= PROBE or not chosen:
            chosen.append(key)
            entries += size
    part, parts = base.only(chosen), [expert.only(chosen) for expert in experts]
    started = time.perf_counter()
    arguments = _arguments(recipe, part, parts)
    for key in chosen:
        _merge_one(recipe, key, part, parts, arguments)
    seconds = time.perf_counter() - started
    read, whole = (sum(getattr(view, name) for view in (part, *parts)) for name in ("bytes_read", "bytes"))
    return seconds / max(part.bytes, 1), read / max(whole, 1)


def _check_fit(table) -> None:
    errors = table[table["verdict"].str.startswith("error: ")]
    if not errors.empty:
        lines = [f"{row.tensor!r}: {row.verdict[7:]}" for row in errors.head(SHOWN).itertuples()]
        more = f"\n  and {len(errors) - SHOWN} more" if len(errors) > SHOWN else ""
        listing = "\n  ".join(lines)
        raise IncompatibleWeights(f"{len(errors)} of {len(table)} tensors cannot be merged:\n  {listing}{more}")


def _tell_dtype(folder: Path, dtype: torch.dtype | None, total: int) -> None:
    """config.json and the shards' index say what the result is, not what base was."""
    if dtype is None:
        return
    config, index = folder / "config.json", folder / INDEX
    if config.is_file():
        values = json.loads(config.read_text("utf-8"))
        for key in {"dtype", "torch_dtype"} & set(values) or {"dtype"}:
            values[key] = str(dtype).removeprefix("torch.")
        config.write_text(json.dumps(values, indent=2) + "\n", "utf-8")
    if index.is_file():
        values = json.loads(index.read_text("utf-8"))
        values["metadata"] = {**values.get("metadata", {}), "total_size": total}
        index.write_text(json.dumps(values, indent=2) + "\n", "utf-8")


def _complaint(check: Callable[[], None]) -> list[str]:
    try:
        check()
    except OSError as error:
        return [str(error)]
    return []


def _cast(dtype: torch.dtype, to: torch.dtype | None) -> torch.dtype:
    return to if to is not None and dtype.is_floating_point else dtype


def _bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    count = dtype.itemsize
    for length in shape:
        count *= length
    return count


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def _duration(seconds: float) -> str:
    if seconds != seconds:
        return "(not measured)"
    if seconds < 90:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
