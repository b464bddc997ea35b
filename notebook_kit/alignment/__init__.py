"""Alignment: hidden units have no order of their own; find the one that lets two networks be combined."""

from notebook_kit.alignment.activation_matching import activation_matching, match_features
from notebook_kit.alignment.architectures import permutation_spec
from notebook_kit.alignment.barrier import barrier, interpolate, path_scores
from notebook_kit.alignment.batch_norm import reset_batch_norm
from notebook_kit.alignment.ot_fusion import Transported, ot_fusion
from notebook_kit.alignment.permutations import (
    Permutations,
    compose,
    invert,
    permute,
    permute_tensor,
    random_permutations,
)
from notebook_kit.alignment.pleas import noise_inputs, pleas, split_widths
from notebook_kit.alignment.spec import Part, PermutationSpec
from notebook_kit.alignment.split_layer import Split, SplitLayer
from notebook_kit.alignment.straight_through import straight_through
from notebook_kit.alignment.transport import ground_cost, incoming, outgoing, transport_plan
from notebook_kit.alignment.transport_features import Features, record_features
from notebook_kit.alignment.unions import greedy_unions
from notebook_kit.alignment.units import feature_correlation, unit_activations
from notebook_kit.alignment.weight_matching import weight_matching
from notebook_kit.alignment.weight_similarity import similarity
from notebook_kit.alignment.zipit import Zipped, zipit

__all__ = [
    "Features",
    "Part",
    "PermutationSpec",
    "Permutations",
    "Split",
    "SplitLayer",
    "Transported",
    "Zipped",
    "activation_matching",
    "barrier",
    "compose",
    "feature_correlation",
    "greedy_unions",
    "ground_cost",
    "incoming",
    "interpolate",
    "invert",
    "match_features",
    "noise_inputs",
    "ot_fusion",
    "outgoing",
    "path_scores",
    "permutation_spec",
    "permute",
    "permute_tensor",
    "pleas",
    "random_permutations",
    "record_features",
    "reset_batch_norm",
    "similarity",
    "split_widths",
    "straight_through",
    "transport_plan",
    "unit_activations",
    "weight_matching",
    "zipit",
]
