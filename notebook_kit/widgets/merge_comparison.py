"""compare_merges: many merging methods on the same models, each tuned by a sweep; one table, one picture."""

import difflib
import functools
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from notebook_kit.adapters.merged import adapter_on
from notebook_kit.adapters.read import is_adapter_folder
from notebook_kit.diagnostics.merges import known_merges, needs_no_data
from notebook_kit.figures.comparison import MEAN, comparison_view, tasks_of
from notebook_kit.hyperparameters import Choice, Hyperparameter, hyperparameters
from notebook_kit.weights import Weights, check, load
from notebook_kit.widgets.explorer import Explorer
from notebook_kit.widgets.sweeps import SweepResult, sweep

Model = Weights | str | Path
Entry = Callable | str | tuple[Callable | str, Mapping[str, Sequence]]
EXPERTS = "best expert, task by task"
# What a default grid tries, in this order, two of them at most.
TRIED = ("scale", "density", "t", "eta", "gamma", "epsilon", "ridge")
PLACES = {"density": (0.2, 0.5, 0.8), "t": (0.25, 0.5, 0.75)}
# Of the default; others a tenth of it, and ten times.
FACTORS = {"scale": (1 / 3, 0.5, 2 / 3, 1.0, 1.5, 3.0), "eta": (0.5, 1.0, 2.0, 4.0)}


@dataclass(frozen=True)
class MergeComparison:
    """What `compare_merges` found; shows itself as the picture with controls.

    Args:
        frame: a row a model: model, kind, score, tasks, tuned (the score it was chosen by), settings, seconds, problem.
        best: method to its best hyperparameters, ready to pass on.
        sweeps: method to the sweep that found them.
        errors: method to the exception that ended it.
        unit: what the score measures.
    """

    frame: object
    best: dict[str, dict[str, object]]
    sweeps: dict[str, SweepResult] = field(default_factory=dict, repr=False)
    errors: dict[str, Exception] = field(default_factory=dict, repr=False)
    unit: str = "score"
    calls: dict[str, Callable[[], dict[str, Tensor]]] = field(default_factory=dict, repr=False)

    @property
    def table(self):
        """The frame to read: models as rows, best methods first, figures rounded."""
        order = {"reference": 0, "experts": 1, "base": 2, "method": 3, "expert": 4}
        frame = self.frame.assign(order=self.frame["kind"].map(order))
        frame = frame.sort_values(["order", "score"], ascending=[True, False], kind="stable").set_index("model")
        columns = ["score", *tasks_of(self.frame), "tuned", "settings", "seconds", "problem"]
        return frame[frame["kind"] != "expert"][columns].round(3)

    @property
    def winner(self) -> str:
        """The method with the highest score."""
        rows = self.frame[(self.frame["kind"] == "method") & self.frame["score"].notna()]
        if rows.empty:
            raise ValueError("no method has a score; the column `problem` of the table says why")
        return rows.loc[rows["score"].idxmax(), "model"]

    @property
    def figure(self):
        """Each method's score against base, experts and reference."""
        return comparison_view(self.frame, unit=self.unit)

    def merge(self, name: str | None = None) -> dict[str, Tensor]:
        """Merge again by one method, with its best hyperparameters.

        Args:
            name: of the method; None is the winner.
        """
        name = self.winner if name is None else name
        if name not in self.calls:
            raise ValueError(f"{name!r} has no result here; these have: {', '.join(self.calls) or 'none'}")
        return self.calls[name]()

    def widget(self) -> Explorer:
        """The picture with controls: dots or map, which task."""
        limits = {"task": Choice(MEAN, *tasks_of(self.frame))}
        return Explorer(comparison_view, self.frame, limits=limits, unit=self.unit)

    def to_html(self, path: str | Path) -> Path:
        """Write a stand-alone page of `widget()`, with both pictures and every task."""
        return self.widget().to_html(path, vary=["picture", "task"])

    def __repr__(self):
        rows = self.frame[self.frame["kind"] == "method"]
        failed = int(rows["score"].isna().sum())
        text = f"{len(rows)} methods" + (f", {failed} without a score" if failed else "")
        if failed == len(rows):
            return f"MergeComparison({text})"
        score = rows.loc[rows["score"].idxmax(), "score"]
        return f"MergeComparison({text}; best {self.winner}: {score:.3f})"

    def _repr_mimebundle_(self, **kwargs):
        if len(self.errors) == (self.frame["kind"] == "method").sum():  # nothing to draw
            return {"text/plain": repr(self), "text/html": self.table.to_html(escape=True)}
        return self.widget()._repr_mimebundle_(**kwargs)


