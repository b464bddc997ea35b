"""Weights: state dicts as a currency: compared before they are combined, in memory and out of core."""

import functools
import inspect
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from notebook_kit.catalog import entry_of
from notebook_kit.checkpoints import INDEX, BadCheckpoint, Checkpoint, TensorWriter, atomic, load, save
from notebook_kit.hyperparameters import hyperparameters, validate

__all__ = [
    "BadCheckpoint",
    "Checkpoint",
    "IncompatibleWeights",
    "Weights",
    "check",
    "flatten",
    "load",
    "merge_files",
    "preflight",
    "save",
    "task_vector",
    "unflatten",
]

Weights = Mapping[str, Tensor]
SHOWN = 5


class IncompatibleWeights(ValueError):
    """State dicts that cannot be combined: the text names tensors, models and both shapes."""


def check(base: Weights, experts: Sequence[Weights], *, names: Sequence[str] | None = None) -> None:
    """Refuse weights that cannot be merged; return quietly if they can.

    Args:
        base: state dict that sets keys, shapes and dtypes.
        experts: state dicts to hold against it.
        names: what to call the experts in errors; default "experts[0]", "experts[1]", ...

    Raises:
        IncompatibleWeights: keys, shapes or dtypes differ; the first five offending tensors are named.
        ValueError: no experts, or NaN or Inf in a tensor.
        TypeError: `experts` is itself a state dict, or an expert is not a mapping of tensors.
    """
    check_structure(base, experts, names)
    for name, weights in zip(_labels(experts, names), (base, *experts), strict=True):
        for key in base:
            _check_finite(weights[key], key, name)


def preflight(
    base: Weights | str | Path, experts: Sequence[Weights | str | Path], *, names: Sequence[str] | None = None
):
    """Say, before a merge, what would happen to each tensor.

    Args:
        base: state dict, or path of a checkpoint (only its header is read).
        experts: state dicts or paths.
        names: column names for the experts.

    Returns:
        DataFrame: one row a tensor: tensor, one shape column a model, dtype, verdict ("merge", "copy from base",
        or "error: ..." for what `check` would refuse).
    """
    import pandas as pd

    if isinstance(experts, (Mapping, str, os.PathLike)):
        raise TypeError(f"experts must be a sequence of state dicts or paths, got one {type(experts).__name__}")
    specs = [_spec(_open(weights)) for weights in (base, *experts)]
    labels = _labels(experts, names)
    rows = []
    for key in dict.fromkeys(key for spec in specs for key in spec):
        row = {"tensor": key}
        row |= {label: _shape_text(spec, key) for label, spec in zip(labels, specs, strict=True)}
        row["dtype"] = ", ".join(dict.fromkeys(str(spec[key][1]).split(".")[1] for spec in specs if key in spec))
        row["verdict"] = _verdict(key, specs, labels)
        rows.append(row)
    return pd.DataFrame(rows, columns=["tensor", *labels, "dtype", "verdict"])


def task_vector(base: Weights, expert: Weights) -> dict[str, Float[Tensor, "..."]]:
    """Subtract base from expert.

    Args:
        base: state dict θ₀.
        expert: state dict θ of the same keys and shapes.

    Returns:
        dict: τ = θ − θ₀ for the floating tensors, in float32 at least.

    Raises:
        IncompatibleWeights: as `check`.
    """
    check(base, [expert])
    return {key: at_least_float32(expert[key]) - at_least_float32(base[key]) for key in float_keys(base)}


def flatten(weights: Weights) -> Float[Tensor, " parameters"]:
    """Concatenate the floating tensors, in the order of their keys, into one float32 vector."""
    keys = float_keys(weights)
    return torch.cat([at_least_float32(weights[key]).reshape(-1) for key in keys]) if keys else torch.empty(0)


def unflatten(vector: Float[Tensor, " parameters"], like: Weights) -> dict[str, Tensor]:
    """Cut a vector from `flatten` back into tensors with the shapes and dtypes of `like`; other tensors come from it.

    Raises:
        ValueError: the vector's length is not the number of floating parameters of `like`.
    """
    keys = float_keys(like)
    sizes = [like[key].numel() for key in keys]
    if vector.numel() != sum(sizes):
        raise ValueError(f"vector must have {sum(sizes)} entries, got {vector.numel()}")
    result = {key: tensor.clone() for key, tensor in like.items()}
    for key, piece in zip(keys, vector.split(sizes), strict=True):
        result[key] = piece.reshape(like[key].shape).to(like[key].dtype)
    return result


