"""Alignment: hidden units have no order of their own; find the one that lets two networks be combined."""

from notebook_kit.alignment.activation_matching import activation_matching, match_features
from notebook_kit.alignment.architectures import permutation_spec
from notebook_kit.alignment.barrier import barrier, interpolate, path_scores
from notebook_kit.alignment.spec import (
    Part,
    Permutations,
    PermutationSpec,
    compose,
    invert,
    permute,
    random_permutations,
)
from notebook_kit.alignment.weight_matching import similarity, weight_matching

__all__ = [
    "Part",
    "PermutationSpec",
    "Permutations",
    "activation_matching",
    "barrier",
    "compose",
    "interpolate",
    "invert",
    "match_features",
    "path_scores",
    "permutation_spec",
    "permute",
    "random_permutations",
    "similarity",
    "weight_matching",
]
