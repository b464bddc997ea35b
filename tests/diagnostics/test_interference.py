"""Numbers about interference, against counts by hand."""

import numpy as np
import pytest
import torch

from notebook_kit.diagnostics.interference import (
    claim_counts,
    conflict_view,
    owners,
    patch_view,
    pcb_view,
    sign_conflicts,
    tall_view,
)
from notebook_kit.merging import pcb, pcb_scores, tall_masks, ties
from notebook_kit.weights import IncompatibleWeights
from notebook_kit.zoo import Score, digit_labels

BASE = {"w": torch.zeros(2, 2), "b": torch.zeros(2), "n": torch.tensor(3)}
EXPERTS = [
    {"w": torch.tensor([[4.0, 3.0], [1.0, 0.0]]), "b": torch.tensor([2.0, 0.0]), "n": torch.tensor(3)},
    {"w": torch.tensor([[-2.0, 5.0], [3.0, 0.0]]), "b": torch.tensor([-4.0, 0.0]), "n": torch.tensor(3)},
    {"w": torch.tensor([[1.0, -1.0], [2.0, 0.0]]), "b": torch.tensor([6.0, 0.0]), "n": torch.tensor(3)},
]


def test_conflicts_by_hand():
    frame = sign_conflicts(BASE, EXPERTS).set_index("tensor")
    assert frame.loc["w", ["entries", "kept", "contested", "conflict"]].tolist() == [4, 0.75, 0.75, 0.5]
    assert frame.loc["w", "lost"] == pytest.approx(1 - (3 + 7 + 6) / 22)
    assert frame.loc["b", ["entries", "kept", "contested", "conflict"]].tolist() == [2, 0.5, 0.5, 0.5]
    assert frame.loc["whole model", "conflict"] == pytest.approx(3 / 6)
    assert frame.loc["whole model", "lost"] == pytest.approx(1 - 20 / 34)


def test_trimming_removes_conflicts():
    frame = sign_conflicts(BASE, EXPERTS, density=1 / 3).set_index("tensor")  # two of six
    assert frame.loc["w", "kept"] == 0.75
    assert frame.loc["w", "conflict"] == 0
    assert frame.loc["b", "conflict"] == 0.5
    by_tensor = sign_conflicts(BASE, EXPERTS, density=0.5, scope="tensor").set_index("tensor")
    assert by_tensor.loc["b", "conflict"] == 0.5


def test_copies_do_not_conflict_and_zeros_are_no_division():
    frame = sign_conflicts(BASE, [EXPERTS[0]] * 3)
    assert (frame["conflict"] == 0).all()
    assert (frame["lost"].abs() < 1e-9).all()
    still = sign_conflicts({**BASE, "e": torch.zeros(0)}, [{**BASE, "e": torch.zeros(0)}])
    assert (still[["kept", "conflict", "lost"]] == 0).all().all()
    with pytest.raises(IncompatibleWeights, match="'w': shape"):
        sign_conflicts(BASE, [{**BASE, "w": torch.zeros(3)}])


def test_the_curve_is_the_table_of_fewer_experts():
    view = conflict_view(BASE, EXPERTS, density=1.0, n_experts=2)
    assert view.curve["experts"].tolist() == [1, 2, 3]
    for n in (1, 2, 3):
        whole = sign_conflicts(BASE, EXPERTS[:n]).iloc[-1]
        assert view.curve.iloc[n - 1][["conflict", "lost"]].tolist() == pytest.approx([whole.conflict, whole.lost])
    np.testing.assert_allclose(view.frame["conflict"], sign_conflicts(BASE, EXPERTS[:2])["conflict"])
    assert conflict_view(BASE, EXPERTS, n_experts=64).n_experts == 3


