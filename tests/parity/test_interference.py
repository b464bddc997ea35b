"""Merges against interference beside mergekit, and beside plain rewritings of the official codes' arithmetic.

Random and trained weights; the same random numbers where a method draws. What differs on purpose is said in the test.
"""

from types import SimpleNamespace

import pytest
import torch

from notebook_kit.merging import breadcrumbs, consensus, dare, della, magnitude_masks, pcb, pcb_scores, tall_masks, ties
from notebook_kit.weights import flatten, unflatten
from notebook_kit.zoo import digit_labels, language_experts

SHAPES = {"embed": (17, 8), "mlp.weight": (12, 8), "mlp.bias": (12,), "deep": (3, 4, 5)}


def random_models():
    base = {key: torch.randn(shape) for key, shape in SHAPES.items()}
    return base, [{key: t + 0.1 * torch.randn(t.shape) for key, t in base.items()} for _ in range(3)]


def trained_models():
    bed = digit_labels()
    return bed.base, bed.experts


def language_models():
    """One layer; shaken a little, since weights shipped in half precision have many equal magnitudes and even votes."""
    bed = language_experts()
    names = [key for key in bed.base if "layers.0" in key]

    def shake(t):
        return t * (1 + 1e-3 * torch.randn(t.shape))

    return tuple({key: shake(weights[key]) for key in names} for weights in (bed.base, *bed.experts[:3]))


@pytest.fixture(params=["random", "digits", "languages"])
def models(request):
    if request.param == "languages":
        base, *experts = language_models()
        return base, experts
    return random_models() if request.param == "random" else trained_models()


def close(ours, theirs, atol=1e-5):
    assert ours.keys() == theirs.keys()
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-5, atol=atol)


# ---------------------------------------------------------------- mergekit
@pytest.fixture(scope="module")
def mergekit():
    return pytest.importorskip("mergekit.merge_methods.generalized_task_arithmetic")


def by_mergekit(module, base, experts, sparsify, *, consensus=None, normalize=False, rescale=False, **values):
    """Run mergekit's own `merge_group` on each tensor; `values`: weight, density, gamma, epsilon, lambda."""
    method = module.GeneralizedTaskArithmeticMerge(
        consensus_method=consensus and module.ConsensusMethod(consensus),
        sparsification_method=module.SparsificationMethod(sparsify),
        default_normalize=normalize,
        default_rescale=rescale,
        method_name="test",
        method_pretty_name=None,
        method_reference_url=None,
    )
    n = len(experts)
    weight = values.pop("weight", [1.0] * n)
    each = {key: dict.fromkeys(range(n), values[key]) for key in ("density", "gamma", "epsilon") if key in values}
    each["weight"] = dict(enumerate(weight))
    shared = {"int8_mask": False, "normalize": normalize, "rescale": rescale, "lambda": values.get("scale", 1.0)}
    merged = {}
    for key, theta in base.items():
        entries = [SimpleNamespace(id=i, tensor=expert[key].clone()) for i, expert in enumerate(experts)]
        group = SimpleNamespace(base=SimpleNamespace(tensor=theta.clone()), non_base=entries)
        merged[key] = method.merge_group(group, **each, **shared)
    return merged


@pytest.fixture
def same_numbers(monkeypatch):
    """Both draw from one fixed sequence, so that both keep the same entries."""

    def sequence(shape):
        return (torch.arange(torch.Size(shape).numel()) * 0.618034 % 1).reshape(shape)

    monkeypatch.setattr(torch, "rand", lambda shape, **_: sequence(shape))
    monkeypatch.setattr(torch, "bernoulli", lambda p, **_: (sequence(p.shape) < p).to(p.dtype))


@pytest.mark.parametrize(("density", "gamma"), [(0.9, 0.01), (0.5, 0.1), (0.7, 0.0), (0.9, 0.4)])
@pytest.mark.parametrize("elect", ["none", "mass"])
@pytest.mark.parametrize("rescale", ["none", "norm"])
def test_breadcrumbs_is_mergekits(mergekit, models, density, gamma, elect, rescale):
    base, experts = models
    weight = [0.5 + i for i in range(len(experts))]
    for normalize in (False, True):
        theirs = by_mergekit(
            mergekit,
            base,
            experts,
            "magnitude_outliers",
            consensus="sum" if elect == "mass" else None,
            normalize=normalize,
            rescale=rescale == "norm",
            weight=weight,
            density=density,
            gamma=gamma,
            scale=0.6,
        )
        options = {"elect": elect, "rescale": rescale, "normalize": normalize, "weights": weight, "scale": 0.6}
        close(breadcrumbs(base, experts, density=density, gamma=gamma, **options), theirs)


