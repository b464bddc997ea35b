"""Numbers about weights: how far experts moved from their base, in which directions, and how much they agree."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from notebook_kit.hyperparameters import Range
from notebook_kit.weights import Weights, at_least_float32, check, float_keys

METRICS = ("norm", "cosine", "sign agreement", "spectrum", "subspace overlap")


def product_svd(
    left: Float[Tensor, "m r"], right: Float[Tensor, "r n"]
) -> tuple[Float[Tensor, "m k"], Float[Tensor, " k"], Float[Tensor, "k n"]]:
    """Decompose left @ right without ever forming it: QR of both, then the SVD of an r x r matrix.

    Args:
        left: thin factor [m, r].
        right: thin factor [r, n].

    Returns:
        U [m, k], singular values [k] in falling order, Vh [k, n], with k = min(m, n, r).
    """
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, s, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    return q_left @ u, s, vh @ q_right.T


def stable_rank(singular_values: Float[Tensor, "... k"]) -> Float[Tensor, "..."]:
    """Σ s² / max s²: how many directions carry the matrix; at most its rank, hardly moved by small directions.

    Args:
        singular_values: of one or several matrices.

    Returns:
        One number a matrix, NaN for a matrix of zeros.
    """
    squares = singular_values.square()
    return squares.sum(-1) / squares.amax(-1)


def effective_rank(singular_values: Float[Tensor, "... k"]) -> Float[Tensor, "..."]:
    """exp of the entropy of s / Σ s: equal to k for k equal singular values.

    Args:
        singular_values: of one or several matrices.

    Returns:
        One number a matrix, NaN for a matrix of zeros.

    Source: Roy and Vetterli 2007, "The effective rank", definition 1.
    """
    p = singular_values / singular_values.sum(-1, keepdim=True)
    return torch.where(p.isnan().any(-1), torch.nan, torch.special.entr(p).sum(-1).exp())


def overlap(a: Float[Tensor, "... m r"], b: Float[Tensor, "... m r"]) -> Float[Tensor, "..."]:
    """‖AᵀB‖² / r for orthonormal columns: 1 for the same subspace, 0 for perpendicular ones, r / m by chance."""
    return (a.mT @ b).square().sum((-2, -1)) / a.shape[-1]


class TaskVectors:
    """What each expert changed, τ = θ − θ₀, computed once; so is what is derived from it, on first use.

    Args:
        base: state dict θ₀.
        experts: state dicts of the same keys and shapes.
        names: of the experts; default "expert 0", "expert 1", ...

    Raises:
        IncompatibleWeights, ValueError: as `notebook_kit.weights.check`.
    """

    def __init__(self, base: Weights, experts: Sequence[Weights], names: Sequence[str] | None = None):
        check(base, experts, names=names)
        self.names = list(names) if names is not None else [f"expert {i}" for i in range(len(experts))]
        self.tensors = float_keys(base)
        self.shapes = {key: tuple(base[key].shape) for key in self.tensors}
        # τ [experts, entries]
        self.tau: dict[str, Tensor] = {}
        self.base_norms: dict[str, float] = {}
        for key in self.tensors:
            start = at_least_float32(base[key].detach()).reshape(-1)
            self.tau[key] = torch.stack([at_least_float32(e[key].detach()).reshape(-1) - start for e in experts])
            self.base_norms[key] = float(start.norm())
        self._kept: dict[tuple, Tensor] = {}

    @functools.cached_property
    def matrices(self) -> list[str]:
        """Names of the tensors that have singular values: two axes or more, none of size 1 or less."""
        return [key for key in self.tensors if len(self.shapes[key]) >= 2 and min(_matrix_shape(self.shapes[key])) > 1]

    @property
    def widest(self) -> int:
        """The largest number of singular values that a matrix has; 1 where there is no matrix."""
        return max((min(_matrix_shape(self.shapes[key])) for key in self.matrices), default=1)

    def norms(self) -> Float[np.ndarray, "tensors experts"]:
        """‖τ‖ / ‖θ₀‖ of each tensor and expert; NaN where θ₀ is zero."""
        return np.array([self._norm(key) for key in self.tensors], dtype=np.float32)

    def cosine(self, tensor: str | None = None) -> Float[np.ndarray, "experts experts"]:
        """Cosine between the experts' τ in one tensor, or in the whole model (None); NaN where τ is zero."""
        gram = self._sum("gram", tensor, lambda key: self.tau[key] @ self.tau[key].T)
        norms = gram.diagonal().sqrt()
        return (gram / torch.outer(norms, norms)).clamp(-1, 1).numpy()

    def sign_agreement(self, tensor: str | None = None, density: float = 1.0) -> Float[np.ndarray, "experts experts"]:
        """Share of equal signs, among the entries that are in both experts' largest; 0.5 by chance.

        Args:
            tensor: name, or None for the whole model.
            density: share of each expert's entries kept, the largest of each tensor by magnitude, in (0, 1].
        """
        both = self._sum(
            ("both", density), tensor, lambda key: self._signs(key, density).abs() @ self._signs(key, density).abs().T
        )
        net = self._sum(("net", density), tensor, lambda key: self._signs(key, density) @ self._signs(key, density).T)
        return ((1 + net / both) / 2).numpy()

    def singular_values(self, tensor: str) -> Float[np.ndarray, "experts k"]:
        """Singular values of each expert's τ in one matrix, in falling order."""
        return self.svd(tensor)[1].numpy()

    def stable_ranks(self) -> Float[np.ndarray, "matrices experts"]:
        """Stable rank of each matrix of each expert's τ, in the order of `matrices`."""
        return np.array([stable_rank(self.svd(key)[1]).numpy() for key in self.matrices], dtype=np.float32)

    def subspace_overlap(self, tensor: str, rank: int = 4) -> Float[np.ndarray, "experts experts"]:
        """How far the experts' leading `rank` output directions of one matrix span the same subspace, in [0, 1]."""
        u = self.svd(tensor)[0][..., :rank]
        return overlap(u[:, None], u[None]).numpy()

    def per_tensor(
        self, metric: str, *, density: float = 1.0, rank: int = 4
    ) -> tuple[list[str], Float[np.ndarray, "tensors experts"]]:
        """One number a tensor and expert: norm and stable rank as they are, the other metrics as means over the others.

        Args:
            metric: one of `METRICS`.
            density: for "sign agreement".
            rank: for "subspace overlap".

        Returns:
            The tensors' names, and the table; pairs are NaN where there is one expert only.

        Raises:
            ValueError: an unknown metric.
        """
        if metric == "norm":
            return self.tensors, self.norms()
        if metric == "spectrum":
            return self.matrices, self.stable_ranks()
        pairs: dict[str, Callable[[str], np.ndarray]] = {
            "cosine": self.cosine,
            "sign agreement": lambda key: self.sign_agreement(key, density),
            "subspace overlap": lambda key: self.subspace_overlap(key, rank),
        }
        if metric not in pairs:
            raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
        keys = self.matrices if metric == "subspace overlap" else self.tensors
        return keys, np.array([_others(pairs[metric](key)) for key in keys], dtype=np.float32)

    def table(self, *, density: float = 1.0, rank: int = 4):
        """Everything about each tensor of each expert.

        Returns:
            DataFrame: tensor, expert, norm (‖τ‖ / ‖θ₀‖), cosine, sign_agreement (means over the other experts),
            stable_rank, effective_rank, subspace_overlap (NaN for vectors).
        """
        import pandas as pd

        columns = {metric: self.per_tensor(metric, density=density, rank=rank) for metric in METRICS}
        rows = []
        for key in self.tensors:
            ranks = effective_rank(self.svd(key)[1]) if key in self.matrices else None
            for e, name in enumerate(self.names):
                cell = {m: table[keys.index(key), e] if key in keys else np.nan for m, (keys, table) in columns.items()}
                rows.append(
                    {
                        "tensor": key,
                        "expert": name,
                        "norm": cell["norm"],
                        "cosine": cell["cosine"],
                        "sign_agreement": cell["sign agreement"],
                        "stable_rank": cell["spectrum"],
                        "effective_rank": float(ranks[e]) if ranks is not None else np.nan,
                        "subspace_overlap": cell["subspace overlap"],
                    }
                )
        return pd.DataFrame(rows)

    def _norm(self, key: str) -> np.ndarray:
        base = self.base_norms[key]
        return (self.tau[key].norm(dim=1) / base).numpy() if base > 0 else np.full(len(self.names), np.nan)

    def _once(self, key: tuple, compute: Callable[[], Tensor]):
        if key not in self._kept:
            self._kept[key] = compute()
        return self._kept[key]

    def _sum(self, what: str | tuple, tensor: str | None, of: Callable[[str], Tensor]) -> Tensor:
        if tensor is not None:
            return of(self.known(tensor))
        return self._once(("sum", what), lambda: sum(of(key) for key in self.tensors))

    def _signs(self, key: str, density: float) -> Float[Tensor, "experts entries"]:
        tau = self.tau[key]
        if density >= 1:
            return tau.sign()
        magnitudes = self._once(("sorted", key), lambda: tau.abs().sort(dim=1, descending=True).values)
        last = max(1, round(density * tau.shape[1])) - 1
        return torch.where(tau.abs() >= magnitudes[:, last : last + 1], tau.sign(), 0)

    def svd(self, key: str) -> tuple[Tensor, Tensor, Tensor]:
        """U [experts, m, k], singular values [experts, k], Vh [experts, k, n] of one matrix of τ."""
        if self.known(key) not in self.matrices:
            raise ValueError(f"{key!r} of shape {list(self.shapes[key])} has no singular values; matrices have")
        m, n = _matrix_shape(self.shapes[key])
        return self._once(("svd", key), lambda: torch.linalg.svd(self.tau[key].reshape(-1, m, n), full_matrices=False))

    def known(self, key: str) -> str:
        """Return the name of a tensor if there is one like it; raises ValueError."""
        if key not in self.tau:
            raise ValueError(f"no floating tensor is called {key!r}; there are {', '.join(self.tensors[:5])}, ...")
        return key


