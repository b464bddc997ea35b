import pytest
import torch
from torch.func import functional_call
from torch.nn import functional as F

from notebook_kit import data, zoo
from notebook_kit.alignment import (
    interpolate,
    permutation_spec,
    permute,
    random_permutations,
    straight_through,
    weight_matching,
)
from notebook_kit.models import MLP, VGG
from notebook_kit.weights import IncompatibleWeights


def of(model):
    return lambda weights, batch: F.cross_entropy(functional_call(model, weights, (batch[0],)), batch[1])


def middle_loss(bed, permutations, batch):
    a, b = bed.experts
    middle = interpolate(a, permute(permutation_spec(bed.model), permutations, b), 0.5)
    return of(bed.model)(middle, batch).item()


def test_it_begins_with_weight_matching_and_never_gets_worse():
    bed, batch = zoo.digit_twins(32), data.digits("train")
    (a, b), spec = bed.experts, permutation_spec(bed.model)
    before = [{key: tensor.clone() for key, tensor in weights.items()} for weights in (a, b)]
    found = straight_through(spec, a, b, of(bed.model), [batch], steps=30, seed=3, progress=False)
    assert len(found.objective) == 31
    assert all(later >= earlier for earlier, later in zip(found.objective, found.objective[1:], strict=False))
    start = weight_matching(spec, a, b, seed=3)
    assert -found.objective[0] == pytest.approx(middle_loss(bed, start, batch), rel=1e-5)
    assert -found.objective[-1] == pytest.approx(middle_loss(bed, found, batch), rel=1e-5)
    assert found.objective[-1] > found.objective[0] + 0.01
    for old, new in zip(before, (a, b), strict=True):
        assert all(torch.equal(old[key], new[key]) for key in old)
    assert not any(tensor.requires_grad for tensor in a.values())


def test_one_step_is_weight_matching_and_a_seed_gives_one_result():
    bed, batch = zoo.digit_twins(32), data.digits("train")
    (a, b), spec = bed.experts, permutation_spec(bed.model)
    one = straight_through(spec, a, b, of(bed.model), [batch], steps=1, seed=1, progress=False)
    match = weight_matching(spec, a, b, seed=1)
    assert all(torch.equal(one[perm], match[perm]) for perm in match)
    batches = [(batch[0][:500], batch[1][:500]), (batch[0][500:], batch[1][500:])]
    two, again = (
        straight_through(spec, a, b, of(bed.model), batches, steps=8, seed=1, progress=False) for _ in range(2)
    )
    assert two.objective == again.objective
    assert all(torch.equal(two[perm], again[perm]) for perm in two)


def test_the_gradient_passes_straight_to_theta():
    """Worked by hand: one hidden unit pair, a loss that asks for the other order than the weights do."""
    model = MLP([2, 2, 1])
    spec = permutation_spec(model)
    a = {
        "layers.0.weight": torch.tensor([[1.0, 0.0], [0.0, 1.0]]), "layers.0.bias": torch.zeros(2),
        "layers.1.weight": torch.zeros(1, 2), "layers.1.bias": torch.zeros(1),
    }  # fmt: skip
    b = a | {"layers.0.weight": torch.tensor([[1.0, 0.5], [0.5, 1.0]])}
    wanted = torch.tensor([[0.75, 0.5], [0.5, 0.75]])  # ½(A + swapped B)

    def loss(w, _):
        return ((w["layers.0.weight"] - wanted) ** 2).sum()

    assert weight_matching(spec, a, b)["layers.0"].tolist() == [0, 1]
    found = straight_through(spec, a, b, loss, [None], steps=60, lr=0.3, momentum=0.0, progress=False)
    assert found["layers.0"].tolist() == [1, 0]
    assert found.objective[-1] == pytest.approx(0.0, abs=1e-12)
    assert found.objective[0] == pytest.approx(-0.25)  # four entries are off by a quarter


def test_a_planted_copy_is_found_at_once_with_batch_norm_too():
    torch.manual_seed(0)
    model = VGG((4, 6), hidden=8).eval()
    spec, a = permutation_spec(model), {k: v.clone() for k, v in model.state_dict().items()}
    b = permute(spec, random_permutations(spec, 2), a)
    found = straight_through(spec, a, b, of(model), [data.digits("val")], steps=3, progress=False)
    recovered = permute(spec, found, b)
    assert all(torch.equal(recovered[key], a[key]) for key in a)


def test_bad_input_is_named():
    model = MLP([64, 4, 10])
    spec, a = permutation_spec(model), model.state_dict()
    batch = data.digits("val")
    with pytest.raises(ValueError, match="at least one batch"):
        straight_through(spec, a, a, of(model), [], progress=False)
    with pytest.raises(ValueError, match=r"steps must be in \[1"):
        straight_through(spec, a, a, of(model), [batch], steps=0)
    with pytest.raises(ValueError, match="loss in the middle is nan"):
        straight_through(spec, a, a, lambda w, _: w["layers.0.bias"].sum() * float("nan"), [batch], progress=False)
    with pytest.raises(IncompatibleWeights):
        straight_through(spec, a, MLP([64, 5, 10]).state_dict(), of(model), [batch], progress=False)
