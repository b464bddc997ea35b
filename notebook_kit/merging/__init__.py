"""Merging: `name(base, experts, *, hyperparameters) -> dict[str, Tensor]`; one method, one file."""

from notebook_kit.merging.average import average
from notebook_kit.merging.dare import dare
from notebook_kit.merging.slerp import slerp
from notebook_kit.merging.task_arithmetic import task_arithmetic
from notebook_kit.merging.ties import ties
from notebook_kit.weights import IncompatibleWeights, check, load, merge_files, preflight, save, task_vector

__all__ = [
    "IncompatibleWeights",
    "average",
    "check",
    "dare",
    "load",
    "merge_files",
    "preflight",
    "save",
    "slerp",
    "task_arithmetic",
    "task_vector",
    "ties",
]