def task_vectors(base: Weights, experts: Sequence[Weights], names: Sequence[str] | None = None) -> TaskVectors:
    """Give `TaskVectors`, again the same ones while the tensors are the same: for pictures that are redrawn often.

    The last two are kept, with their inputs, until others are asked for.

    Args:
        base: state dict θ₀.
        experts: state dicts.
        names: of the experts.
    """
    key = (_fingerprint(base), *map(_fingerprint, experts), tuple(names or ()))
    if key not in _recent:
        # The inputs are kept too, so that no other tensor can take their place in memory, and so their id.
        inputs = [list(weights.values()) if isinstance(weights, dict) else weights for weights in (base, *experts)]
        _recent[key] = (TaskVectors(base, experts, names), inputs)
        while len(_recent) > 2:
            _recent.pop(next(iter(_recent)))
    return _recent[key][0]


_recent: dict[tuple, tuple[TaskVectors, list]] = {}


def low_rank(
    base: Weights,
    expert: Weights,
    *,
    rank: Annotated[int, Range(1, 1024, log=True)] = 8,
    strength: Annotated[float, Range(0, 4)] = 1.0,
) -> dict[str, Tensor]:
    """Cut what an expert changed to a low rank: each matrix keeps the leading singular directions of θ − θ₀.

    Args:
        base: state dict θ₀.
        expert: state dict θ of the same keys and shapes.
        rank: directions kept in each matrix, the best ones (Eckart and Young 1936); vectors keep their whole change.
        strength: what multiplies the change; 0 gives the base.

    Returns:
        dict: a state dict with base's keys, shapes and dtypes.

    Raises:
        IncompatibleWeights: the two do not fit.
    """
    vectors = task_vectors(base, [expert])
    result = {}
    for key, tensor in base.items():
        if key not in vectors.tau:
            result[key] = tensor.clone()
            continue
        change = vectors.tau[key][0]
        if key in vectors.matrices:
            u, s, vh = vectors.svd(key)
            change = (u[0, :, :rank] * s[0, :rank]) @ vh[0, :rank]
        result[key] = (at_least_float32(tensor) + strength * change.reshape(tensor.shape)).to(tensor.dtype)
    return result


def _fingerprint(weights: Mapping) -> tuple:
    if not isinstance(weights, dict):
        return (id(weights),)
    # `_version` counts the in-place changes of a tensor.
    return tuple(
        (key, id(t), 0 if not isinstance(t, Tensor) or t.is_inference() else t._version) for key, t in weights.items()
    )


@functools.cache
def _matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Linear layers as they are; convolutions by output channel; stacked experts one below the other."""
    if len(shape) == 3:
        return shape[0] * shape[1], shape[2]
    return shape[0], int(np.prod(shape[1:]))


def _others(pairs: Float[np.ndarray, "experts experts"]) -> Float[np.ndarray, " experts"]:
    """Mean over the other experts."""
    n = len(pairs)
    if n < 2:
        return np.full(n, np.nan)
    return (pairs.sum(axis=1) - pairs.diagonal()) / (n - 1)
