"""sweep: a function over a grid of hyperparameters, on one core or many; a tidy table, a picture, a widget."""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass
from pathlib import Path

from notebook_kit.figures.sweeps import sweep_view
from notebook_kit.hyperparameters import Choice, hyperparameters, validate
from notebook_kit.widgets.explorer import Explorer


@dataclass(frozen=True)
class SweepResult:
    """What a sweep found; `frame` has a row for each setting: hyperparameters, score, tasks, seconds."""

    frame: object
    names: tuple[str, ...]
    owner: str = ""

    @property
    def best(self) -> dict[str, object]:
        """The hyperparameters of the highest score, ready to pass on: `fn(*args, **result.best)`."""
        scores = self.frame["score"]
        if scores.isna().all():
            raise ValueError("every score of this sweep is NaN: there is no best")
        place = scores.idxmax()
        return {name: _native(self.frame.at[place, name]) for name in self.names}

    @property
    def figure(self):
        """The score along the hyperparameter with most values, coloured by the next."""
        x, by = self._axes()
        crowded = bool(by) and self.frame[by].nunique() > 6
        return sweep_view(self.frame, x=x, by=by, picture="map" if crowded else "lines")

    def widget(self) -> Explorer:
        """The picture with controls: which hyperparameter along which axis, which task."""
        x, by = self._axes()
        measures = [c for c in self.frame.columns if c not in (*self.names, "seconds")]
        crowded = bool(by) and self.frame[by].nunique() > 6
        limits = {"x": Choice(*self.names), "by": Choice("", *self.names), "measure": Choice(*measures)}
        start = {"x": x, "by": by, "picture": "map" if crowded else "lines"}
        return Explorer(sweep_view, self.frame, limits=limits, **start)

    def to_html(self, path: str | Path) -> Path:
        """Write a stand-alone page of `widget()`, with every measure and both pictures."""
        return self.widget().to_html(path, vary=["measure", "picture"])

    def _axes(self) -> tuple[str, str]:
        order = sorted(self.names, key=lambda name: -self.frame[name].nunique())
        varied = [name for name in order if self.frame[name].nunique() > 1] or order
        return varied[0], varied[1] if len(varied) > 1 else ""

    def __repr__(self):
        best = "every score NaN" if self.frame["score"].isna().all() else f"best {self.best}"
        return f"SweepResult({self.owner}: {len(self.frame)} settings, {best})"

    def _repr_mimebundle_(self, **kwargs):
        return self.widget()._repr_mimebundle_(**kwargs)


def sweep(
    fn: Callable,
    *args,
    grid: Mapping[str, Sequence],
    score: Callable | None = None,
    executor: object = None,
    progress: bool = True,
    **fixed,
) -> SweepResult:
    """Run a function for every combination of a grid.

    Args:
        fn: a function with annotated hyperparameters.
        args: what it works on.
        grid: hyperparameter to the values to try.
        score: of fn's result, higher is better; a score with `.tasks` gives a column a task. None: the result itself.
        executor: any `concurrent.futures.Executor`, or a Dask client; None runs here, one after another.
        progress: show a progress bar.
        fixed: more arguments of fn.

    Returns:
        SweepResult: rows in the order of the grid, whatever the order of completion.

    Raises:
        ValueError: an empty grid, a name that fn does not declare, or a value out of range: before anything runs.
    """
    import pandas as pd
    from tqdm.auto import tqdm

    grid = {name: list(values) for name, values in grid.items()}
    if not grid or not all(grid.values()):
        raise ValueError(f"grid must give at least one value for each hyperparameter, got {grid}")
    schema = hyperparameters(fn)
    for name, values in grid.items():
        for value in values:
            validate(schema, {name: value})
    validate(schema, {name: value for name, value in fixed.items() if name in schema})

    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    rows: list[dict | None] = [None] * len(points)
    bar = tqdm(total=len(points), desc=f"sweeping {schema.owner}", unit="setting", disable=not progress)
    with bar:
        if executor is None:
            for i, point in enumerate(points):
                rows[i] = _evaluate(fn, args, fixed, point, score)
                bar.update()
        else:
            pool = executor.get_executor() if hasattr(executor, "get_executor") else executor
            futures = {pool.submit(_evaluate, fn, args, fixed, point, score): i for i, point in enumerate(points)}
            try:
                for future in as_completed(futures):
                    rows[futures[future]] = future.result()
                    bar.update()
            finally:
                for future in futures:
                    future.cancel()
    frame = pd.DataFrame(rows)
    for name, values in grid.items():
        if None in values:  # a column of numbers would turn it into NaN
            frame[name] = pd.Series([point[name] for point in points], dtype=object)
    return SweepResult(frame, tuple(grid), schema.owner)


def _evaluate(fn: Callable, args: tuple, fixed: Mapping, point: Mapping, score: Callable | None) -> dict:
    started = time.perf_counter()
    value = fn(*args, **{**fixed, **point})
    result = value if score is None else score(value)
    try:
        number = float(result)
    except (TypeError, ValueError):
        raise TypeError(
            f"{getattr(fn, '__name__', 'fn')} returned {type(result).__name__}, which is no number: give `score`"
        ) from None
    tasks = {str(name): float(value) for name, value in getattr(result, "tasks", {}).items()}
    return {**point, "score": number, **tasks, "seconds": time.perf_counter() - started}


def _native(value):
    return value.item() if hasattr(value, "item") else value
