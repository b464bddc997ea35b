"""Figures of adapters."""

import numpy as np
import pandas as pd
import pytest
import torch

from notebook_kit.adapters import LoRA, attach
from notebook_kit.diagnostics.adapters import delta_spectra, delta_table, fold_error
from notebook_kit.figures.adapters import delta_figure, delta_spectra_figure, fold_error_figure, learning_figure
from notebook_kit.models import MLP
from tests.adapters.conftest import disturb


@pytest.fixture
def model():
    model = MLP([8, 16, 6]).eval()
    attach(model, LoRA, targets=r"layers\.0", rank=4)
    attach(model, LoRA, targets=r"layers\.1", rank=2)
    disturb(model, std=0.5)
    return model


def test_spectra_beyond_the_rank_are_blank(model):
    spectra = delta_spectra(model)
    z = np.asarray(delta_spectra_figure(spectra).data[0].z)
    assert np.isnan(z).tolist() == [[False] * 4, [False, False, True, True]]
    cut = delta_spectra_figure(spectra, rank=1, strength=2.0)
    z_cut = np.asarray(cut.data[0].z)
    np.testing.assert_allclose(z_cut[:, 0], 2 * z[:, 0])
    assert np.isnan(z_cut[:, 1:]).all()
    share = np.nansum(z[:, 0] ** 2) / np.nansum(z**2)
    assert f"1 of 4 directions: {share:.0%}" in cut.layout.title.text
    assert delta_spectra_figure(spectra, strength=0.0).data[0].zmax == pytest.approx(float(np.nanmax(z)))


def test_tables_become_bars(model):
    table = delta_table(model)
    figure = delta_figure(table)
    assert list(figure.data[0].y) == ["layers.0", "layers.1"]
    np.testing.assert_allclose(figure.data[0].x, table.relative_norm)
    assert figure.layout.xaxis.title.text == "‖ΔW‖ / ‖W‖"
    assert delta_figure(table, value="stable_rank").layout.xaxis.title.text == "stable rank"


def test_fold_errors_on_a_log_scale(model):
    figure = fold_error_figure(fold_error(model, torch.randn(3, 8)))
    assert figure.layout.yaxis.type == "log"
    assert [trace.name for trace in figure.data] == ["folding: largest", "folding: mean", "the format itself: mean"]
    assert np.isnan(figure.data[2].y[0])


def test_learning_curves_are_smoothed():
    history = pd.DataFrame({"step": [1, 2, 3], "loss": [3.0, 1.0, 2.0]})
    figure = learning_figure({"a": history, "b": history}, smooth=2)
    assert list(figure.data[0].y) == [3.0, 2.0, 1.5]
    assert figure.layout.yaxis.title.text
