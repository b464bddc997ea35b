"""TALL-masks and consensus: the card's numbers, optimal masks, bits on disk, and files that lie."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from notebook_kit.checkpoints import BadCheckpoint, load, save
from notebook_kit.merging import (
    MaskedExperts,
    choose_thresholds,
    consensus,
    magnitude_masks,
    tall_masks,
    task_arithmetic,
    ties,
)
from notebook_kit.merging.masked_experts import pack, unpack
from notebook_kit.weights import flatten

ZERO = {"w": torch.zeros(3)}
PAIR = [{"w": torch.tensor([2.0, 0.5, 0])}, {"w": torch.tensor([0.1, 0.5, 1])}]


def models(seed=0, n_experts=3):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=g)

    def make():
        return {"a": draw(5, 7), "b": draw(9), "s": draw(), "e": torch.zeros(0, 2), "n": torch.tensor([3])}

    base = make()
    experts = [make() for _ in range(n_experts)]
    return base, experts


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


# ---------------------------------------------------------------- masks
def test_the_hand_worked_example():
    strict, loose = (tall_masks(ZERO, PAIR, threshold=t) for t in (1.0, 0.4))
    assert [strict.mask(i)["w"].tolist() for i in (0, 1)] == [[True, False, False], [False, False, True]]
    assert [loose.mask(i)["w"].tolist() for i in (0, 1)] == [[True, True, False], [False, True, True]]
    torch.testing.assert_close(loose.expert(0)["w"], torch.tensor([2.1, 1, 0]))
    torch.testing.assert_close(loose.unmasked(0.5)["w"], torch.tensor([1.05, 0.5, 0.5]))
    assert loose.claims()["w"].tolist() == [1, 2, 1]
    assert loose.densities() == pytest.approx([2 / 3, 2 / 3])


def test_a_lone_expert_comes_back():
    base, experts = models(n_experts=1)
    for threshold in (0.0, 0.4, 2.0):
        back = tall_masks(base, experts, threshold=threshold).expert(0)
        for key in ("a", "b", "s"):
            torch.testing.assert_close(back[key], experts[0][key])
        assert torch.equal(back["n"], base["n"])


@given(st.integers(0, 100), st.floats(0, 2))
@settings(deadline=None, max_examples=20)
def test_disjoint_experts_come_back_exactly(seed, threshold):
    g = torch.Generator().manual_seed(seed)
    owner = torch.randint(0, 4, (30,), generator=g)
    base = {"w": torch.zeros(30)}
    experts = [{"w": torch.where(owner == i, torch.randn(30, generator=g), 0)} for i in range(3)]
    masked = tall_masks(base, experts, threshold=threshold)
    for i, expert in enumerate(experts):
        assert torch.equal(masked.expert(i)["w"], expert["w"])
        assert torch.equal(masked.mask(i)["w"], expert["w"] != 0)


@given(st.integers(0, 100), st.floats(0, 2), st.floats(0, 2))
@settings(deadline=None, max_examples=20)
def test_a_higher_threshold_claims_less(seed, one, two):
    base, experts = models(seed)
    loose, strict = (tall_masks(base, experts, threshold=t) for t in sorted((one, two)))
    for i in range(3):
        assert all((loose.mask(i)[key] | ~strict.mask(i)[key]).all() for key in ("a", "b", "s"))
    assert all(a >= b for a, b in zip(loose.densities(), strict.densities(), strict=True))


def test_threshold_one_is_nearest_in_l1():
    base, experts = models(4)
    masked = tall_masks(base, experts, threshold=1.0)
    for i, expert in enumerate(experts):
        start, goal, merged = flatten(base), flatten(expert), flatten(masked.merged)
        mask = torch.cat([masked.mask(i)[key].reshape(-1) for key in masked.merged])
        away = lambda m: (start + m * merged - goal).abs().sum()  # noqa: B023, E731
        best = away(mask)
        for p in range(len(mask)):
            flipped = mask.clone()
            flipped[p] ^= True
            assert away(flipped) >= best - 1e-4
        assert all(away(torch.rand(len(mask)) < 0.5) > best for _ in range(20))


def test_masks_of_two_at_threshold_one_are_disjoint_and_scale_free():
    base, experts = models(5, n_experts=2)
    masked = tall_masks(base, experts, threshold=1.0)
    assert not any((masked.mask(0)[key] & masked.mask(1)[key]).any() for key in masked.merged)
    zero = {key: torch.zeros_like(base[key]) for key in masked.merged}
    taus = [{key: e[key] - base[key] for key in zero} for e in experts]
    for factor in (1.0, 8.0):
        again = tall_masks(zero, [{key: t * factor for key, t in tau.items()} for tau in taus], threshold=1.0)
        assert all(torch.equal(again.mask(i)[key], masked.mask(i)[key]) for i in (0, 1) for key in masked.merged)


def test_ties_as_the_multitask_vector():
    base, experts = models(6)
    masked = tall_masks(base, experts, base_merge="ties", density=0.5)
    merged = ties(base, experts, density=0.5, combine="sum")
    for key in ("a", "b", "s"):
        torch.testing.assert_close(masked.unmasked()[key], merged[key], rtol=1e-5, atol=1e-5)
        expected = (experts[1][key] - base[key]).abs() > 0.4 * (masked.merged[key] - experts[1][key] + base[key]).abs()
        assert (masked.mask(1)[key] == expected).float().mean() > 0.97


def test_magnitude_masks_keep_the_largest():
    base, experts = models(7)
    masked = magnitude_masks(base, experts, density=0.2)
    tau = flatten(experts[0]) - flatten(base)
    mask = torch.cat([masked.mask(0)[key].reshape(-1) for key in masked.merged])
    assert int(mask.sum()) == int(0.2 * len(tau))
    assert tau[mask].abs().min() >= tau[~mask].abs().max()


def test_thresholds_are_chosen_for_each_expert():
    base, experts = models(8)
    wanted = [0.2, 0.6, 0.3]

    def score(weights, i):
        goal = tall_masks(base, experts, threshold=wanted[i]).expert(i)
        return -float((flatten(weights) - flatten(goal)).abs().sum())

    found, table = choose_thresholds(base, experts, score)
    assert found == wanted
    assert [len(row) for row in table] == [3] * 5
    assert [max(column) for column in zip(*table, strict=True)] == [0, 0, 0]
    assert choose_thresholds(base, experts, lambda weights, i: 1.0, grid=(0.5, 0.2))[0] == [0.5] * 3
    masked = tall_masks(base, experts, thresholds=found)
    for i, threshold in enumerate(wanted):
        assert same(masked.expert(i), tall_masks(base, experts, threshold=threshold).expert(i))
    with pytest.raises(ValueError, match="grid must hold at least one threshold"):
        choose_thresholds(base, experts, score, grid=())
    with pytest.raises(ValueError, match=r"score .* gave NaN"):
        choose_thresholds(base, experts, lambda weights, i: float("nan"))


def test_names_and_places():
    base, experts = models(9)
    masked = tall_masks(base, experts, names=["x", "y", "z"])
    assert same(masked.expert("y"), masked.expert(1))
    assert len(masked) == 3
    assert "y 0." in repr(masked)
    for missing in ("w", 3, -1):
        with pytest.raises(ValueError, match=r"no expert .*: there are 0 to 2, called x, y, z"):
            masked.expert(missing)
    with pytest.raises(ValueError, match="names must have one entry per expert, 3, got 1"):
        tall_masks(base, experts, names=["x"])
    with pytest.raises(ValueError, match="names must differ, got x, x, z"):
        tall_masks(base, experts, names=["x", "x", "z"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    def cast(weights):
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in weights.items()}

    base, experts = models(10)
    masked = tall_masks(cast(base), [cast(expert) for expert in experts])
    back = masked.expert(0)
    assert {key: t.dtype for key, t in back.items()} == {key: t.dtype for key, t in cast(base).items()}
    wide = tall_masks(
        {k: v.float() for k, v in cast(base).items()}, [{k: v.float() for k, v in cast(e).items()} for e in experts]
    )
    torch.testing.assert_close(back["a"].float(), wide.expert(0)["a"], rtol=2e-2, atol=2e-2)


# ---------------------------------------------------------------- bits and files
@given(st.lists(st.booleans(), max_size=40))
@settings(deadline=None, max_examples=40)
def test_packing_is_the_identity(bits):
    mask = torch.tensor(bits, dtype=torch.bool)
    packed = pack(mask)
    assert packed.numel() == (len(bits) + 7) // 8
    assert torch.equal(unpack(packed, mask.shape), mask)


def test_what_is_saved_is_what_is_loaded(tmp_path):
    base, experts = models(11)
    masked = tall_masks(base, experts, names=["ä/b", "y", "z"])
    back = MaskedExperts.load(masked.save(tmp_path / "masked.safetensors"))
    assert back.names == masked.names
    assert all(same(back.expert(i), masked.expert(i)) for i in range(3))
    assert back.sizes() == masked.sizes()


def test_sizes_are_measured(tmp_path):
    base = {"w": torch.randn(1001, 100), "b": torch.randn(3)}
    experts = [{key: t + torch.randn(t.shape) for key, t in base.items()} for _ in range(8)]
    masked = tall_masks(base, experts)
    sizes = masked.sizes()
    assert sizes["masks"] == 8 * (-(-100_100 // 8) + 1)
    assert sizes["base"] == sizes["merged"] == 4 * 100_103
    assert sizes["apart"] == 9 * sizes["base"]
    assert sizes["ratio"] == pytest.approx(9 / 2.25, rel=1e-3)
    assert masked.save(tmp_path / "m.safetensors").stat().st_size == pytest.approx(sizes["total"], abs=3000)


def test_files_that_do_not_fit_are_refused(tmp_path):
    base, experts = models(12)
    path = tall_masks(base, experts).save(tmp_path / "good.safetensors")
    good = load(path)
    bad = functools.partial(save, path=tmp_path / "bad.safetensors")
    cases = [
        (base, "it has no tensor 'names'"),
        ({k: v for k, v in good.items() if k != "mask 1/a"}, r"'mask 1/a' must hold 5 bytes"),
        (good | {"mask 1/a": torch.zeros(9, dtype=torch.uint8)}, r"'mask 1/a' must hold 5 bytes"),
        (good | {"mask 3/a": good["mask 1/a"]}, "masks for other experts than its 3 names"),
        (good | {"merged/a": torch.zeros(2)}, "'merged/a' has no tensor of its shape in the base"),
        (good | {"names": torch.zeros(4, dtype=torch.uint8)}, "'names' is no list of texts"),
        (good | {"names": torch.tensor([*b"3"], dtype=torch.uint8)}, "'names' is no list of texts"),
    ]
    for weights, text in cases:
        bad(weights)
        with pytest.raises(BadCheckpoint, match=text):
            MaskedExperts.load(tmp_path / "bad.safetensors")


# ---------------------------------------------------------------- consensus
def test_k_zero_is_the_plain_merge_and_k_above_all_is_base():
    base, experts = models(13)
    added, elected = (
        task_arithmetic(base, experts, scale=0.6),
        ties(base, experts, density=0.5, combine="sum", scale=0.6),
    )
    none = consensus(base, experts, k=0, scale=0.6)
    voted = consensus(base, experts, k=0, scale=0.6, base_merge="ties", density=0.5)
    for key in ("a", "b", "s"):
        torch.testing.assert_close(none[key], added[key], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(voted[key], elected[key], rtol=1e-5, atol=1e-5)
    assert same(consensus(base, experts, k=4, scale=0.6), base)


def test_what_k_drops():
    catastrophic = {"w": torch.tensor([2.0, 0.5, 0, 1.0])}, {"w": torch.tensor([0.0, 0.5, 0, -1.2])}
    base = {"w": torch.zeros(4)}
    # claims at threshold 0.4: first alone, both, none (nothing changed), both
    by_k = {k: consensus(base, list(catastrophic), k=k, scale=1.0)["w"].tolist() for k in range(4)}
    assert by_k[0] == by_k[1] == pytest.approx([2, 1, 0, -0.2])
    assert by_k[2] == pytest.approx([0, 1, 0, -0.2])
    assert by_k[3] == [0, 0, 0, 0]


def test_the_kept_share_falls_with_k_and_the_histogram_adds_up():
    base, experts = models(14, n_experts=5)
    claims = tall_masks(base, experts).claims()
    counts = torch.cat([c.reshape(-1) for c in claims.values()]).bincount(minlength=6)
    assert int(counts.sum()) == 35 + 9 + 1
    kept = [sum(int((m[key] != base[key]).sum()) for key in ("a", "b", "s"))
            for m in (consensus(base, experts, k=k) for k in range(7))]  # fmt: skip
    assert kept == sorted(kept, reverse=True)
    assert kept == [int(counts[k:].sum()) for k in range(7)]
    loose = consensus(base, experts, thresholds=[0.1, 0.2, 0.3, 0.4, 0.5])
    expected = tall_masks(base, experts, thresholds=[0.1, 0.2, 0.3, 0.4, 0.5]).claims()
    assert torch.equal(loose["a"] != base["a"], expected["a"] >= 2)
