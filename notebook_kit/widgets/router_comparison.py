"""compare_routers: one small mixture trained with many routers under one budget; one table, one picture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from notebook_kit.diagnostics.router_comparison import Entry, Size, train_router
from notebook_kit.figures.router_comparison import router_comparison_view
from notebook_kit.hyperparameters import Choice, Range, hyperparameters, validate
from notebook_kit.routers import (
    BalancedAssignment,
    ExpertChoice,
    HashRouter,
    LossFreeBias,
    NoisyTopK,
    NullExperts,
    StableMoE,
    TopK,
    TopP,
)
from notebook_kit.routing import RoutingTrace
from notebook_kit.widgets.explorer import Explorer
from notebook_kit.widgets.router_explorer import RouterExplorer

# What is compared where nothing is given; the rates and coefficients suit a few hundred steps.
ROUTERS: dict[str, Entry] = {
    "top-2": TopK,
    "Switch": (TopK, {"k": 1, "convention": "switch"}),
    "noisy top-2": NoisyTopK,
    "top-p": TopP,
    "null experts": NullExperts,
    "loss-free bias": (LossFreeBias, {"bias_rate": 0.01}),
    "expert choice": ExpertChoice,
    "BASE": BalancedAssignment,
    "hash": (HashRouter, {"table": "balanced"}),
    "StableMoE": StableMoE,
}
FIGURES = ("loss", "experts_per_token", "active_parameters", "max_violation", "dead_experts")
FIGURES += ("information_bits", "chance_99", "moved", "steps", "seconds")


@dataclass(frozen=True)
class RouterComparison:
    """What `compare_routers` found; shows itself as the picture with controls.

    Args:
        frame: a row a router and seed: router, seed, loss (nats a byte, held out), experts_per_token,
            active_parameters (that a token is multiplied with), max_violation and dead_experts (on held-out text; the
            mean, and the sum, over mixtures), information_bits and chance_99 (what the best expert tells of the
            language, and what chance stays below), moved (share of held-out tokens whose best expert changed in the
            second half of the budget), steps, seconds, causal (False: a byte's experts depend on
            later bytes, so the loss is no fair one), problem.
        curves: a row a router, seed and twentieth of the budget: share, loss and max_violation of the batches.
        traces: router to the routing of the held-out articles by the trained model, of the last seed.
        early: the same, half way.
        errors: router to the exception that ended it.
    """

    frame: object
    curves: object
    traces: dict[str, RoutingTrace] = field(default_factory=dict, repr=False)
    early: dict[str, RoutingTrace] = field(default_factory=dict, repr=False)
    errors: dict[str, Exception] = field(default_factory=dict, repr=False)

    @property
    def table(self):
        """The frame to read: means over seeds, the lowest loss first, figures rounded."""
        groups = self.frame.groupby("router", sort=False)
        table = groups[list(FIGURES)].mean()
        table["seeds"] = groups["loss"].count()
        table["causal"], table["problem"] = groups["causal"].first(), groups["problem"].first()
        table["active_parameters"] = table["active_parameters"].round()
        return table.sort_values("loss", kind="stable").round(3)

    @property
    def figure(self):
        """Every router's loss."""
        return router_comparison_view(self.frame, self.curves)

    def explorer(self, name: str, **options) -> RouterExplorer:
        """Look into one router's trace, with its drift since half way.

        Args:
            name: of the router.
            options: as `RouterExplorer` takes them.

        Raises:
            ValueError: it has no trace here.
        """
        if name not in self.traces:
            raise ValueError(f"{name!r} has no trace here; these have: {', '.join(self.traces) or 'none'}")
        return RouterExplorer(self.early[name], other=self.traces[name], **options)

    def widget(self) -> Explorer:
        """The picture with controls."""
        return Explorer(router_comparison_view, self.frame, self.curves)

    def to_html(self, path: str | Path) -> Path:
        """Write a stand-alone page of `widget()`, with every picture."""
        return self.widget().to_html(path, vary=["picture", "best_first"])

    def __repr__(self):
        table = self.table
        ran = table[table["loss"].notna()]
        text = f"{len(table)} routers" + (f", {len(table) - len(ran)} failed" if len(ran) < len(table) else "")
        if ran.empty:
            return f"RouterComparison({text})"
        return f"RouterComparison({text}; lowest loss {ran.index[0]}: {ran['loss'].iloc[0]:.3f} nats a byte)"

    def _repr_mimebundle_(self, **kwargs):
        if not self.traces:  # nothing to draw
            return {"text/plain": repr(self), "text/html": self.table.to_html(escape=True)}
        return self.widget()._repr_mimebundle_(**kwargs)


