import numpy as np
import pandas as pd
import torch

from notebook_kit.alignment import Zipped
from notebook_kit.diagnostics.features import ZipView
from notebook_kit.figures.features import cka_figure, correlation_figure, zip_figure


def titles(figure):
    return {axis.title.text for axis in [*figure.select_xaxes(), *figure.select_yaxes()]}


def test_cka_squares_share_one_scale():
    frame = pd.DataFrame([[1.0, 0.2], [0.3, 0.9]], index=["a", "b"], columns=["a", "b"])
    figure = cka_figure({"B": frame, "matched": frame * 0.5}, title="t")
    assert [(trace.zmin, trace.zmax) for trace in figure.data] == [(0.0, 1.0)] * 2
    assert cka_figure({"B": frame + 0.5}).data[0].zmin == 0.6
    assert {"B", "matched", "layer of A"} <= titles(figure)
    np.testing.assert_allclose(figure.data[1].z, frame.to_numpy() * 0.5, rtol=1e-6)


def test_correlations_are_centred_on_zero():
    figure = correlation_figure(torch.eye(3), -torch.eye(3))
    assert [(trace.zmin, trace.zmax) for trace in figure.data] == [(-1.0, 1.0)] * 2
    assert {"unit of A", "unit of B, as it is", "unit of B in A's order"} <= titles(figure)


def test_zip_figure_shows_scores_kinds_and_units():
    weights = ({"w": torch.zeros(3)},) * 2
    scores = pd.DataFrame({"own": {"x": 0.9, "y": 0.8}, "zipped": {"x": 0.7, "y": 0.6}})
    kinds = {"alone": 1, "across": 1, "within": 0, "both": 0}
    zipped = Zipped(weights, {"p": torch.tensor([[0, 1], [0, 0]])})
    figure = zip_figure(ZipView(zipped, scores, "p", np.eye(4), kinds), y="accuracy")
    own, after, counts, square = figure.data
    assert list(own.y) == [0.9, 0.8]
    assert list(after.y) == [0.7, 0.6]
    assert list(counts.y) == [1, 1, 0, 0]
    assert square.z.shape == (4, 4)
    assert figure.layout.title.text == "p: 4 units in 2 groups; 3 numbers stored"
    assert {"task", "accuracy", "groups"} <= titles(figure)
    empty = zip_figure(ZipView(Zipped(weights, {}), scores, None, np.zeros((0, 0)), {}))
    assert empty.layout.title.text == "3 numbers stored"
