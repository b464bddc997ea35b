import pytest
import torch

from notebook_kit import zoo
from notebook_kit.alignment import permutation_spec, random_permutations
from notebook_kit.diagnostics.alignment import alignment_view
from notebook_kit.models import MLP
from notebook_kit.widgets import AlignmentExplorer


def explorer(**options):
    bed = zoo.digit_twins(32)
    spec = permutation_spec(bed.model)
    return bed, spec, AlignmentExplorer(*bed.experts, spec, bed.score, y="accuracy", **options)


def test_controls_are_those_of_the_public_function_narrowed_to_the_networks():
    _, _, shown = explorer()
    assert list(shown.settings) == ["method", "layer", "t", "points", "seed"]
    controls = {control["name"]: control for control in shown.controls}
    assert controls["layer"]["high"] == 1
    assert controls["method"]["options"] == ["weight", "none"]


def test_moving_a_control_shows_what_the_function_gives():
    bed, spec, shown = explorer(points=5)
    shown.settings = {"layer": 1, "t": 0.25}
    assert shown.code == "alignment_view(a, b, spec, score, layer=1, t=0.25, points=5)"
    a, b = bed.experts
    expected = alignment_view(a, b, spec, bed.score, layer=1, t=0.25, points=5)
    assert shown.value.barriers == pytest.approx(expected.barriers)
    assert shown.value.perm == "layers.1"
    shown.settings = {"method": "none"}
    assert list(shown.value.barriers) == ["naive"]


def test_a_line_is_scored_once():
    bed = zoo.digit_twins(32)
    calls = []

    def score(weights):
        calls.append(1)
        return bed.score(weights)

    shown = AlignmentExplorer(*bed.experts, permutation_spec(bed.model), score, points=5)
    assert len(calls) == 10
    for settings in ({"t": 0.1}, {"layer": 1}, {"method": "none"}, {"method": "weight"}):
        shown.settings = settings
    assert len(calls) == 10


def test_activations_and_no_score(tmp_path):
    bed = zoo.digit_twins(32)
    models = [MLP([64, 32, 32, 10]) for _ in "ab"]
    for model, weights in zip(models, bed.experts, strict=True):
        model.load_state_dict(weights)
    shown = AlignmentExplorer(
        *bed.experts, permutation_spec(bed.model), models=models, batches=[bed.batches("train")["digit"][0]]
    )
    shown.settings = {"method": "activation"}
    assert shown.value.method == "activation"
    assert shown.value.path is None
    assert "t" not in shown.settings
    with pytest.raises(ValueError, match="layer must be in"):
        shown.settings = {"layer": 9}
    assert shown.to_html(tmp_path / "page.html", vary=["layer"]).stat().st_size > 1000


def test_networks_that_do_not_fit_are_refused():
    bed = zoo.digit_twins(32)
    with pytest.raises(ValueError, match=r"layers\.0"):
        AlignmentExplorer(bed.base, MLP([64, 16, 16, 10]).state_dict(), permutation_spec(bed.model))
    assert torch.is_tensor(bed.base["layers.0.weight"])


def test_a_straight_through_permutation_is_brought_along():
    bed = zoo.digit_twins(32)
    (a, b), spec = bed.experts, permutation_spec(bed.model)
    found = {"straight-through": random_permutations(spec, 1)}
    shown = AlignmentExplorer(a, b, spec, bed.score, found=found, points=3)
    options = next(control["options"] for control in shown.controls if control["name"] == "method")
    assert options == ["weight", "straight-through", "none"]
    shown.settings = {"method": "straight-through"}
    assert shown.value.permutations is found["straight-through"]
    with pytest.raises(ValueError, match=r"straight-through.*takes long"):
        alignment_view(a, b, spec, method="straight-through")
