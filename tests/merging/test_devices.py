"""Every merge works where its inputs are: on a second device (`elsewhere`) it gives the numbers of the CPU, there."""

import functools
import sys

import pytest
import torch

from notebook_kit import merging
from notebook_kit.catalog import _methods
from tests.elsewhere import AWAY, Elsewhere, elsewhere, fetch, move, send
from tests.merging.searching import Odd, odd_data


def weights(seed, spread=1.0):
    g = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(3, 4, generator=g) * spread,
        "scalar": torch.randn((), generator=g) * spread,
        "empty": torch.zeros(0, 3),
        "steps": torch.tensor([seed, 7]),
        "mask": torch.tensor([True, False]),
    }


def gram(seed):
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(seed))
    return {"weight": x.T @ x / 20}


def squares(seed):
    return {name: tensor.square() for name, tensor in weights(seed).items() if tensor.is_floating_point()}


BASE, EXPERTS = weights(0), [weights(seed) for seed in (1, 2, 3)]
PAIRS = {"moments": [squares(i) for i in (4, 5, 6)], "fishers": [squares(i) for i in (4, 5, 6)]}
CASES = {
    "average": {},
    "average_checkpoints": {"rule": "ema"},
    "breadcrumbs": {"rescale": "norm", "density": 0.7, "gamma": 0.1, "weights": [1.0, 2.0, 0.5]},
    "consensus": {"k": 1},
    "dare": {"elect": "mass", "weights": [1.0, 2.0, 0.5]},
    "della": {"rescale": "norm", "weights": [1.0, 2.0, 0.5]},
    "doge": {"steps": 5},
    "fisher": {"fishers": PAIRS["fishers"]},
    "greedy_soup": {"score": lambda weights: float(weights["weight"].sum())},
    "isotropic": {"common": 0.5},
    "karcher": {},
    "metrics_weighted": {"metrics": [0.5, 0.4, 0.3]},
    "model_stock": {"scope": "row"},
    "opcm": {},
    "ota": {"moments": PAIRS["moments"], "rescale": True, "normalize_moments": True},
    "pcb": {},
    "regmean": {"grams": [gram(seed) for seed in range(3)]},
    "sce": {"density": 0.5},
    "task_arithmetic": {},
    "task_singular_vectors": {},
    "ties": {"elect": "normmass", "weights": [1.0, 2.0, 0.5]},
}
MORE = {
    "ties by share": ("ties", {"elect": "normfrac", "density": 0.5, "scope": "tensor"}),
    "ties by signs": ("ties", {"signs": weights(9)}),
    "dare by norm": ("dare", {"rescale": "norm"}),
    "pcb by votes": ("pcb", {"inter": "votes", "intra": "softmax"}),
    "pcb by pairs": ("pcb", {"inter": "pairwise_softmax", "clip": 0.05}),
    "model stock of the model": ("model_stock", {"scope": "model", "mean_of": "angles"}),
    "doge of each": ("doge", {"steps": 5, "shared_delta": False, "density": 1.0, "project": "step", "matrices": "all"}),
    "opcm across": ("opcm", {"block": "cross", "shuffle_order": True}),
    "ota of magnitudes": ("ota", {"moments": PAIRS["moments"], "importance": "magnitude", "aggregate": "ties"}),
    "ota of rank 1": ("ota", {"moments": PAIRS["moments"], "curvature": "rank1", "fallback": "mean"}),
    "consensus of ties": ("consensus", {"base_merge": "ties", "density": 0.5}),
    "by inverse softmax": ("metrics_weighted", {"metrics": [3, 1, 2], "metric": "steps", "form": "softmax"}),
}
CASES_ALL = {name: (name, options) for name, options in CASES.items()} | MORE


def same(ours, expected):
    assert list(ours) == list(expected)
    for name, tensor in ours.items():
        assert isinstance(tensor, Elsewhere), f"{name} came back from the other device"
        assert (tensor.device, tensor.dtype, tensor.shape) == (AWAY, expected[name].dtype, expected[name].shape)
        torch.testing.assert_close(fetch(tensor), expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES_ALL)
def test_a_merge_stays_where_its_inputs_are(case):
    name, options = CASES_ALL[case]
    merge = getattr(merging, name)
    expected = merge(BASE, EXPERTS, **options)
    with elsewhere():
        away = merge(send(BASE), send(EXPERTS), **send(options))
    same(away, expected)


@pytest.mark.parametrize("case", CASES_ALL)
def test_so_do_large_tensors_that_come_in_pieces(case, monkeypatch):
    for module, name, size in (("contract", "PIECE", 5), ("selection", "CHUNK", 5), ("ranks", "SAMPLE", 2)):
        monkeypatch.setattr(sys.modules[f"notebook_kit.merging.{module}"], name, size)
    test_a_merge_stays_where_its_inputs_are(case)


@pytest.mark.parametrize("scope", ["tensor", "row", "model"])
@pytest.mark.parametrize("space", ["weights", "task_vectors"])
def test_slerp(scope, space):
    how = {"t": 0.3, "scope": scope, "space": space}
    expected = merging.slerp(BASE, EXPERTS[:2], **how)
    with elsewhere():
        same(merging.slerp(send(BASE), send(EXPERTS[:2]), **how), expected)


def test_every_merge_of_the_catalogue_is_here():
    here = {name for name, _ in CASES_ALL.values()} | {"slerp", "tall_masks", "fast_fisher_graft"}
    searching = {"adamerging", "frank_wolfe", "m2n2"}
    assert here | searching == {name for name, entry in _methods.items() if entry.family == "merging"}


