"""mergekit's YAML, for the methods that both have: what it means, said in the kit's own functions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from notebook_kit import merging
from notebook_kit.jupyter.sparse_sum import sparse_sum

FAMILY = {  # name: (sparsify, elect, normalize, rescale)
    "ties": ("magnitude", True, True, False),
    "dare_linear": ("random", False, False, True),
    "dare_ties": ("random", True, False, True),
    "breadcrumbs": ("outliers", False, False, False),
    "breadcrumbs_ties": ("outliers", True, False, False),
    "della": ("rank", True, True, True),
    "della_linear": ("rank", False, False, True),
}
METHODS = ("linear", "slerp", "nuslerp", "task_arithmetic", *FAMILY, "model_stock", "sce", "karcher")
SHARED = {  # what `parameters` may hold besides the models' own, with mergekit's defaults
    "linear": {"normalize": True},
    "slerp": {"t": None},
    "nuslerp": {"nuslerp_flatten": True, "nuslerp_row_wise": False},
    "task_arithmetic": {"normalize": False, "lambda": 1.0, "int8_mask": False},
    "model_stock": {"filter_wise": False},
    "sce": {"select_topk": 1.0, "int8_mask": False},
    "karcher": {"max_iter": 10, "tol": 1e-5},
} | {
    name: {"normalize": normalize, "rescale": rescale, "lambda": 1.0, "int8_mask": False}
    for name, (_, _, normalize, rescale) in FAMILY.items()
}
OWN = {name: {"weight": None} for name in ("linear", "nuslerp", "task_arithmetic")} | {
    name: {"weight": None, "density": 1.0}
    | ({"gamma": 0.01} if sparsify == "outliers" else {"epsilon": 0.15} if sparsify == "rank" else {})
    for name, (sparsify, *_) in FAMILY.items()
}
KNOWN = {"weight", "density", "gamma", "epsilon", "t"} | {key for keys in SHARED.values() for key in keys}


@dataclass(frozen=True)
class Translated:
    """What a YAML asks for: a function of the kit, its arguments, and which models it is called on."""

    method: str
    function: Callable
    values: dict[str, object]
    base: str
    experts: list[str]
    dtype: str | None
    out_dtype: str | None
    notes: tuple[str, ...]


def translate(config: Mapping[str, object]) -> Translated:
    """Say in the kit's functions what a mergekit configuration asks for.

    Args:
        config: the parsed YAML.

    Raises:
        ValueError: a key that cannot be expressed here (slices, gradients over layers, filters, tokenizers, other
            methods), or one that is missing; the text names it.
    """
    _refuse_keys(config)
    method = config.get("merge_method")
    if method not in METHODS:
        raise ValueError(f"merge_method: {method!r} is not one that both have; these are: {', '.join(METHODS)}")
    models = config.get("models")
    if not isinstance(models, list) or not models:
        raise ValueError("models: expected a list of models")
    notes: list[str] = []
    shared = _parameters(config.get("parameters"), "parameters", notes)
    own = []
    for i, entry in enumerate(models):
        where = f"models[{i}]"
        if not isinstance(entry, Mapping) or not isinstance(entry.get("model"), str):
            raise ValueError(f"{where}: expected `model: path` and its `parameters`")
        unknown = set(entry) - {"model", "parameters"}
        if unknown:
            raise ValueError(f"{where}.{sorted(unknown)[0]}: not a key of a model")
        own.append((entry["model"], _parameters(entry.get("parameters"), f"{where}.parameters", notes)))
    _note_unused(method, shared, own, notes)
    base = config.get("base_model")
    if base is not None and not isinstance(base, str):
        raise ValueError(f"base_model: expected a path, got {base!r}")
    if base is None and method not in ("linear", "nuslerp", "karcher"):
        raise ValueError(f"base_model: {method} needs one")
    inputs = own if base is None or base in [model for model, _ in own] else [*own, (base, {})]
    tuned = [(model, values) for model, values in inputs if model != base]
    if method in ("linear", "karcher"):
        tuned = inputs
    if not tuned:
        raise ValueError(f"models: {method} needs a model besides the base")
    if method == "nuslerp" and len(tuned) != 2:
        raise ValueError(f"models: nuslerp joins two models besides the base, got {len(tuned)}")
    function, values = _call(method, shared, tuned)
    if method == "nuslerp" and base is not None:
        values["space"] = "task_vectors"
    experts = [model for model, _ in tuned]
    if method == "slerp":
        if len(inputs) != 2:
            raise ValueError(f"models: slerp joins the base and one other model, got {len(inputs)} models in all")
        experts = [base, *experts]
    if method == "model_stock" and len(tuned) < 2:
        raise ValueError("models: model_stock needs two models besides the base")
    if method in ("dare_linear", "dare_ties", "della", "della_linear") and min(values["density"]) < 1:
        notes.append(f"{method} keeps entries at random: other random numbers than mergekit's, the same distribution")
    dtypes = {key: config.get(key) for key in ("dtype", "out_dtype")}
    return Translated(method, function, values, base or own[0][0], experts, **dtypes, notes=tuple(notes))


def _call(method: str, shared: Mapping, tuned: Sequence[tuple[str, Mapping]]) -> tuple[Callable, dict[str, object]]:
    """The kit's function and its arguments."""
    found = {key: shared.get(key, default) for key, default in SHARED[method].items()}
    each = {key: [_own(model, values, shared, key, default) for model, values in tuned]
            for key, default in OWN.get(method, {}).items()}  # fmt: skip
    if method == "linear":
        return merging.average, {"weights": each["weight"], "normalize": bool(found["normalize"])}
    if method == "slerp":
        if found["t"] is None:
            raise ValueError("parameters.t: slerp needs it")
        return merging.slerp, {"t": float(found["t"])}
    if method == "nuslerp":
        if not found["nuslerp_flatten"] and found["nuslerp_row_wise"]:
            raise ValueError("parameters.nuslerp_row_wise: an angle for each column is not here; leave it, or flatten")
        total = sum(each["weight"])
        t = 0.5 if abs(total) < 1e-6 else each["weight"][1] / total
        return merging.slerp, {"t": t, "scope": "tensor" if found["nuslerp_flatten"] else "row"}
    if method == "task_arithmetic":
        total = sum(each["weight"]) if found["normalize"] else 1.0
        factor = float(found["lambda"]) / (total if abs(total) >= 1e-8 else 1.0)
        return merging.task_arithmetic, {"scale": 1.0, "weights": [factor * weight for weight in each["weight"]]}
    if method == "model_stock":
        return merging.model_stock, {"scope": "row" if found["filter_wise"] else "tensor", "clamp": False}
    if method == "sce":
        return merging.sce, {"density": float(found["select_topk"]), "floor": 1e-6}
    if method == "karcher":
        return merging.karcher, {"n_iterations": int(found["max_iter"]), "tolerance": float(found["tol"])}
    sparsify, elect, _, _ = FAMILY[method]
    values = {"sparsify": sparsify, "elect": elect, "weights": each.pop("weight"), **each}
    values |= {"normalize": bool(found["normalize"]), "rescale": bool(found["rescale"]), "scale": found["lambda"]}
    return sparse_sum, values


