import pytest
import torch

from notebook_kit import zoo
from notebook_kit.alignment import barrier, interpolate, path_scores, permutation_spec, permute, weight_matching
from notebook_kit.weights import IncompatibleWeights


def test_the_hand_worked_parabola():
    # s(w) = w², a = −1, b = 1: both ends score 1, the middle 0.
    a, b = {"w": torch.tensor([-1.0])}, {"w": torch.tensor([1.0])}
    assert barrier(lambda w: float(w["w"] ** 2), a, b) == pytest.approx(1.0)
    assert barrier(lambda w: -float(w["w"] ** 2), a, b) == 0.0
    # The chord counts, not the mean of the ends: a straight slope has no barrier.
    assert barrier(lambda w: float(w["w"]), a, b) == pytest.approx(0.0, abs=1e-7)


def test_the_ends_are_a_and_b():
    a, b = ({"w": torch.randn(3, generator=torch.Generator().manual_seed(s)), "n": torch.tensor([s])} for s in (1, 2))
    assert torch.equal(interpolate(a, b, 0.0)["w"], a["w"])
    assert torch.equal(interpolate(a, b, 1.0)["w"], b["w"])
    assert interpolate(a, b, 1.0)["n"].tolist() == [1]
    t, values = path_scores(lambda w: float(w["w"].sum()), a, b, points=5)
    assert t.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert values[-1] == pytest.approx(float(b["w"].sum()))
    assert barrier(lambda w: float(w["w"].norm()), a, a) == 0.0


@pytest.mark.parametrize("width", [32, 64, 128])
def test_matching_takes_more_than_half_of_the_barrier_between_the_shipped_twins(width):
    bed = zoo.digit_twins(width)
    a, b = bed.experts
    (x, y) = bed.batches("test")["digit"]

    def log_likelihood(weights):
        return -torch.nn.functional.cross_entropy(torch.func.functional_call(bed.model, weights, (x,)), y).item()

    spec = permutation_spec(bed.model)
    aligned = permute(spec, weight_matching(spec, a, b), b)
    assert barrier(log_likelihood, a, aligned) < barrier(log_likelihood, a, b) / 2


def test_bad_input_is_named():
    with pytest.raises(IncompatibleWeights, match="'w'"):
        barrier(lambda w: 0.0, {"w": torch.zeros(2)}, {"w": torch.zeros(3)})
    with pytest.raises(ValueError, match="points must be in"):
        barrier(lambda w: 0.0, {"w": torch.zeros(2)}, {"w": torch.zeros(2)}, points=2)
