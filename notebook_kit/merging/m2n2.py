"""M2N2, model merging of natural niches: evolve merges; data points are food, and who eats what others leave survives.

    z_j     = Σ_i s_ij                                  how many solve point j; s_ij in [0, 1]
    f_i     = Σ_j s_ij / z_j^α                          competition: a point solved by all pays each of them little
    g(A, B) = Σ_j max(0, s_Bj − s_Aj) / z_j^α           attraction: B solves what A does not
    child   = slerp(A, B; t),  t_p = w for p < k, 1 − w for p ≥ k,  w ~ U(0, 1), k ~ U{0..d−1}

Parent A is drawn in proportion to f, B to g(A, ·). The child joins, f is computed anew with it, the lowest leaves.
A, B [d]: flat weights in the order of the keys; scores S [P, N] of the archive's P models on N points; α: `alpha`.
Abrantes et al., 2025, section 3; SakanaAI/natural_niches. As there, the archive begins with rows of zeros: they score
nothing, are never drawn, and leave first. Where the code differs: it divides by 0 when nobody solves what A does not;
here A then mates itself. The paper writes one slerp, and so one angle, for each side of the split (`angle="part"`);
its code has one angle for the whole vectors ("global", the default).
Evolving needs parents in one basin: two networks trained from different starts must be aligned first. The archive
holds P models in float32.
"""

from collections.abc import Callable, Sequence
from typing import Annotated

from jaxtyping import Float
from torch import Tensor

from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.merging.niche_archive import NicheArchive
from notebook_kit.weights import Weights, check

ScorePoints = Callable[[dict[str, Tensor]], Float[Tensor, " points"]]


def statistics(base: Weights, experts: Sequence[Weights], *, evals: int = 1000, **settings) -> dict[str, object]:
    """The whole merge: when files are merged tensor by tensor, evolution runs once, on the whole model."""
    settings.pop("merged", None)
    return {"merged": NicheArchive(base, experts, **settings).run(evals).best()}


@method(family="merging", paper="m2n2", statistics=statistics)
def m2n2(
    base: Weights,
    experts: Sequence[Weights],
    *,
    score_points: ScorePoints,
    pop_size: Annotated[int, Range(2, 1024)] = 20,
    alpha: Annotated[float, Range(0, 4)] = 1.0,
    matchmaker: bool = True,
    splitpoint: bool = True,
    crossover: bool = True,
    angle: Annotated[str, Choice("global", "part")] = "global",
    mutation_std: Annotated[float, Range(0, 1)] = 0.0,
    evals: Annotated[int, Range(0, 1_000_000)] = 1000,
    children: Annotated[int, Range(1, 1024)] = 1,
    seed: Annotated[int, Range(0, 2**31 - 1)] = 0,
    merged: Weights | None = None,
) -> dict[str, Tensor]:
    """Merge by evolution: an archive of merges competes for data points, and parents are paired by what they lack.

    `NicheArchive` takes the same arguments, evolves step by step and keeps scores and history.

    Args:
        base: state dict that gives keys, shapes, dtypes and what is not floating; not a parent itself.
        experts: state dicts, the first parents; or small random ones (`random_weights`), to evolve from scratch.
        score_points: weights -> score of each data point, Float[points] in [0, 1] (1 is solved); such as
            `PointScores(model, inputs, labels)`, which scores several children at once.
        pop_size: P, models in the archive.
        alpha: strength of the competition; 0 is a plain genetic algorithm on the mean score.
        matchmaker: draw parent B by attraction; off draws both parents by fitness.
        splitpoint: mix by w before a random point of the flat weights and by 1 − w after it; off mixes by w everywhere.
        crossover: off takes parent A as the child (then only mutation changes anything).
        angle: of the slerp: one for the whole vectors (official code), or one for each part (paper's formula).
        mutation_std: standard deviation of noise added to a child; 0.01 from scratch, 0 from trained experts.
        evals: evaluations on all points, the experts' among them; the paper's budget is 50 000.
        children: bred from one archive and scored together; 1 as in the paper, more is faster.
        seed: of all draws.
        merged: from `statistics`, when the model is merged in parts; None evolves it.

    Returns:
        dict: the archive's model of the best mean score.

    Raises:
        IncompatibleWeights: keys, shapes or dtypes differ.
        ValueError: NaN or Inf in a tensor, more experts than `pop_size`, or scores outside of [0, 1].

    Source:
        Abrantes et al., 2025, arXiv 2508.16204; SakanaAI/natural_niches.
    """
    if merged is not None:
        check(base, experts)
        return {name: merged[name].clone() for name in base}
    settings = {"pop_size": pop_size, "alpha": alpha, "matchmaker": matchmaker, "splitpoint": splitpoint}
    settings |= {"crossover": crossover, "angle": angle, "mutation_std": mutation_std, "children": children}
    archive = NicheArchive(base, experts, score_points=score_points, seed=seed, **settings)
    archive.run(evals)
    return archive.best()