def float_keys(weights: Weights) -> list[str]:
    """The keys that a merge changes: floating tensors. Integer buffers come from base."""
    if isinstance(weights, Checkpoint):
        return [key for key, (_, dtype) in weights.spec().items() if dtype.is_floating_point]
    return [key for key, tensor in weights.items() if tensor.is_floating_point()]


def at_least_float32(tensor: Tensor) -> Tensor:
    """float16 and bfloat16 become float32; float32 and float64 stay."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.to(torch.float32)


def expert_weights(weights: Sequence[float] | None, n_experts: int, default: float = 1.0) -> list[float]:
    """One factor an expert; `default` for each when None.

    Raises:
        ValueError: their number is not the number of experts, or one is NaN or Inf.
    """
    if weights is None:
        return [default] * n_experts
    factors = [float(weight) for weight in weights]
    if len(factors) != n_experts:
        raise ValueError(f"weights must have one entry per expert, {n_experts}, got {len(factors)}")
    if not all(abs(factor) < float("inf") for factor in factors):
        raise ValueError(f"weights must be finite, got {factors}")
    return factors


def merge_files(
    method: Callable,
    base_path: str | Path,
    expert_paths: Sequence[str | Path],
    out_path: str | Path,
    *,
    progress: bool = True,
    **hyperparameter_values,
) -> Path:
    """Merge checkpoints on disk tensor by tensor, so that no model is ever in memory as a whole.

    Args:
        method: a merge of the kit, such as `ties`.
        base_path: .safetensors file or folder, sharded or not.
        expert_paths: the experts, likewise.
        out_path: what to write: a file if base is a file, else a folder that does not exist yet, sharded like base,
            with base's other small files (config, tokenizer) beside the weights.
        progress: show a progress bar.
        hyperparameter_values: passed to `method`.

    Returns:
        The path written. It appears only when complete; an interrupt leaves nothing behind.

    Raises:
        IncompatibleWeights, BadCheckpoint, ValueError, FileExistsError: before anything is written, where possible.
    """
    if isinstance(method, functools.partial):
        raise TypeError("method must be a function, got a functools.partial: give its hyperparameters to merge_files")
    schema = hyperparameters(method)
    validate(schema, {name: value for name, value in hyperparameter_values.items() if name in schema})
    inspect.signature(method).bind({}, [], **hyperparameter_values)  # a misspelt name fails now, not after a pass
    if isinstance(expert_paths, (str, os.PathLike)):
        raise TypeError(
            f"expert_paths must be a sequence of paths, got {expert_paths!r}; write [{str(expert_paths)!r}]"
        )
    base_path, out_path = Path(base_path), Path(out_path)
    base, experts = Checkpoint(base_path), [Checkpoint(path) for path in expert_paths]
    check_out(base_path, [base, *experts], out_path)
    check_structure(base, experts, [str(path) for path in expert_paths])

    entry = entry_of(method)
    arguments = dict(hyperparameter_values)
    if entry is not None and entry.statistics is not None:
        arguments |= entry.statistics(base, experts, **hyperparameter_values)

    with atomic(out_path) as partial:
        if base_path.is_dir():
            partial.mkdir()
            copy_small_files(base_path, partial)
        bar = _progress(len(base), f"merging with {method.__name__}", progress)
        for file in base.files:
            keys = [key for key in base if base.file_of(key) == file]
            target = partial / file.name if base_path.is_dir() else partial
            with TensorWriter(target, {key: base.spec()[key] for key in keys}) as writer:
                for key in keys:
                    writer.write(key, _merge_one(method, key, base, experts, arguments))
                    bar.update()
        bar.close()
    return out_path


def _merge_one(method: Callable, key: str, base: Weights, experts: Sequence[Weights], arguments: dict) -> Tensor:
    merged = method({key: base[key]}, [{key: expert[key]} for expert in experts], **arguments)
    if not isinstance(merged, Mapping):
        raise TypeError(f"{method.__name__} makes {type(merged).__name__}, not one model: call it on weights in memory")
    return merged[key]


def check_out(base_path: Path, inputs: Sequence[Checkpoint], out_path: Path) -> None:
    """Refuse a place to write that is one of the inputs, is taken, or has no folder to be in."""
    for path in (path for checkpoint in inputs for path in (checkpoint.path, *checkpoint.files)):
        if out_path.resolve() == path.resolve():
            raise FileExistsError(f"out_path {out_path} is one of the inputs")
    if base_path.is_dir() and out_path.exists():
        raise FileExistsError(f"{out_path} exists; give a folder that does not")
    if base_path.is_file() and out_path.is_dir():
        raise FileExistsError(f"{out_path} is a folder; base is a file, so the result is one too")
    if not out_path.absolute().parent.is_dir():
        raise FileNotFoundError(f"no folder {out_path.absolute().parent} to write {out_path.name} in")


def copy_small_files(source: Path, target: Path) -> None:
    """Copy what stands beside the weights: configuration, tokenizer, index."""
    # The index stays true: the result has base's tensors in base's shards.
    for file in source.iterdir():
        if file.is_file() and (file.name == INDEX or file.suffix in (".json", ".txt", ".model", ".jinja", ".md")):
            shutil.copyfile(file, target / file.name)


def _progress(total: int, text: str, show: bool):
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=text, unit="tensor", disable=not show)


def _open(weights: Weights | str | Path) -> Weights:
    return Checkpoint(weights) if isinstance(weights, (str, os.PathLike)) else weights


def _labels(experts: Sequence, names: Sequence[str] | None) -> list[str]:
    if names is not None and len(names) != len(experts):
        raise ValueError(f"names must have one entry per expert, {len(experts)}, got {len(names)}")
    return ["base", *(names or [f"experts[{i}]" for i in range(len(experts))])]


def _spec(weights: Weights) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    if isinstance(weights, Checkpoint):
        return weights.spec()
    return {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in weights.items()}


def check_structure(base: Weights, experts: Sequence[Weights], names: Sequence[str] | None) -> None:
    """Refuse keys, shapes and dtypes that do not fit, as `check` does; values are not looked at."""
    if isinstance(experts, Mapping):
        raise TypeError("experts must be a sequence of state dicts, got one mapping; write [expert]")
    if len(experts) == 0:
        raise ValueError("experts must hold at least one state dict, got none")
    labels = _labels(experts, names)
    for label, weights in zip(labels, (base, *experts), strict=True):
        if not isinstance(weights, Mapping):
            raise TypeError(f"{label} must map tensor names to tensors, got {type(weights).__name__}")
        if not isinstance(weights, Checkpoint):
            for key, value in weights.items():
                if not isinstance(value, Tensor):
                    raise TypeError(f"{key!r} of {label} must be a tensor, got {type(value).__name__}")
    specs = [_spec(weights) for weights in (base, *experts)]
    if all(spec == specs[0] for spec in specs[1:]):
        return
    verdicts = {key: _verdict(key, specs, labels) for key in dict.fromkeys(key for spec in specs for key in spec)}
    errors = [f"{key!r}: {verdict[7:]}" for key, verdict in verdicts.items() if verdict.startswith("error: ")]
    if errors:
        more = f"\n  and {len(errors) - SHOWN} more" if len(errors) > SHOWN else ""
        listing = "\n  ".join(errors[:SHOWN])
        raise IncompatibleWeights(
            f"{len(errors)} of {len(verdicts)} tensors cannot be merged; `preflight` lists them all:\n  {listing}{more}"
        )


def _verdict(key: str, specs: Sequence[dict], labels: Sequence[str]) -> str:
    if key not in specs[0]:
        owner = next(label for label, spec in zip(labels, specs, strict=True) if key in spec)
        return f"error: in {owner} but not in base"
    shape, dtype = specs[0][key]
    for label, spec in zip(labels[1:], specs[1:], strict=True):
        if key not in spec:
            return f"error: in base but not in {label}"
        if spec[key][0] != shape:
            return f"error: shape {list(shape)} in base, {list(spec[key][0])} in {label}"
        if spec[key][1] != dtype:
            return f"error: dtype {dtype} in base, {spec[key][1]} in {label}; cast one of them first"
    return "merge" if dtype.is_floating_point else "copy from base"


def _shape_text(spec: dict, key: str) -> str:
    return " x ".join(map(str, spec[key][0])) or "scalar" if key in spec else "missing"


def _check_finite(tensor: Tensor, key: str, name: str) -> None:
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    if tensor.dtype.itemsize == 1:
        tensor = tensor.float()  # torch adds up no float8
    # A finite sum proves finite entries in one cheap pass; an overflowing sum does not prove the contrary.
    if torch.isfinite(tensor.sum()) or torch.isfinite(tensor).all():
        return
    kind = "NaN" if torch.isnan(tensor).any() else "Inf"
    raise ValueError(f"tensor {key!r} of {name} holds {kind}")