def _own(model: str, values: Mapping, shared: Mapping, key: str, default: float | None) -> float:
    value = values.get(key, shared.get(key, default))
    if value is None:
        raise ValueError(f"parameters.{key}: {model} has none, and there is none for all")
    return value


def _refuse_keys(config: Mapping) -> None:
    reasons = {
        "slices": "layers cannot be cut and stacked here; give `models`",
        "modules": "modules cannot be merged apart here; give `models`",
        "tokenizer_source": "vocabularies cannot be rebuilt here; without this key base's tokenizer is copied",
        "tokenizer": "vocabularies cannot be rebuilt here; without this key base's tokenizer is copied",
        "chat_template": "templates cannot be set here; without this key base's is copied",
    }
    for key in config:
        if key in reasons:
            raise ValueError(f"{key}: {reasons[key]}")
        if key not in ("merge_method", "models", "base_model", "parameters", "dtype", "out_dtype", "name"):
            raise ValueError(f"{key}: not a key that is understood here")


def _parameters(given: object, where: str, notes: list[str]) -> dict[str, float | bool]:
    """Numbers and switches by name; gradients and filters are refused."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise ValueError(f"{where}: expected names to numbers, got {given!r}")
    found = {}
    for key, value in given.items():
        name = f"{where}.{key}"
        if key not in KNOWN:
            raise ValueError(f"{name}: not a parameter that is understood here")
        if isinstance(value, Mapping) or (isinstance(value, list) and any(isinstance(v, Mapping) for v in value)):
            raise ValueError(f"{name}: a value for each filter of tensor names cannot be given here; give one number")
        if isinstance(value, list):
            raise ValueError(f"{name}: a list is a gradient over layers, which cannot be given here; give one number")
        try:
            found[key] = value if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            raise ValueError(f"{name}: expected a number, got {value!r}") from None
        if key == "int8_mask":
            notes.append(f"{name} is ignored: it saves memory there and changes no number")
    return found


def _note_unused(method: str, shared: Mapping, own: Sequence[tuple[str, Mapping]], notes: list[str]) -> None:
    for key in dict.fromkeys([*shared, *(key for _, values in own for key in values)]):
        if key not in SHARED[method] and key not in OWN.get(method, {}):
            notes.append(f"parameters.{key} is ignored: {method} has no such parameter")
