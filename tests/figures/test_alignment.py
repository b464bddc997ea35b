import numpy as np
import torch

from notebook_kit.alignment import Permutations, permutation_spec, permute, random_permutations
from notebook_kit.diagnostics.alignment import alignment_view, path_frame, tensor_similarity, unit_similarity
from notebook_kit.figures.alignment import (
    alignment_figure,
    cosine_figure,
    path_figure,
    permutation_figure,
    similarity_figure,
)
from notebook_kit.models import MLP


def twins():
    torch.manual_seed(0)
    a = MLP([4, 6, 5, 3])
    spec = permutation_spec(a)
    return spec, a.state_dict(), permute(spec, random_permutations(spec, seed=2), a.state_dict())


def score(weights):
    return -float(weights["layers.0.weight"].square().sum())


def test_the_line_the_chord_and_the_mark():
    _, a, b = twins()
    path = path_frame(score, a, {"naive": b, "aligned": a}, points=5)
    figure = path_figure(path, y="minus squares", mark=0.5)
    assert [trace.name for trace in figure.data if trace.mode == "lines"] == ["naive", "aligned", "chord"]
    np.testing.assert_allclose(figure.data[0].y, path["score"][:5])
    mark = figure.data[1]
    assert (mark.x[0], mark.y[0]) == (0.5, path["score"][2])
    assert figure.layout.yaxis.title.text == "minus squares"
    assert "t" in figure.layout.xaxis.title.text


def test_matrices_share_one_scale_centred_on_zero():
    spec, a, b = twins()
    before = unit_similarity(spec, "layers.0", a, b, Permutations())
    figure = similarity_figure(before, before)
    assert {(trace.zmin, trace.zmax) for trace in figure.data} == {(-1, 1)}
    assert figure.layout.yaxis.autorange == figure.layout.yaxis2.autorange == "reversed"
    assert figure.layout.xaxis2.title.text


def test_a_permutation_is_a_dot_a_unit_and_signs_have_another_colour():
    permutations = Permutations({"p": torch.tensor([2, 0, 1])}, signs={"p": torch.tensor([1.0, -1, 1])})
    dots = permutation_figure(permutations, "p").data[0]
    assert list(dots.x) == [2, 0, 1]
    assert dots.marker.color[0] == dots.marker.color[2] != dots.marker.color[1]


def test_bars_by_tensor():
    spec, a, b = twins()
    figure = cosine_figure(tensor_similarity(a, {"naive": b, "aligned": a}))
    assert [bar.name for bar in figure.data] == ["naive", "aligned"]
    np.testing.assert_allclose(figure.data[1].y, 1, atol=1e-6)
    assert repr(spec).startswith("PermutationSpec(MLP")


def test_a_look_with_and_without_a_score():
    spec, a, b = twins()
    with_score = alignment_figure(alignment_view(a, b, spec, score, points=5))
    assert [trace.type for trace in with_score.data].count("heatmap") == 2
    assert "barrier naive" in with_score.layout.title.text
    without = alignment_figure(alignment_view(a, b, spec))
    assert without.layout.yaxis.title.text == "cosine of a pair"
    np.testing.assert_allclose(without.data[1].y, 1, atol=1e-5)