def compare_merges(
    base: Model,
    experts: Sequence[Model],
    methods: Sequence[Entry] | Mapping[str, Entry] | None = None,
    *,
    score: Callable[[Weights], float],
    tune: Callable[[Weights], float] | None = None,
    arguments: Mapping[str, Mapping[str, object]] | None = None,
    reference: Model | float | None = None,
    names: Sequence[str] | None = None,
    executor: object = None,
    progress: bool = True,
) -> MergeComparison:
    """Compare merging methods: each is tuned by a sweep, then scored once, beside base, experts and a reference.

    Args:
        base: state dict θ₀, or the path of a checkpoint.
        experts: state dicts, paths of checkpoints, or peft LoRA folders (as full weights: base + ΔW).
        methods: functions or names ("ties"), each alone, with a grid (`(ties, {"density": [0.2, 0.5]})`) or as
            `functools.partial` with arguments of its own; a mapping gives them labels. An empty grid tunes nothing.
            None: every merge of the kit that needs no data. Without a grid, `default_grid` gives one.
        score: weights to a number, higher is better; reported, so give it data that nothing was chosen on. With
            `.tasks`, each task gets a column.
        tune: what the hyperparameters are chosen by, such as `partial(bed.score, split="val")`; None uses `score`,
            whose figures are then too good.
        arguments: method's label to more of its arguments, such as `{"fisher": {"fishers": fishers}}`. A method that
            must have a `score` gets `tune`.
        reference: weights of a model trained on all tasks, or its score.
        names: of the experts.
        executor: of the sweeps: any `concurrent.futures.Executor`, or a Dask client.
        progress: show a bar.

    Returns:
        MergeComparison: `.table`, `.frame`, `.best`, `.winner`, `.figure`, `.widget()`, `.merge(name)`,
        `.to_html(path)`. A method that lacks its data, or fails, says why in the column `problem`; the others go on.

    Raises:
        ValueError: an unknown method, arguments for a method that is not compared, or no method at all.
        IncompatibleWeights: the models do not fit each other.
    """
    import pandas as pd
    from tqdm.auto import tqdm

    base, experts = _models(base, experts)
    chosen = _chosen(methods, dict(arguments or {}), tune or score)
    labels = list(names) if names is not None else [f"expert {i}" for i in range(len(experts))]
    check(base, experts, names=labels)
    rows, unit = _anchors(base, experts, labels, score, reference)
    best, sweeps, errors, calls = {}, {}, {}, {}
    bar = tqdm(total=sum(each.size for each in chosen.values()), unit="setting", disable=not progress)
    with bar:
        for label, each in chosen.items():
            bar.set_description(f"comparing {label}")
            started, row = time.perf_counter(), {"model": label, "kind": "method", "settings": "", "problem": ""}
            try:
                best[label], tuned = each.tuned(base, experts, tune or score, executor, sweeps)
                merged = each.run(base, experts, best[label]) if tuned is None else tuned[1]
                value = score(merged)
                row |= _figures(value)
                row["tuned"] = float(sweeps[label].frame["score"].max()) if label in sweeps else float(tuned[0])
                row["settings"] = ", ".join(f"{name}={_short(value)}" for name, value in best[label].items())
                calls[label] = functools.partial(each.run, base, experts, best[label])
            except Exception as error:  # one method's trouble must not lose the others' results
                best.pop(label, None)
                errors[label] = error
                text = str(error) if isinstance(error, _Lacks) else f"{type(error).__name__}: {error}"
                row["problem"] = " ".join(text.split())
            row["seconds"] = time.perf_counter() - started
            rows.append(row)
            bar.update(each.size)
    tasks = list(dict.fromkeys(name for row in rows for name in row.get("tasks", ())))
    flat = [{**row, **{name: row.get("tasks", {}).get(name) for name in tasks}} for row in rows]
    columns = ["model", "kind", "score", *tasks, "tuned", "settings", "seconds", "problem"]
    frame = pd.DataFrame(flat, columns=columns)
    frame[["score", *tasks, "tuned"]] = frame[["score", *tasks, "tuned"]].astype(float)
    frame[["settings", "problem"]] = frame[["settings", "problem"]].fillna("")
    return MergeComparison(frame, best, sweeps, errors, unit, calls)


def default_grid(fn: Callable, fixed: Mapping[str, object] | None = None) -> dict[str, list]:
    """Give a small grid from a method's annotations: two hyperparameters at most, `scale` and `density` first.

    Args:
        fn: a method.
        fixed: arguments that are given, and so not varied.

    Returns:
        Hyperparameter to a few values within its range, the default among them; empty if there is nothing to try.
    """
    schema = hyperparameters(fn)
    names = [name for name in TRIED if name in schema and name not in (fixed or {})]
    names = [name for name in names if schema[name].kind == "float" and schema[name].default is not None]
    return {name: _values(schema[name]) for name in names[:2]}


def _values(row: Hyperparameter) -> list[float]:
    default = float(row.default)
    values = PLACES.get(row.name) or [default * factor for factor in FACTORS.get(row.name, (0.1, 1.0, 10.0))]
    inside = {round(value, 4) for value in values if row.low <= value <= row.high}
    return sorted(inside | {default})


class _Lacks(ValueError):
    """A method's needed data is not there."""


