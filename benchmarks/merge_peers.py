"""Each data-free merge of the kit, and the same merge by mergekit, peft and fusion_bench where they have it.

A method is {who: make}; `make()` returns merge(base, experts) -> state dict. Peers are imported when asked for; one
that is not installed raises ImportError. mergekit is called through its public interface, a tensor at a time.
fusion_bench: the functions of its algorithms, and where they are written inside a class, their lines.
"""

import contextlib
import copy
import importlib
from functools import partial

import torch

from notebook_kit import merging

EXPERTS, DENSITY, SCALE = 3, 0.2, 0.3
GAMMA, EPSILON, KEEP = 0.01, 0.15, 0.5


# ---------------------------------------------------------------- peers
def mergekit(name: str, *, with_base: bool = True, weight: float | None = None, each=(), **shared):
    """A method of mergekit's registry; `each` holds the parameters that every expert gets."""
    method = importlib.import_module("mergekit.merge_methods.registry").get(name)
    group_of = importlib.import_module("mergekit.merge_methods.base").TensorGroup.from_tensors

    def merge(base, experts):
        first = 1 if with_base else 0
        own = dict(each) | ({} if weight is None else {"weight": weight})
        ids = range(first, len(experts) + first)
        parameters = shared | {key: dict.fromkeys(ids, value) for key, value in own.items()}
        merged = {}
        for key, theta in base.items():
            tensors = [theta] * with_base + [expert[key] for expert in experts]
            group = group_of(tensors, base_index=0 if with_base else None)
            merged[key] = method([group], parameters=parameters)[0]
        return merged

    return merge


def mergekit_slerp(t: float):
    method = importlib.import_module("mergekit.merge_methods.registry").get("slerp")
    group_of = importlib.import_module("mergekit.merge_methods.base").TensorGroup.from_tensors

    def merge(base, experts):
        groups = {key: group_of([expert[key] for expert in experts], base_index=0) for key in base}
        return {key: method([group], parameters={"t": t})[0] for key, group in groups.items()}

    return merge


def peft(name: str, factor: float, **options):
    function = getattr(importlib.import_module("peft.utils.merge_utils"), name)

    def merge(base, experts):
        weights = torch.full((len(experts),), factor)
        return {
            key: theta + function([expert[key] - theta for expert in experts], weights, **options)
            for key, theta in base.items()
        }

    return merge


def fusion_average():
    return lambda base, experts: _fusion("method.simple_average").simple_average(list(experts))


def fusion_task_arithmetic():
    dicts = _fusion("utils.state_dict_arithmetic")

    def merge(base, experts):  # task_arithmetic_merge, which wants modules
        tau = dicts.state_dict_sub(experts[0], base)
        for expert in experts[1:]:
            tau = dicts.state_dict_add(tau, dicts.state_dict_sub(expert, base))
        return dicts.state_dict_add(base, dicts.state_dict_mul(tau, SCALE))

    return merge


def fusion_slerp(t: float):
    return lambda base, experts: _fusion("method.slerp.slerp").slerp_on_state_dicts(t, *experts)


def fusion_ties():
    module = _fusion("method.ties_merging.ties_merging_utils")

    def merge(base, experts):
        flat = module.state_dict_to_vector(base)
        taus = torch.vstack([module.state_dict_to_vector(expert) for expert in experts]) - flat
        with contextlib.redirect_stdout(None):
            merged = flat + module.ties_merging(taus, reset_thresh=DENSITY, merge_func="dis-mean")
        return module.vector_to_state_dict(merged, base)

    return merge


def fusion_dare():
    utils, dicts = _fusion("method.dare.utils"), _fusion("utils.state_dict_arithmetic")

    def merge(base, experts):  # DareTaskArithmetic.run
        taus = [dicts.state_dict_sub(expert, base) for expert in experts]
        for tau in taus:
            utils.module_random_drop_(tau, 1 - KEEP, rescale=True)
        total = dicts.state_dict_sum(taus)
        return {key: theta + total[key] * SCALE for key, theta in base.items()}

    return merge