@pytest.mark.parametrize(("density", "epsilon"), [(0.5, 0.15), (0.3, 0.2), (0.6, 0.0), (1.0, 0.15)])
@pytest.mark.parametrize("elect", ["none", "mass"])
@pytest.mark.parametrize("rescale", ["none", "norm"])
def test_della_is_mergekits_on_the_same_masks(mergekit, models, same_numbers, density, epsilon, elect, rescale):
    base, experts = models
    # Tensors with three axes: mergekit ranks along the second, we along the last.
    base = {key: t for key, t in base.items() if t.ndim <= 2}
    experts = [{key: expert[key] for key in base} for expert in experts]
    for normalize in (False, True):
        theirs = by_mergekit(
            mergekit,
            base,
            experts,
            "della_magprune",
            consensus="sum" if elect == "mass" else None,
            normalize=normalize,
            rescale=rescale == "norm",
            density=density,
            epsilon=epsilon,
            scale=0.8,
        )
        options = {"elect": elect, "rescale": rescale, "normalize": normalize, "scale": 0.8}
        close(della(base, experts, density=density, epsilon=epsilon, **options), theirs)


def test_where_mergekit_refuses_a_window_ours_shrinks(mergekit):
    base, experts = random_models()
    with pytest.raises(ValueError, match="Epsilon must be chosen"):
        by_mergekit(mergekit, base, experts, "della_magprune", density=0.9, epsilon=0.15)
    fits, too_wide = (della(base, experts, density=0.9, epsilon=epsilon) for epsilon in (0.1, 0.15))
    close(too_wide, fits)


@pytest.mark.parametrize("density", [0.2, 0.7])
@pytest.mark.parametrize(("rescale", "elect", "normalize"), [("norm", "none", False), ("norm", "mass", True)])
def test_dare_is_mergekits_on_the_same_masks(mergekit, models, same_numbers, density, rescale, elect, normalize):
    """mergekit's dare_ties sums by default; with `normalize` it is ours, and della with epsilon=0 does both."""
    base, experts = models
    consensus = "sum" if elect == "mass" else None
    options = {"consensus": consensus, "rescale": True, "density": density, "scale": 0.5}
    theirs = by_mergekit(mergekit, base, experts, "random", normalize=normalize, **options)
    close(dare(base, experts, density=density, rescale=rescale, elect=elect, scale=0.5), theirs)
    added = by_mergekit(mergekit, base, experts, "random", normalize=False, **options)
    close(
        della(base, experts, density=density, epsilon=0, rescale=rescale, elect=elect, normalize=False, scale=0.5),
        added,
    )


@pytest.mark.parametrize(("combine", "normalize"), [("mean", True), ("sum", False)])
@pytest.mark.parametrize("density", [0.2, 0.6, 1.0])
def test_ties_is_mergekits_on_trained_weights(mergekit, models, density, combine, normalize):
    base, experts = models
    options = {"consensus": "sum", "normalize": normalize, "density": density, "scale": 0.8}
    theirs = by_mergekit(mergekit, base, experts, "magnitude", **options)
    ours = ties(base, experts, density=density, scope="tensor", combine=combine, scale=0.8)
    assert float((flatten(ours) - flatten(theirs)).abs().gt(1e-5).float().mean()) < 1e-3  # equal magnitudes at the edge
    if models[0].keys() == SHAPES.keys():
        close(ours, theirs)


# ---------------------------------------------------------------- the official codes' arithmetic, written plainly
def stacked(base, experts):
    return torch.stack([flatten(expert) - flatten(base) for expert in experts])


def official_ties(tau, density, how, combine):
    """ties-merging's `merge_methods`, except that exactly ⌊density · d⌋ are kept, where it keeps one more."""
    kept = torch.zeros_like(tau)
    for row, out in zip(tau, kept, strict=True):
        where = row.abs().topk(int(density * len(row))).indices
        out[where] = row[where]
    share = kept**2 / kept.norm(dim=1, keepdim=True) ** 2
    if how == "mass":
        signs = kept.sum(0).sign()
    elif how == "normmass":
        signs = (kept.sign() * share).sum(0).sign()
    else:
        signs = kept[share.argmax(0), torch.arange(kept.shape[1])].sign()
    signs[signs == 0] = signs.sum().sign()
    if combine == "average":
        return kept.mean(0).abs() * signs
    agreeing = kept * torch.where(signs > 0, kept > 0, kept < 0)
    total = agreeing.sum(0)
    return total if combine == "sum" else total / (agreeing != 0).sum(0).clamp(min=1)


