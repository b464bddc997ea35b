import numpy as np
import pytest
import torch

from notebook_kit.alignment import Permutations, permutation_spec, permute, random_permutations, weight_matching
from notebook_kit.diagnostics.alignment import (
    alignment_view,
    matching_cost,
    moved_units,
    path_frame,
    tensor_similarity,
    unit_similarity,
)
from notebook_kit.models import MLP
from tests.alignment.nets import build, weights_of


def twins(widths=(4, 6, 5, 3)):
    torch.manual_seed(0)
    a = MLP(widths)
    spec = permutation_spec(a)
    return a, spec, a.state_dict(), permute(spec, random_permutations(spec, seed=2), a.state_dict())


def test_moved_units_counts_places_and_signs():
    _, spec, _, _ = twins()
    permutations = Permutations({"layers.0": torch.tensor([1, 0, 2, 3, 4, 5]), "layers.1": torch.arange(5)})
    permutations.signs["layers.1"] = torch.tensor([1.0, -1, 1, 1, -1])
    frame = moved_units(spec, permutations).set_index("permutation")
    assert frame.loc["layers.0", ["units", "moved", "flipped"]].tolist() == [6, 2, 0]
    assert frame.loc["layers.0", "share"] == pytest.approx(1 / 3)
    assert frame.loc["layers.1", ["moved", "flipped"]].tolist() == [0, 2]


def test_similarity_by_tensor_and_by_unit():
    _, spec, a, b = twins()
    found = weight_matching(spec, a, b)
    frame = tensor_similarity(a, {"naive": b, "aligned": permute(spec, found, b)})
    aligned = frame[frame["version"] == "aligned"]
    assert aligned["cosine"].to_numpy() == pytest.approx(np.ones(len(a)), abs=1e-6)
    assert aligned["distance"].max() == 0
    assert frame[frame["version"] == "naive"]["distance"].max() > 0.1
    s = unit_similarity(spec, "layers.0", a, b, found)
    assert s.diagonal().numpy() == pytest.approx(np.ones(6), abs=1e-5)
    by_hand = torch.cat([a["layers.0.weight"], a["layers.0.bias"][:, None], a["layers.1.weight"].T], 1)
    expected = torch.nn.functional.normalize(by_hand) @ torch.nn.functional.normalize(by_hand).T
    torch.testing.assert_close(s, expected, atol=1e-5, rtol=1e-5)
    cost = matching_cost(spec, a, b, found)
    assert (cost["after"] > 0.999).all()
    assert (cost["before"] < 0.9).any()


def test_path_and_barriers_in_a_view():
    a, b = {"w": torch.tensor([[-1.0]])}, {"w": torch.tensor([[1.0]])}
    frame = path_frame(lambda w: float(w["w"] ** 2), a, {"naive": b}, points=3)
    assert frame["score"].tolist() == [1, 0, 1]
    assert frame["chord"].tolist() == [1, 1, 1]
    model, spec, a, b = twins()
    x = torch.randn(20, 4)

    def score(weights):
        return -(torch.func.functional_call(model, weights, (x,)) - model(x)).square().mean().item()

    calls = []
    cache = {}

    def counted(weights):
        calls.append(1)
        return score(weights)

    view = alignment_view(a, b, spec, counted, layer=1, points=5, cache=cache)
    assert view.perm == "layers.1"
    assert view.barriers["aligned"] == pytest.approx(0, abs=1e-10)
    assert view.barriers["naive"] > 1e-4
    assert len(calls) == 10
    # Another layer or place costs nothing; no matching, no aligned line.
    alignment_view(a, b, spec, counted, layer=0, t=0.2, points=5, cache=cache)
    assert list(alignment_view(a, b, spec, counted, method="none", points=5, cache=cache).barriers) == ["naive"]
    assert len(calls) == 10
    assert alignment_view(a, b, spec).barriers == {}


def test_activations_need_models_and_give_the_same_here():
    model, spec, a, b = twins()
    other = MLP([4, 6, 5, 3])
    other.load_state_dict(b)
    options = {"models": (model, other), "batches": [torch.randn(300, 4)]}
    view = alignment_view(a, b, spec, method="activation", **options)
    by_weight = alignment_view(a, b, spec).permutations
    assert all(torch.equal(view.permutations[perm], index) for perm, index in by_weight.items())
    with pytest.raises(ValueError, match="needs models="):
        alignment_view(a, b, spec, method="activation")
    with pytest.raises(ValueError, match=r"layer must be in \[0, 1\], got 7"):
        alignment_view(a, b, spec, layer=7)


def test_it_works_on_experts_too():
    model = build("mixtral")
    spec, a = permutation_spec(model), weights_of(model)
    b = permute(spec, random_permutations(spec, seed=1, signs=True), a)
    view = alignment_view(a, b, spec, layer=5)
    assert np.diagonal(view.after) == pytest.approx(np.ones(len(view.after)), abs=1e-4)
