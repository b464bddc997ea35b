"""Adapters: small modules around the layers of a frozen model, trained in its place."""

from notebook_kit.adapters._adapter import Adapter, CannotFold
from notebook_kit.adapters._attach import attach, detach, fold
from notebook_kit.adapters._peft import load_peft, save_peft
from notebook_kit.adapters._state import adapter_weights, load_adapter_weights, trainable_parameters
from notebook_kit.adapters.budget import rank_for
from notebook_kit.adapters.lora import LoRA
from notebook_kit.adapters.merge import merge_adapters
from notebook_kit.adapters.merged import MergedAdapter, adapter_on
from notebook_kit.adapters.parallel_bottleneck import ParallelBottleneck
from notebook_kit.adapters.read import read_adapter
from notebook_kit.adapters.series_bottleneck import SeriesBottleneck

__all__ = [
    "Adapter",
    "CannotFold",
    "LoRA",
    "MergedAdapter",
    "ParallelBottleneck",
    "SeriesBottleneck",
    "adapter_on",
    "adapter_weights",
    "attach",
    "detach",
    "fold",
    "load_adapter_weights",
    "load_peft",
    "merge_adapters",
    "rank_for",
    "read_adapter",
    "save_peft",
    "trainable_parameters",
]