@pytest.mark.parametrize("elect", ["mass", "normmass", "normfrac"])
@pytest.mark.parametrize("combine", ["mean", "sum", "average"])
def test_elections_are_the_official_ones(models, elect, combine):
    base, experts = models
    for density in (0.2, 0.7):
        merged = flatten(base) + 0.9 * official_ties(stacked(base, experts), density, elect, combine)
        ours = ties(base, experts, density=density, scale=0.9, elect=elect, combine=combine)
        off = (flatten(ours) - merged).abs() > 1e-5
        assert float(off.float().mean()) < 2e-4  # equal magnitudes at the edge, and votes even up to rounding


def clamp_rows(x, low_share, high_share):
    d, rows = x.shape[1], x.sort(dim=1).values
    return x.clamp(rows[:, int(d * low_share), None], rows[:, int(d * (1 - high_share) - 1), None])


def unit(x):
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    return (x - low) / (high - low)


def official_pcb(tau, ratio, q, inter):
    magnitude = clamp_rows(tau.abs(), q, q)
    intra = (len(tau) * unit(magnitude) ** 2).exp()
    votes = tau if inter == "sum" else tau.sign() * unit(magnitude)
    balance = intra * (tau * votes.sum(0)).tanh()
    kept = unit(clamp_rows(balance, 1 - ratio, 0))
    clipped = tau.sign() * magnitude
    return kept, (clipped * kept).sum(0) / kept.sum(0).clamp(min=1e-12)


@pytest.mark.parametrize("inter", ["sum", "votes"])
@pytest.mark.parametrize(("density", "clip"), [(0.1, 1e-4), (0.05, 0.01), (0.4, 0.0)])
def test_pcb_is_the_official_one(models, inter, density, clip):
    base, experts = models
    kept, merged = official_pcb(stacked(base, experts), density, clip, inter)
    ours = pcb(base, experts, density=density, clip=clip, inter=inter, scale=1.2)
    close(ours, unflatten(flatten(base) + 1.2 * merged, base), atol=2e-5)
    scores = pcb_scores(base, experts, density=density, clip=clip, inter=inter).kept
    flat = torch.cat([s.reshape(len(experts), -1) for s in scores.values()], dim=1)
    torch.testing.assert_close(flat, kept, rtol=1e-4, atol=1e-5)


def test_pcb_in_the_papers_words():
    """Both softmaxes over the parameters, dropped and normalized as the official code does."""
    base, experts = random_models()
    tau = stacked(base, experts).double()
    intra = (3 * unit(tau**2)).softmax(dim=1)
    inter = sum(unit(tau * row).softmax(dim=1) for row in tau)
    kept = unit(clamp_rows(intra * inter, 1 - 0.3, 0))
    merged = flatten(base) + ((tau * kept).sum(0) / kept.sum(0).clamp(min=1e-12)).float()
    ours = pcb(base, experts, density=0.3, clip=0.0, intra="softmax", inter="pairwise_softmax")
    close(ours, unflatten(merged, base), atol=2e-5)


def official_masks(base, experts, merged, threshold):
    """tall_masks' comparison, in the space of weights as it is written there."""
    start, ends = flatten(base), torch.stack([flatten(expert) for expert in experts])
    return (start - ends).abs() > (start + merged - ends).abs() * threshold


@pytest.mark.parametrize("threshold", [0.2, 0.4, 1.0])
@pytest.mark.parametrize("base_merge", ["sum", "ties"])
def test_masks_and_consensus_are_the_official_ones(models, threshold, base_merge):
    base, experts = models
    tau = stacked(base, experts)
    merged = tau.sum(0) if base_merge == "sum" else official_ties(tau, 0.2, "mass", "sum")
    masks = official_masks(base, experts, merged, threshold)
    ours = tall_masks(base, experts, threshold=threshold, base_merge=base_merge)
    flat = torch.stack([torch.cat([ours.mask(i)[k].reshape(-1) for k in ours.merged]) for i in range(len(experts))])
    assert float((flat != masks).float().mean()) < 2e-3  # where both sides are equal up to rounding
    start = flatten(base)
    back = flatten(ours.expert(1))
    torch.testing.assert_close(back, start + flat[1] * merged, rtol=1e-4, atol=1e-4)
    for k in (1, 2):
        agreed = flat.sum(0) >= k
        theirs = start + 0.3 * agreed * merged
        got = flatten(consensus(base, experts, k=k, scale=0.3, threshold=threshold, base_merge=base_merge))
        torch.testing.assert_close(got, theirs, rtol=1e-4, atol=1e-4)


def test_magnitude_masks_are_the_official_ones(models):
    base, experts = models
    tau = stacked(base, experts)
    ours = magnitude_masks(base, experts, density=0.1)
    for i, row in enumerate(tau):
        mask = torch.cat([ours.mask(i)[key].reshape(-1) for key in ours.merged])
        threshold = row.abs().kthvalue(len(row) - int(0.1 * len(row)) + 1).values
        assert torch.equal(mask, row.abs() >= threshold) or int(mask.sum()) == int(0.1 * len(row))