def test_a_patch_is_what_ties_does():
    bed = digit_labels()
    for elect in ("mass", "count", "normmass", "normfrac", "none"):
        view = patch_view(bed.base, bed.experts, density=0.5, elect=elect, size=5)
        assert view.tensor == "layers.1.weight"
        tau = bed.experts[1][view.tensor][:5, :5] - bed.base[view.tensor][:5, :5]
        kept = view.second != 0
        np.testing.assert_allclose(view.second[kept], tau.numpy()[kept])
        merged = ties(bed.base, bed.experts, density=0.5, elect=elect)[view.tensor] - bed.base[view.tensor]
        np.testing.assert_allclose(view.merged, merged[:5, :5])
        if elect == "none":
            assert not view.sign.any()
        else:
            moved = np.abs(view.merged) > 1e-6
            assert moved.any()
            assert (np.sign(view.merged) == view.sign)[moved].mean() == 1


def test_a_patch_says_what_it_cannot_show():
    with pytest.raises(ValueError, match="patch_view shows two experts, got 1"):
        patch_view(BASE, EXPERTS[:1])
    with pytest.raises(ValueError, match=r"tensor must be a matrix, one of w; got 'b'"):
        patch_view(BASE, EXPERTS, tensor="b")
    with pytest.raises(ValueError, match="one of none"):
        patch_view({"b": BASE["b"]}, [{"b": e["b"]} for e in EXPERTS])


def test_a_sample_of_the_competition():
    bed = digit_labels()
    view = pcb_view(bed.base, bed.experts, bed.score, density=0.2, scale=0.6, names=bed.names, points=500)
    options = {"density": 0.2}
    claims = torch.cat([c.reshape(-1) for c in pcb_scores(bed.base, bed.experts, **options).claims().values()])
    np.testing.assert_array_equal(view.claims, claims.bincount(minlength=9))
    assert view.score == bed.score(pcb(bed.base, bed.experts, scale=0.6, **options))
    assert view.kept.mean() == pytest.approx(0.2, abs=0.06)
    assert (view.inter[view.kept] > 0).all()
    assert view.intra.min() > 0
    assert view.intra.max() <= 1
    again = pcb_view(bed.base, bed.experts, density=0.4, points=500)
    np.testing.assert_array_equal(again.expert, view.expert)
    np.testing.assert_array_equal(again.inter, view.inter)
    assert again.score is None


def test_masks_at_a_glance():
    bed = digit_labels()
    view = tall_view(bed.base, bed.experts, bed.score, threshold=0.4, k=2, scale=0.2)
    masked = tall_masks(bed.base, bed.experts, threshold=0.4)
    np.testing.assert_array_equal(view.claims, claim_counts(masked))
    assert view.claims.sum() == 33_088
    assert view.names == bed.names
    assert view.own[2] == bed.score(bed.experts[2]).tasks[bed.names[2]]
    assert view.masked[2] == bed.score(masked.expert(2)).tasks[bed.names[2]]
    assert view.unmasked.tolist() == list(bed.score(masked.unmasked(0.2)).tasks.values())
    assert view.masked.mean() > view.unmasked.mean()
    everything = tall_view(bed.base, bed.experts, bed.score, k=0, scale=0.2)
    np.testing.assert_allclose(everything.consensus, everything.unmasked, atol=0.005)
    nothing = tall_view(bed.base, bed.experts, bed.score, k=9)
    assert nothing.consensus.tolist() == list(bed.score(bed.base).tasks.values())


def test_owners_by_hand():
    base = {"w": torch.zeros(2, 2)}
    experts = [{"w": torch.tensor([[2.0, 1], [0, 0]])}, {"w": torch.tensor([[0.0, 1], [3, 0]])}]
    masked = tall_masks(base, experts)
    assert owners(masked).tolist() == [[0, 2], [1, -1]]
    assert claim_counts(masked).tolist() == [1, 2, 1]
    with pytest.raises(ValueError, match="tensor must be a matrix, one of w; got 'x'"):
        owners(masked, "x")


def test_tall_view_takes_any_score_with_tasks():
    base, experts = {"w": torch.zeros(2)}, [{"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([0.0, 1.0])}]

    def score(weights):
        return Score({"a": float(weights["w"][0]), "b": float(weights["w"][1])})

    view = tall_view(base, experts, score, scale=0.5)
    assert view.masked.tolist() == view.own.tolist() == [1, 1]
    assert view.unmasked.tolist() == [0.5, 0.5]
    assert view.density == 0.5