def fusion_model_stock():
    module = _fusion("method.model_stock.model_stock")

    def merge(base, experts):  # ModelStock.run, more than two models
        sums = dict.fromkeys(base, 0.0)
        pairs = [(i, j) for i in range(len(experts)) for j in range(i + 1, len(experts))]
        for i, j in pairs:
            for key, angle in module.compute_angle(experts[i], experts[j], base).items():
                sums[key] += angle
        shares = module.compute_ratio({key: angle / len(pairs) for key, angle in sums.items()}, k=len(experts))
        mean = fusion_average()(base, experts)
        merged = copy.deepcopy(mean)
        for key, t in shares.items():
            merged[key] = mean[key].clone() * t + base[key].clone() * (1.0 - t)
        return merged

    return merge


def _fusion(name: str):
    return importlib.import_module(f"fusion_bench.{name}")


# ---------------------------------------------------------------- methods
def _ours(name: str, **settings):
    method = getattr(merging, name, None)
    return {} if method is None else {"ours": lambda: partial(method, **settings)}


def _two(make):
    """A method for two models gets the first two experts."""

    def made():
        merge = make()
        return lambda base, experts: merge(base, experts[:2])

    return made


_elected = {"density": KEEP, "epsilon": EPSILON}
METHODS = {
    "average": _ours("average")
    | {"mergekit": lambda: mergekit("linear", with_base=False, weight=1.0), "fusion_bench": fusion_average},
    "task_arithmetic": _ours("task_arithmetic", scale=SCALE)
    | {
        "mergekit": lambda: mergekit("task_arithmetic", weight=SCALE),
        "peft": lambda: peft("task_arithmetic", SCALE),
        "fusion_bench": fusion_task_arithmetic,
    },
    "slerp": {
        name: _two(make)
        for name, make in (
            _ours("slerp", t=0.3) | {"mergekit": lambda: mergekit_slerp(0.3), "fusion_bench": lambda: fusion_slerp(0.3)}
        ).items()
    },
    # mergekit and peft trim each tensor, fusion_bench the whole model: each is met on its own ground.
    "ties, tensor": _ours("ties", density=DENSITY, scope="tensor")
    | {
        "mergekit": lambda: mergekit("ties", weight=1.0, each={"density": DENSITY}),
        "peft": lambda: peft("ties", 1.0, density=DENSITY),
    },
    "ties, model": _ours("ties", density=DENSITY, scope="model") | {"fusion_bench": fusion_ties},
    "dare": _ours("dare", density=KEEP, scale=SCALE)
    | {"peft": lambda: peft("dare_linear", SCALE, density=KEEP), "fusion_bench": fusion_dare},
    "dare, norm": _ours("dare", density=KEEP, scale=SCALE, rescale="norm")
    | {"mergekit": lambda: mergekit("dare_linear", weight=SCALE, each={"density": KEEP})},
    "breadcrumbs": _ours("breadcrumbs", density=KEEP, gamma=GAMMA, scale=SCALE)
    | {"mergekit": lambda: mergekit("breadcrumbs", weight=SCALE, each={"density": KEEP, "gamma": GAMMA})},
    "della": _ours("della", **_elected, rescale="norm")
    | {"mergekit": lambda: mergekit("della", weight=1.0, each=_elected)},
    "model_stock": _ours("model_stock", clamp=False)
    | {"mergekit": lambda: mergekit("model_stock"), "fusion_bench": fusion_model_stock},
    "model_stock, row": _ours("model_stock", clamp=False, scope="row")
    | {"mergekit": lambda: mergekit("model_stock", filter_wise=True)},
    "sce": _ours("sce", density=DENSITY) | {"mergekit": lambda: mergekit("sce", select_topk=DENSITY)},
    "karcher": _ours("karcher") | {"mergekit": lambda: mergekit("karcher", with_base=False)},
}
RANDOM = ("dare", "dare, norm", "della")  # their numbers differ by chance