def compare_routers(
    routers: Sequence[Entry] | Mapping[str, Entry] | None = None,
    *,
    steps: Annotated[int, Range(1, 1_000_000)] = 200,
    seeds: int | Sequence[int] = 1,
    budget: Annotated[str, Choice("compute", "text")] = "compute",
    n_experts: Annotated[int, Range(1, 4096)] = 8,
    d_model: Annotated[int, Range(1, 8192)] = 32,
    d_ff: Annotated[int, Range(1, 65536)] = 64,
    n_layers: Annotated[int, Range(1, 64)] = 1,
    batch_size: Annotated[int, Range(1, 65536)] = 16,
    length: Annotated[int, Range(1, 512)] = 32,
    lr: Annotated[float, Range(1e-6, 1, log=True)] = 1e-2,
    progress: bool = True,
) -> RouterComparison:
    """Compare routers: the same small byte model of twelve languages is trained with each, under one budget.

    The model sees four bytes and guesses the next; between reading and writing stand `n_layers` mixtures. Weights (but
    the routers') and text are the same for all. Two hundred steps with the defaults take about 2 s a router and seed.

    Args:
        routers: classes, (class, settings), routers that are made already, or functions from d_model and n_experts; a
            mapping gives them labels. None: ten of the kit's. Routers that follow a schedule or need counts of bytes
            are told them, see `diagnostics.router_comparison.make_router`.
        steps: batches of a model that uses two experts a token: the budget.
        seeds: how many, or which; each is a training of its own.
        budget: "compute": all may multiply equally often, so a router that asks fewer experts reads more text; "text":
            all read the same.
        n_experts: of each mixture.
        d_model: width.
        d_ff: hidden units of an expert.
        n_layers: mixtures.
        batch_size: windows in a batch.
        length: bytes of a window.
        lr: learning rate, the same for all and tuned for none.
        progress: show a bar.

    Returns:
        RouterComparison: `.table`, `.frame`, `.curves`, `.traces`, `.early`, `.figure`, `.widget()`, `.explorer(name)`,
        `.to_html(path)`. A router that fails says why in the column `problem`; the others go on.

    Raises:
        ValueError: no router, no seed, or a size out of range.
    """
    import pandas as pd
    from tqdm.auto import tqdm

    given = {"steps": steps, "budget": budget, "n_experts": n_experts, "d_model": d_model, "d_ff": d_ff}
    given |= {"n_layers": n_layers, "batch_size": batch_size, "length": length, "lr": lr}
    validate(hyperparameters(compare_routers), given)
    chosen = _labelled(ROUTERS if routers is None else routers)
    numbers = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not chosen or not numbers:
        raise ValueError(f"needs a router and a seed at least, got {len(chosen)} and {len(numbers)} (compare_routers)")
    size = Size(n_experts, d_model, d_ff, n_layers, batch_size, length, lr)
    rows, curves, traces, early, errors = [], [], {}, {}, {}
    form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    with tqdm(total=float(len(chosen) * len(numbers)), disable=not progress, bar_format=form) as bar:
        forward = lambda share: bar.update(max(0.0, min(share, bar.total - bar.n)))  # noqa: E731  sums of shares round
        for row_number, (label, entry) in enumerate(chosen.items()):
            for seed in numbers:
                bar.set_description(f"training {label}" + (f", seed {seed}" if len(numbers) > 1 else ""))
                row = {"router": label, "seed": seed, "problem": ""}
                try:
                    run = train_router(entry, size=size, steps=steps, budget=budget, seed=seed, advance=forward)
                except Exception as error:  # one router's trouble must not lose the others' results
                    errors[label] = error
                    rows.append(row | {"problem": " ".join(f"{type(error).__name__}: {error}".split())})
                    bar.update((row_number + 1) * len(numbers) - bar.n)
                    break  # it would fail with the next seed too
                rows.append(row | run.figures)
                curves += [(label, seed, *part) for part in run.curve]
                traces[label], early[label] = run.trace, run.early
    frame = pd.DataFrame(rows, columns=["router", "seed", *FIGURES, "causal", "problem"])
    frame[list(FIGURES)] = frame[list(FIGURES)].astype(float)
    frame["causal"] = frame["causal"].astype("boolean")  # unknown where it failed
    columns = ["router", "seed", "share", "loss", "max_violation"]
    return RouterComparison(frame, pd.DataFrame(curves, columns=columns), traces, early, errors)


def _labelled(routers: Sequence[Entry] | Mapping[str, Entry]) -> dict[str, Entry]:
    if isinstance(routers, Mapping):
        return dict(routers)
    labelled: dict[str, Entry] = {}
    for entry in routers:
        kind, settings = entry if isinstance(entry, tuple) else (entry, {})
        name = getattr(kind, "__name__", type(kind).__name__)
        shown = ", ".join(f"{key}={value}" for key, value in settings.items() if isinstance(value, (int, float, str)))
        name += f"({shown})" if shown else ""
        while name in labelled:
            name += "'"
        labelled[name] = entry
    return labelled
