"""The archive that M2N2 evolves: its weights and scores, one generation at a time, and its history."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from notebook_kit.hyperparameters import Choice, Range, hyperparameters, validate
from notebook_kit.merging.flat_space import Flat, FlatSpace
from notebook_kit.merging.niches import Scores, attraction, coverage, diversity, fitness, mix
from notebook_kit.weights import Weights, check


@dataclass(frozen=True)
class Birth:
    """One child: its parents (rows of the archive before the step), its mixture, and whose place it took.

    Args:
        parents: rows A and B; A twice where it was its own mate.
        w: mixing weight.
        split: k, first position that gets 1 − w; d where there is no split.
        scores: of the child, Float[points].
        replaced: the row it took, or None: it was the worst itself.
    """

    parents: tuple[int, int]
    w: float
    split: int
    scores: Tensor = field(repr=False)
    replaced: int | None


class NicheArchive:
    """An archive that evolves: `step()` breeds, `best()` gives the best model, `history` tells how it went.

    Args:
        base, experts, score_points and the settings: as `m2n2` takes them.

    Attributes:
        space: maps rows to state dicts.
        flat: the archive's weights, Float[P, d].
        scores: of the archive, Float[P, points].
        evaluations: so far, the experts' among them.
        births: of the last step.
        history: a dict for each step: evaluations, best (mean score of the best), mean, coverage, diversity.
    """

    def __init__(
        self,
        base: Weights,
        experts: Sequence[Weights],
        *,
        score_points: Callable[[dict[str, Tensor]], Tensor],
        pop_size: Annotated[int, Range(2, 1024)] = 20,
        alpha: Annotated[float, Range(0, 4)] = 1.0,
        matchmaker: bool = True,
        splitpoint: bool = True,
        crossover: bool = True,
        angle: Annotated[str, Choice("global", "part")] = "global",
        mutation_std: Annotated[float, Range(0, 1)] = 0.0,
        children: Annotated[int, Range(1, 1024)] = 1,
        seed: Annotated[int, Range(0, 2**31 - 1)] = 0,
    ):
        settings = {"pop_size": pop_size, "alpha": alpha, "matchmaker": matchmaker, "splitpoint": splitpoint}
        settings |= {"crossover": crossover, "angle": angle, "mutation_std": mutation_std, "children": children}
        validate(hyperparameters(NicheArchive), settings | {"seed": seed})
        check(base, experts)
        if len(experts) > pop_size:
            raise ValueError(f"pop_size must be at least the number of experts, {len(experts)}, got {pop_size} (m2n2)")
        self.space = FlatSpace(base)
        self.alpha, self.matchmaker, self.splitpoint, self.crossover = alpha, matchmaker, splitpoint, crossover
        self.angle, self.mutation_std, self.children, self._score = angle, mutation_std, children, score_points
        self._generator = torch.Generator().manual_seed(seed)
        first = self.space.flatten(experts)
        scores = self.evaluate(first)
        self.flat = first.new_zeros(pop_size, first.shape[1])
        self.scores = scores.new_zeros(pop_size, scores.shape[1])
        self.evaluations, self.births, self.history = 0, [], []
        for row, score in zip(first, scores, strict=True):
            self.insert(row, score)
        self._note()

    def evaluate(self, flat: Flat) -> Scores:
        """Score models on all points, together where `score_points` can."""
        stacked = getattr(self._score, "stacked", None)
        if stacked is not None and len(flat) > 1:
            scores = stacked(self.space, flat)
        else:
            rows = [self._score(self.space.weights(row)) for row in flat]
            kinds = {str(list(row.shape)) if isinstance(row, Tensor) else type(row).__name__ for row in rows}
            if len(kinds) > 1 or not isinstance(rows[0], Tensor):
                got = ", ".join(sorted(kinds))
                raise TypeError(
                    f"score_points must give a tensor of scores [points], as long for all models, got {got}"
                )
            scores = torch.stack(rows)
        scores = scores.to(torch.float32)
        if scores.ndim != 2 or not bool(((scores >= 0) & (scores <= 1)).all()):
            shape, low, high = list(scores.shape), float(scores.min()), float(scores.max())
            raise ValueError(f"score_points must give scores in [0, 1] [points], got {shape} in [{low:g}, {high:g}]")
        return scores

    def insert(self, row: Float[Tensor, " d"], score: Float[Tensor, " points"]) -> int | None:
        """Let a model join; the lowest fitness of all leaves (ties: the first). Returns the row it took, or None."""
        self.evaluations += 1
        lowest = int(fitness(torch.cat([self.scores, score[None]]), self.alpha).argmin())
        if lowest == len(self.scores):
            return None
        self.flat[lowest], self.scores[lowest] = row, score
        return lowest

    def pair(self) -> tuple[int, int]:
        """Draw parents: A by fitness; B by attraction to A, or by fitness too."""
        f = fitness(self.scores, self.alpha)
        if not self.matchmaker:
            a, b = self._draw(f), self._draw(f)
            return a, b
        a = self._draw(f)
        g = attraction(self.scores, a, self.alpha)
        return a, (self._draw(g) if float(g.sum()) > 0 else a)

    def step(self, children: int | None = None) -> list[Birth]:
        """Breed children from the archive as it is, score them together, and let them join one after another."""
        n, d = children or self.children, self.flat.shape[1]
        pairs = torch.tensor([self.pair() for _ in range(n)])
        w = torch.rand(n, generator=self._generator)
        k = torch.randint(d, (n,), generator=self._generator) if self.splitpoint else torch.full((n,), d)
        a, b = self.flat[pairs[:, 0]], self.flat[pairs[:, 1]]
        child = mix(a, b, w, k, self.angle) if self.crossover else a.clone()
        if self.mutation_std:
            child += self.mutation_std * torch.randn(child.shape, generator=self._generator).to(child)
        scores = self.evaluate(child)
        places = [self.insert(row, score) for row, score in zip(child, scores, strict=True)]
        story = zip(pairs.tolist(), w.tolist(), k.tolist(), scores, places, strict=True)
        self.births = [Birth(tuple(pair), *rest) for pair, *rest in story]
        self._note()
        return self.births

    def run(self, evals: int) -> "NicheArchive":
        """Step until this many models have been scored since the beginning."""
        while self.evaluations < evals:
            self.step(min(self.children, evals - self.evaluations))
        return self

    def best(self) -> dict[str, Tensor]:
        """The state dict of the best mean score."""
        weights = self.space.weights(self.flat[int(self.scores.mean(1).argmax())])
        return {name: tensor.clone() for name, tensor in weights.items()}

    @property
    def fitness(self) -> Float[Tensor, " models"]:
        """f of the archive."""
        return fitness(self.scores, self.alpha)

    def _draw(self, chances: Float[Tensor, " models"]) -> int:
        if float(chances.sum()) == 0:  # nothing is solved by anybody: all who are there are equal
            chances = (self.flat != 0).any(1).float() if bool(self.flat.any()) else torch.ones(len(chances))
        return int(torch.multinomial(chances.cpu(), 1, generator=self._generator))

    def _note(self) -> None:
        each = self.scores.mean(1)
        row = {"evaluations": self.evaluations, "best": float(each.max()), "mean": float(each.mean())}
        self.history.append(row | {"coverage": coverage(self.scores), "diversity": diversity(self.scores)})
