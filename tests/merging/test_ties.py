"""TIES: the card's numbers, exact counts, ties of every kind, and the chunked code against a plain one."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from notebook_kit.merging import ranks, selection, ties
from notebook_kit.merging.ties import statistics
from notebook_kit.weights import IncompatibleWeights
from tests.merging import plain

T = torch.tensor([[3, -1, 0.2, -2], [1, 2, -0.1, -1], [-2, 1.5, 0.3, 0.5]])
ZERO = {"w": torch.zeros(4)}
ROWS = [{"w": row} for row in T]


@pytest.fixture
def small_pieces(monkeypatch):
    """Small enough that every path of the selection runs: chunks that end inside tensors, samples, brackets."""
    monkeypatch.setattr(selection, "CHUNK", 7)
    monkeypatch.setattr(ranks, "SAMPLE", 16)


def merged(*rows, **settings):
    base = {"w": torch.zeros(len(rows[0]))}
    return ties(base, [{"w": torch.tensor(row)} for row in rows], **settings)["w"].tolist()


# ---------------------------------------------------------------- by hand
@pytest.mark.parametrize(
    ("density", "combine", "expected"),
    [
        (1, "mean", [2, 1.75, 0.25, -1.5]),
        (1, "sum", [4, 3.5, 0.5, -3]),
        (1, "max", [3, 2, 0.3, -2]),
        (0.5, "mean", [3, 1.75, 0, -1.5]),
        (0.5, "sum", [3, 3.5, 0, -3]),
        (0.5, "max", [3, 2, 0, -2]),
        (0, "mean", [0, 0, 0, 0]),
    ],
)
def test_the_hand_worked_example(density, combine, expected):
    result = ties(ZERO, ROWS, density=density, combine=combine)["w"]
    torch.testing.assert_close(result, torch.tensor(expected, dtype=torch.float32))


def test_scale_base_and_scaled_task_vectors():
    base = {"w": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    experts = [{"w": base["w"] + row} for row in T]
    torch.testing.assert_close(ties(base, experts, density=1, scale=2.0)["w"], torch.tensor([5, 5.5, 3.5, 1.0]))
    triple = ties(ZERO, [{"w": 3 * row} for row in T], density=0.5)["w"]
    torch.testing.assert_close(triple, 3 * ties(ZERO, ROWS, density=0.5)["w"])


def test_elections_by_mass_by_count_and_none():
    rows = ([5.0, 1.0], [-1.0, -1.0], [-1.0, -2.0])
    assert merged(*rows, density=1) == [5, -1.5]
    assert merged(*rows, density=1, elect="count") == [-1, -1.5]
    assert merged(*rows, density=1, elect="none") == pytest.approx([1, -2 / 3])
    assert merged(*rows, density=1, elect="none", combine="sum") == [3, -2]
    assert merged(*rows, density=1, elect="none", combine="max") == [5, -2]


def test_without_election_zeros_do_not_count_in_the_mean():
    assert merged([4.0, 1.0], [2.0, 3.0], density=0.5, elect="none") == [4, 3]


def test_expert_weights_come_before_the_election():
    rows = ([2.0, 2.0], [-3.0, 1.0])
    assert merged(*rows, density=1) == [-3, 1.5]
    # 2 · 2 beats 3; the mean of agreeing entries divides by the weights of those that agree
    assert merged(*rows, density=1, weights=[2.0, 1.0]) == pytest.approx([2, 5 / 3])
    assert merged(*rows, density=1, weights=[2.0, 1.0], combine="sum") == [4, 5]
    assert merged(*rows, density=1, weights=[1.0, 0.0]) == [2, 2]
    assert merged(*rows, density=1, weights=[1.0, -1.0]) == pytest.approx([2.5, 2])


def test_elections_by_share_of_the_squared_norm():
    # ‖τ‖² = 1 + 4 + 9 = 14, 9 + 1 + 0 = 10, 1 + 36 + 1 = 38
    rows = ([1.0, -2.0, 3.0], [3.0, -1.0, 0.0], [-1.0, 6.0, -1.0])
    # first: 1/14 + 9/10 against 1/38; second: 4/14 + 1/10 against 36/38; third: 9/14 against 1/38
    assert merged(*rows, density=1, elect="normmass") == [2, 6, 3]
    assert merged(*rows, density=1, elect="normfrac") == [2, 6, 3]
    # mass weighs raw sizes; a large task vector outvotes a small one, until norms are divided out
    rows = ([-100.0, 100.0, 100.0], [1.0, 1.0, 0.1])
    assert merged(*rows, density=1) == pytest.approx([-100, 50.5, 50.05])
    assert merged(*rows, density=1, elect="normmass") == pytest.approx([1, 50.5, 50.05])
    # four small shares outvote one large one only where they are summed
    rows = ([3.0, 9.0], [3.0, 9.0], [3.0, 9.0], [-1.0, 1.0])
    assert merged(*rows, density=1, elect="normmass")[0] == -1  # 3 · 9/90 < 1/2
    rows = ([5.0, 9.0], [5.0, 9.0], [5.0, 9.0], [-1.0, 1.0])
    assert merged(*rows, density=1, elect="normmass")[0] == 5  # 3 · 25/106 > 1/2
    assert merged(*rows, density=1, elect="normfrac")[0] == -1  # 25/106 < 1/2


def test_norms_follow_the_scope_and_an_expert_of_zeros_has_no_vote():
    base = {"a": torch.zeros(1), "b": torch.zeros(1)}
    up, down = {"a": torch.tensor([1.0]), "b": torch.tensor([9.0])}, {"a": torch.tensor([-1.0]), "b": torch.zeros(1)}
    assert ties(base, [up, down], density=1, elect="normmass")["a"].item() == -1  # 1/82 against 1
    assert ties(base, [up, up, down], density=1, elect="normmass", scope="tensor")["a"].item() == 1  # 1 + 1 against 1
    for elect in ("normmass", "normfrac"):
        assert ties(base, [up, base], density=1, elect=elect)["a"].item() == 1
    tied = {"head": base["a"], "a": base["a"]}
    experts = [{"head": e["a"], "a": e["a"]} for e in (up, down)]
    assert statistics(tied, experts, density=1.0, elect="normmass")["norms"]["head"] == [1.0, 1.0]


def test_an_oracle_replaces_the_election():
    signs = {"w": torch.tensor([-7.0, 1.0, 0.0, 0.1])}
    assert ties(ZERO, ROWS, density=1, signs=signs)["w"].tolist() == [-2, 1.75, 0, 0.5]
    assert ties(ZERO, ROWS, density=1, signs=signs, combine="sum")["w"].tolist() == [-2, 3.5, 0, 0.5]
    own = {"w": ties(ZERO, ROWS, density=1)["w"]}
    assert torch.equal(ties(ZERO, ROWS, density=1, signs=own, elect="count")["w"], own["w"])
    with pytest.raises(IncompatibleWeights, match=r"signs has no tensor 'w'; give one for each"):
        ties(ZERO, ROWS, signs={})
    with pytest.raises(IncompatibleWeights, match=r"signs\['w'\] has shape \[2\], base has \[4\]"):
        ties(ZERO, ROWS, signs={"w": torch.zeros(2)})


def test_the_plain_average_is_the_ablation_of_the_disjoint_mean():
    rows = ([3.0, -1.0], [1.0, 2.0], [-2.0, 2.0])
    assert merged(*rows, density=1, elect="none", combine="average") == pytest.approx([2 / 3, 1])
    assert merged(*rows, density=1, combine="average") == pytest.approx([2 / 3, 1])
    assert merged(*rows, density=1, elect="count", combine="average") == pytest.approx([2 / 3, 1])
    assert merged(*rows, density=0.5, elect="none", combine="average", weights=[1, 1, 2]) == pytest.approx(
        [3 / 4, 6 / 4]
    )
    signs = {"w": torch.tensor([-1.0, 1.0])}
    base, experts = {"w": torch.zeros(2)}, [{"w": torch.tensor(row)} for row in rows]
    result = ties(base, experts, density=1, signs=signs, combine="average")["w"]
    assert result.tolist() == pytest.approx(
        [-2 / 3, 1]
    )  # the size of the mean, the oracle's sign: as the official code


# ---------------------------------------------------------------- even votes
def test_an_even_vote_takes_the_sign_of_the_majority():
    # parameter 0: +2 and -2 cancel; the others say which sign is the majority's
    assert merged([2.0, 1.0, 1.0], [-2.0, 1.0, 1.0], density=1) == [2, 1, 1]
    assert merged([2.0, -1.0, -1.0], [-2.0, -1.0, -1.0], density=1) == [-2, -1, -1]
    assert merged([2.0, 1.0, -1.0], [-2.0, 1.0, -1.0], density=1) == [2, 1, -1]  # even again: plus
    assert merged([2.0, -1.0, -1.0], [-2.0, -1.0, -1.0], density=1, combine="max") == [-2, -1, -1]
    assert merged([5.0, -1.0, -1.0], [-2.0, -1.0, -1.0], density=1, elect="count") == [-2, -1, -1]


def test_a_parameter_nobody_kept_is_no_even_vote():
    assert merged([2.0, 0.0, -1.0], [-2.0, 0.0, -1.0], density=1) == [-2, 0, -1]


def test_the_majority_is_counted_over_the_whole_model():
    base = {"a": torch.zeros(1), "b": torch.zeros(3)}
    up = {"a": torch.tensor([2.0]), "b": torch.full((3,), -1.0)}
    down = {"a": torch.tensor([-2.0]), "b": torch.full((3,), -1.0)}
    result = ties(base, [up, down], density=1)
    assert result["a"].item() == -2
    assert ties({"a": base["a"]}, [{"a": up["a"]}, {"a": down["a"]}], density=1)["a"].item() == 2


# ---------------------------------------------------------------- how many are kept
@given(
    st.lists(st.integers(-4, 4), min_size=1, max_size=60),
    st.floats(0, 1),
    st.sampled_from(["model", "tensor"]),
    st.integers(0, 60),
)
@settings(deadline=None, max_examples=60)
def test_exactly_the_share_is_kept_even_where_magnitudes_tie(values, density, scope, cut):
    values = [value or 5 for value in values]  # a kept zero could not be told from a dropped one
    tau = torch.tensor(values, dtype=torch.float32)
    cut = min(cut, len(tau))
    base = {"a": torch.zeros(cut), "b": torch.zeros(len(tau) - cut)}
    merged = ties(base, [{"a": tau[:cut], "b": tau[cut:]}], density=density, scope=scope)
    kept = [int(merged[key].count_nonzero()) for key in base]
    if scope == "model":
        assert sum(kept) == int(density * len(tau))
        result = torch.cat([merged["a"], merged["b"]])
        dropped, left = tau.abs()[result == 0], tau.abs()[result != 0]
        assert not len(dropped) or not len(left) or dropped.max() <= left.min()
    else:
        assert kept == [int(density * cut), int(density * (len(tau) - cut))]


def test_layers_compete_in_the_model_and_not_in_the_tensor():
    base = {"small": torch.zeros(4), "large": torch.zeros(4)}
    expert = {"small": torch.arange(1.0, 5.0), "large": 10 * torch.arange(1.0, 5.0)}
    by_model = ties(base, [expert], density=0.5)
    by_tensor = ties(base, [expert], density=0.5, scope="tensor")
    assert [int(by_model[key].count_nonzero()) for key in base] == [0, 4]
    assert by_tensor["small"].tolist() == [0, 0, 3, 4]
    assert by_tensor["large"].tolist() == [0, 0, 30, 40]


def test_an_untouched_expert_and_an_untouched_tensor():
    base = {"a": torch.randn(5), "b": torch.randn(5)}
    assert all(torch.equal(t, base[k]) for k, t in ties(base, [base, base], density=0.5).items())
    moved = {**base, "b": base["b"] + 1}
    result = ties(base, [moved, base], density=0.5)
    assert torch.equal(result["a"], base["a"])
    torch.testing.assert_close(result["b"], moved["b"])


def test_tied_tensors_count_once_and_stay_equal():
    net = torch.nn.Sequential(torch.nn.Embedding(6, 4), torch.nn.Linear(4, 6))
    net[1].weight = net[0].weight
    base = net.state_dict()
    expert = {key: tensor.clone() for key, tensor in base.items()}
    change = torch.randint(1, 4, (6, 4), generator=torch.Generator().manual_seed(0)) * 1.0  # many equal magnitudes
    base = {key: torch.zeros_like(tensor) for key, tensor in base.items()}
    base["1.weight"] = base["0.weight"]
    expert = {"0.weight": change, "1.weight": change, "1.bias": torch.full((6,), 9.0)}
    result = ties(type(net.state_dict())(base), [expert], density=0.5)
    assert int(result["0.weight"].count_nonzero() + result["1.bias"].count_nonzero()) == 15  # half of 24 + 6
    assert torch.equal(result["0.weight"], result["1.weight"])


# ---------------------------------------------------------------- identities
@given(st.integers(1, 5), st.floats(0.05, 1), st.integers(0, 10**6))
@settings(deadline=None, max_examples=40)
def test_properties(count, density, seed):
    g = torch.Generator().manual_seed(seed)
    base = {"a": torch.randn(3, 5, generator=g), "b": torch.randn(4, generator=g)}
    experts = [{key: t + torch.randn(t.shape, generator=g) for key, t in base.items()} for _ in range(count)]

    def flat(weights):
        return torch.cat([weights[k].reshape(-1) - base[k].reshape(-1) for k in base])

    tau = torch.stack([flat(expert) for expert in experts])
    kept = torch.stack([plain.trim(row, density) for row in tau])
    star = flat(ties(base, experts, density=density))
    assert int((star.abs() > 1e-6).sum()) <= count * int(density * 19)
    assert (star.abs() <= tau.abs().amax(dim=0) + 1e-5).all()
    gamma = kept.sum(dim=0).sign()
    assert (star * gamma >= -1e-6).all()
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(flat(ties(base, [experts[0]] * count, density=density)), kept[0], **close)
    every = ties(base, experts, density=1, elect="none", combine="sum")
    torch.testing.assert_close(flat(every), tau.sum(dim=0), **close)
    torch.testing.assert_close(flat(ties(base, experts[:1], density=1)), tau[0], **close)


# ---------------------------------------------------------------- against the plain one
OPTIONS = list(itertools.product(["model", "tensor"], ["mass", "count", "none"], ["mean", "sum", "max"]))


@pytest.mark.parametrize(("scope", "elect", "combine"), OPTIONS)
@pytest.mark.parametrize("integers", [False, True])
def test_chunks_and_brackets_change_nothing(scope, elect, combine, integers, small_pieces):
    g = torch.Generator().manual_seed(1)
    shapes = {"a": (13, 9), "b": (5,), "empty": (0,), "c": (), "d": (40, 11)}
    if integers:  # equal magnitudes and even votes everywhere

        def draw(shape):
            return torch.randint(-5, 6, shape, generator=g).float()
    else:

        def draw(shape):
            return torch.randn(shape, generator=g)

    base = {key: torch.zeros(shape) for key, shape in shapes.items()}
    experts = [{key: draw(shape) for key, shape in shapes.items()} for _ in range(4)]
    for density, weights in ((0.2, None), (0.7, [1.0, 2.0, 0.5, 1.0])):
        options = {"density": density, "scope": scope, "elect": elect, "combine": combine, "weights": weights}
        ours, reference = ties(base, experts, **options), plain.ties(base, experts, **options)
        for key in base:
            torch.testing.assert_close(ours[key], reference[key], rtol=1e-5, atol=1e-6)


@given(st.integers(0, 10**6), st.floats(0.001, 0.999), st.booleans())
@settings(deadline=None, max_examples=60)
def test_the_bracketed_threshold_is_the_exact_one(seed, density, integers):
    g = torch.Generator().manual_seed(seed)
    tau = torch.randint(-9, 10, (500,), generator=g).float() if integers else torch.randn(500, generator=g)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "CHUNK", 64)
        patch.setattr(ranks, "SAMPLE", 32)
        trim = selection._select({"w": torch.zeros(500)}, {"w": tau}, ["w"], lambda d: int(density * d))
    k = int(density * 500)
    if k == 0:
        assert trim.threshold == float("inf")
    else:
        assert trim.threshold == float(tau.abs().sort(descending=True).values[k - 1])
        kept = int((tau.abs() >= trim.threshold).sum()) - sum(trim.drop.values())
        assert kept == k or trim.threshold == 0


@pytest.mark.parametrize("bracket", [(100.0, 200.0), (0.0, 1e-3), (2.0, 2.0)])
def test_a_sample_that_misleads_costs_time_and_nothing_else(bracket, small_pieces, monkeypatch):
    base = {"w": torch.zeros(300)}
    experts = [{"w": torch.randn(300)} for _ in range(2)]
    calls = []
    tally = ranks.tally
    monkeypatch.setattr(selection, "_bracket", lambda *_: bracket)
    monkeypatch.setattr(ranks, "tally", lambda m, brackets: calls.extend(brackets) or tally(m, brackets))
    result = ties(base, experts, density=0.3)
    assert calls == [bracket, ranks.EVERYTHING] * 2
    torch.testing.assert_close(result["w"], plain.ties(base, experts, density=0.3)["w"])


def test_a_bracket_at_the_real_sizes_is_narrow_and_right():
    g = torch.Generator().manual_seed(0)
    tau = torch.randn(400_000, generator=g)
    base, expert = {"w": torch.zeros(400_000), "e": torch.zeros(0)}, {"w": tau, "e": torch.zeros(0)}
    low, high = selection._bracket(base, expert, {"w": 400_000, "e": 0}, 0.2)
    exact = float(tau.abs().sort(descending=True).values[80_000 - 1])
    assert low < exact < high
    assert float(((tau.abs() >= low) & (tau.abs() <= high)).float().mean()) < 0.03
    assert int(ties(base, [expert], density=0.2)["w"].count_nonzero()) == 80_000


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_other_precisions(dtype, scope, small_pieces):
    base = {"a": torch.randn(12, 9).to(dtype), "b": torch.randn(30).to(dtype)}
    experts = [{key: (t + torch.randn(t.shape)).to(dtype) for key, t in base.items()} for _ in range(3)]
    if dtype == torch.float64:
        experts = [{key: t + torch.randn(t.shape, dtype=dtype) * 1e-9 for key, t in base.items()} for _ in range(3)]
        result = ties(base, experts, density=0.5, scope=scope)
        n = sum(int((result[key] != base[key]).sum()) for key in base)
        assert 0 < n <= 3 * 69
        return
    ours, reference = (f(base, experts, density=0.5, scope=scope) for f in (ties, plain.ties))
    for key in base:
        torch.testing.assert_close(ours[key].float(), reference[key].float(), rtol=1e-2, atol=1e-2)
        assert (ours[key] == reference[key]).float().mean() > 0.97  # float32 sums round once where float64 does not


def test_statistics_are_what_a_streaming_merge_needs():
    base = {"a": torch.zeros(2), "b": torch.zeros(3)}
    experts = [
        {"a": torch.tensor([2.0, -1.0]), "b": torch.tensor([-1.0, -1.0, 0.5])},
        {"a": torch.tensor([-2.0, -1.0]), "b": torch.tensor([-1.0, -1.0, 0.5])},
    ]
    seen = statistics(base, experts, density=1.0, scope="model")
    assert seen["tie_sign"] == -1
    whole = ties(base, experts, density=1.0)
    for key in base:
        part = ties({key: base[key]}, [{key: expert[key]} for expert in experts], density=1.0, **seen)
        assert torch.equal(part[key], whole[key])
    assert statistics(base, experts, density=1.0, elect="none").keys() == {"trim"}


def test_a_small_vector_keeps_what_a_large_one_would():
    tau = torch.linspace(-1, 1, 101)
    result = ties({"w": torch.zeros(101)}, [{"w": tau}], density=0.1)["w"]
    assert int(result.count_nonzero()) == 10
    assert set(result[result != 0].abs().mul(50).round().int().tolist()) == {46, 47, 48, 49, 50}