@dataclass(frozen=True)
class _Chosen:
    """One method of the comparison: the function, its fixed arguments, its grid."""

    label: str
    fn: Callable
    fixed: dict[str, object]
    grid: dict[str, Sequence]

    @property
    def size(self) -> int:
        return functools.reduce(lambda n, values: n * len(values), self.grid.values(), 1)

    def run(self, base: Weights, experts: Sequence[Weights], values: Mapping) -> dict[str, Tensor]:
        return self.fn(base, experts, **{**self.fixed, **values})

    def tuned(self, base, experts, tune, executor, sweeps: dict) -> tuple[dict, tuple | None]:
        """The best values; where there was nothing to choose also (what `tune` says, the merged weights)."""
        lacking = [
            name
            for name, parameter in inspect.signature(self.fn).parameters.items()
            if parameter.kind is parameter.KEYWORD_ONLY
            and parameter.default is parameter.empty
            and name not in {*self.fixed, *self.grid}
        ]
        if lacking:
            raise _Lacks(f"needs {', '.join(lacking)}: give arguments={{{self.label!r}: {{{lacking[0]!r}: ...}}}}")
        if not self.grid:
            merged = self.run(base, experts, {})
            return {}, (tune(merged), merged)
        found = sweep(
            self.fn, base, experts, grid=self.grid, score=tune, executor=executor, progress=False, **self.fixed
        )
        sweeps[self.label] = found
        return found.best, None


def _chosen(methods, arguments: dict, tune: Callable) -> dict[str, _Chosen]:
    known = known_merges()
    if methods is None:
        methods = [fn for fn in known.values() if needs_no_data(fn)]
    pairs = list(methods.items()) if isinstance(methods, Mapping) else [(None, entry) for entry in methods]
    if not pairs:
        raise ValueError("methods must name at least one method, got none")
    chosen: dict[str, _Chosen] = {}
    for label, entry in pairs:
        grid = None
        if isinstance(entry, tuple):
            entry, grid = entry
        fixed: dict[str, object] = {}
        if isinstance(entry, functools.partial):
            if entry.args:
                raise ValueError("a partial method may fix named arguments only; base and experts are given to it")
            entry, fixed = entry.func, dict(entry.keywords)
        if isinstance(entry, str):
            if entry not in known:
                near = difflib.get_close_matches(entry, known, n=3)
                hint = f"; near it: {', '.join(near)}" if near else f", only {', '.join(known)}"
                raise ValueError(f"no merging method is called {entry!r}{hint}")
            entry = known[entry]
        name = label or getattr(entry, "__name__", type(entry).__name__)
        label = name if name not in chosen else next(f"{name} {i}" for i in range(2, 99) if f"{name} {i}" not in chosen)
        fixed |= arguments.pop(label, {})
        parameters = inspect.signature(entry).parameters
        if "score" in parameters and "score" not in fixed and parameters["score"].default is inspect.Parameter.empty:
            fixed["score"] = tune
        grid = default_grid(entry, fixed) if grid is None else {key: list(values) for key, values in grid.items()}
        chosen[label] = _Chosen(label, entry, fixed, grid)
    if arguments:
        raise ValueError(f"arguments names {next(iter(arguments))!r}, which is not compared; {', '.join(chosen)} are")
    return chosen


def _anchors(base, experts, labels, score, reference) -> tuple[list[dict], str]:
    """The rows that methods are held against."""
    first = score(base)
    rows = [{"model": "base", "kind": "base", **_figures(first)}]
    scores = [score(expert) for expert in experts]
    rows += [{"model": name, "kind": "expert", **_figures(s)} for name, s in zip(labels, scores, strict=True)]
    tasks = {task: max(s.tasks[task] for s in scores) for task in getattr(first, "tasks", {})}
    mean = sum(tasks.values()) / len(tasks) if tasks else max(map(float, scores))
    rows.append({"model": EXPERTS, "kind": "experts", "score": mean, "tasks": tasks})
    if reference is not None:
        if isinstance(reference, (str, Path)):
            reference = load(reference)
        value = score(reference) if isinstance(reference, Mapping) else reference
        rows.append({"model": "multitask reference", "kind": "reference", **_figures(value)})
    return rows, getattr(first, "unit", "score")


def _figures(value: float) -> dict[str, object]:
    return {"score": float(value), "tasks": {str(k): float(v) for k, v in getattr(value, "tasks", {}).items()}}


def _models(base: Model, experts: Sequence[Model]) -> tuple[Weights, list[Weights]]:
    if isinstance(experts, (Mapping, str, Path)):
        raise TypeError(f"experts must be a sequence of models, got one {type(experts).__name__}; write [expert]")
    if is_adapter_folder(base):
        raise ValueError(f"base {base} is a LoRA folder; give the model that it sits on, and the folder as an expert")
    base = load(base) if isinstance(base, (str, Path)) else base
    return base, [_expert(base, expert) for expert in experts]


def _expert(base: Weights, expert: Model) -> Weights:
    if is_adapter_folder(expert):
        return adapter_on(base, expert)
    return load(expert) if isinstance(expert, (str, Path)) else expert


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
