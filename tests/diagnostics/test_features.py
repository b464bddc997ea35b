import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from notebook_kit.alignment import permutation_spec, permute, random_permutations
from notebook_kit.diagnostics.features import cka, group_kinds, layer_cka, unit_correlation, zip_view
from notebook_kit.models import MLP, ResNet

X = torch.rand(80, 64, generator=torch.Generator().manual_seed(0))


def pair(make):
    torch.manual_seed(0)
    model = make().eval()
    spec = permutation_spec(model, residual=True)
    twin = copy.deepcopy(model)
    permutations = random_permutations(spec, 1)
    twin.load_state_dict(permute(spec, permutations, model.state_dict()))
    return spec, model, twin, permutations


def test_cka_by_hand():
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    assert cka(x, x) == pytest.approx(1)
    # One column of two: ‖XᵀY‖² = 4, ‖XᵀX‖ = √8, ‖YᵀY‖ = 2.
    assert cka(x, x[:, :1]) == pytest.approx(4 / (8**0.5 * 2))
    assert cka(x, torch.ones(4, 3)) == 0
    assert cka(x[:, :1], x[:, 1:]) == pytest.approx(0)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_cka_ignores_rotations_shifts_and_factors(n, m, seed):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(20, n, generator=generator), torch.randn(20, m, generator=generator)
    turn = torch.linalg.qr(torch.randn(n, n, generator=generator).double()).Q
    value = cka(x, y)
    assert 0 <= value <= 1 + 1e-9
    assert cka(3 * x.double() @ turn + 5, y.double()) == pytest.approx(value, abs=1e-6)
    assert cka(y, x) == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize("make", [lambda: MLP([64, 12, 8, 5]), lambda: ResNet((4, 6))])
def test_matching_changes_correlations_and_not_cka(make):
    spec, model, twin, permutations = pair(make)
    one, two = layer_cka(spec, model, model, [X]), layer_cka(spec, model, twin, [X[:30], X[30:]])
    np.testing.assert_allclose(one, two, atol=1e-5)
    np.testing.assert_allclose(np.diag(one), 1, atol=1e-6)
    assert list(one.index) == list(spec.sizes)
    perm = next(iter(spec.sizes))
    c = unit_correlation(spec, perm, model, twin, [X])
    own = unit_correlation(spec, perm, model, model, [X])
    torch.testing.assert_close(c, own[:, permutations[perm]], atol=1e-5, rtol=1e-5)


def test_kinds_of_groups():
    groups = np.array([[0, 0, 1, 2], [3, 1, 4, 4]])
    assert group_kinds(groups) == {"alone": 2, "across": 1, "within": 2, "both": 0}
    assert group_kinds(np.array([[0, 0], [0, 1]])) == {"alone": 1, "across": 0, "within": 0, "both": 1}


def test_zip_view_orders_units_by_group():
    spec, model, twin, _ = pair(lambda: MLP([64, 12, 8, 5]))

    def score(weights):
        return {str(i): w["layers.0.bias"].sum().item() for i, w in enumerate(weights)}

    view = zip_view(spec, (model, twin), [X], score, depth=2, layer=7)
    assert view.perm == "layers.1"
    assert view.correlation.shape == (16, 16)
    assert sum(view.kinds.values()) == 8
    assert list(view.scores.columns) == ["own", "zipped"]
    assert view.scores["own"].iloc[0] == pytest.approx(model.layers[0].bias.sum().item(), abs=1e-5)
    sizes = np.bincount(view.zipped.groups["layers.1"].numpy().ravel())
    if sizes[0] == 2:  # the first group's members lie next to each other
        assert view.correlation[0, 1] > 0.99
    nothing = zip_view(spec, (model, twin), [X], score, depth=0)
    assert nothing.perm is None
    assert (nothing.scores["own"] == nothing.scores["zipped"]).all()