def test_masks_are_packed_and_unpacked():
    expected = merging.tall_masks(BASE, EXPERTS)
    with elsewhere():
        ours = merging.tall_masks(send(BASE), send(EXPERTS))
        same(ours.expert(1), expected.expert(1))
        same(ours.unmasked(), expected.unmasked())
        same(ours.mask(0), expected.mask(0))
        same(ours.claims(), expected.claims())
        assert ours.densities() == expected.densities()


def test_grafts_scores_and_insights():
    moments = PAIRS["moments"]
    masks, scores = merging.graft_masks(BASE, EXPERTS, moments=moments), merging.pcb_scores(BASE, EXPERTS)
    expected = merging.fast_fisher_graft(BASE, EXPERTS[:1], moments=moments[:1])
    inside = merging.doge_details(BASE, EXPERTS, steps=5)["weight"][0]
    with elsewhere():
        base, experts, sent = send(BASE), send(EXPERTS), send(moments)
        same(merging.fast_fisher_graft(base, experts[:1], moments=sent[:1]), expected)
        for ours, theirs in zip(merging.graft_masks(base, experts, moments=sent), masks, strict=True):
            same(ours, theirs)
        same(merging.pcb_scores(base, experts).kept, scores.kept)
        same(merging.doge_experts(base, experts, steps=5)[0], merging.doge_experts(BASE, EXPERTS, steps=5)[0])
        torch.testing.assert_close(fetch(merging.doge_details(base, experts, steps=5)["weight"][0].delta), inside.delta)


@pytest.mark.parametrize(
    ("merge", "options"),
    [
        ("adamerging", {"steps": 3}),
        ("adamerging", {"steps": 3, "batch_size": 4, "density": 0.5, "granularity": "task", "clamp": True}),
        ("frank_wolfe", {"steps": 3}),
        ("frank_wolfe", {"steps": 3, "granularity": "layer", "oracle": "cos_delta", "batch_size": 4}),
        ("frank_wolfe", {"steps": 3, "variant": "soft", "move": "adamerging", "move_steps": 2, "scale": 0.5}),
        ("frank_wolfe", {"steps": 3, "variant": "soft", "move": "ties", "loss": "entropy"}),
    ],
)
def test_merges_that_search_with_gradients(merge, options):
    merge, data = getattr(merging, merge), odd_data()
    expected = merge(BASE, EXPERTS, model=Odd(), batches=data, **options)
    model = Odd()
    move(model)
    with elsewhere():
        same(merge(send(BASE), send(EXPERTS), model=model, batches=send(data), **options), expected)


def right(weights, x, y):
    return ((x @ weights["weight"].T).argmax(1) == y).float()


@pytest.mark.parametrize("options", [{}, {"angle": "part", "mutation_std": 0.1, "children": 3}])
def test_evolution(options):
    x, y = odd_data()["north"]
    score = functools.partial(right, x=x, y=y)
    how = {"evals": 12, "pop_size": 4, **options}
    expected = merging.m2n2(BASE, EXPERTS, score_points=score, **how)
    space = merging.FlatSpace(BASE)
    groups = [torch.arange(12) < 6, torch.arange(12) >= 6]
    grid = merging.map_elites(BASE, EXPERTS, score_points=score, groups=groups, evals=9, mutation_std=0.1)
    arc = merging.slerp_search(BASE, EXPERTS[:2], score_points=score, evals=5)
    start = space.flatten(EXPERTS[:1])[0]
    cloud = merging.cma_es(start, lambda row: -float(row.square().sum()), sigma=0.1, evals=30)
    with elsewhere():
        base, experts = send(BASE), send(EXPERTS)
        away = functools.partial(right, x=send(x), y=send(y))
        same(merging.m2n2(base, experts, score_points=away, **how), expected)
        ours = merging.map_elites(base, experts, score_points=away, groups=send(groups), evals=9, mutation_std=0.1)
        torch.testing.assert_close(fetch(ours.flat), grid.flat)
        torch.testing.assert_close(
            fetch(merging.slerp_search(base, experts[:2], score_points=away, evals=5).flat), arc.flat
        )
        ours = merging.cma_es(send(start), lambda row: -float(row.square().sum()), sigma=0.1, evals=30)
        torch.testing.assert_close(fetch(ours.flat), cloud.flat)
        same(merging.random_weights(base, 2)[1], merging.random_weights(BASE, 2)[1])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"estimator": "sampled", "n_samples": 2},
        {"estimator": "empirical"},
        {"head": "regression", "estimator": "sampled"},
        {"vectorized": False},
    ],
)
def test_what_is_measured_on_data(options):
    model, moved, batch = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3), odd_data()["north"]
    moved.load_state_dict(model.state_dict())
    move(moved)
    fisher = merging.diagonal_fisher(model, [batch], **options)

    def loss(model, batch):
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])

    grams, moments = merging.gram_matrices(model, [batch]), merging.squared_gradients(model, [batch], loss)
    with elsewhere():
        same(merging.diagonal_fisher(moved, [send(batch)], **options), fisher)
        same(merging.gram_matrices(moved, [send(batch)]), grams)
        same(merging.squared_gradients(moved, [send(batch)], loss), moments)


def test_a_stream_and_its_baselines(tmp_path):
    state, plain = merging.Opcm(send(BASE)), merging.Opcm(BASE)
    with elsewhere():
        for ours, theirs in zip(send(EXPERTS), EXPERTS, strict=True):
            assert state.add(ours).norm == pytest.approx(plain.add(theirs).norm)
        same(state.merged, plain.merged)
        for rule in ("average", "task_arithmetic", "ties"):
            *_, last = merging.continual(send(BASE), send(EXPERTS), rule=rule)
            *_, expected = merging.continual(BASE, EXPERTS, rule=rule)
            same(last, expected)
