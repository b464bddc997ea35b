import numpy as np
import pandas as pd
import pytest
import torch

from notebook_kit.diagnostics.diffusion import record_denoising
from notebook_kit.figures.diffusion import (
    balance_view,
    dependence_figure,
    evenness_figure,
    expert_map_view,
    image_grid_figure,
    position_figure,
    sample_view,
    tiled,
)
from notebook_kit.mixtures import DiTMoE
from notebook_kit.models import DiffusionTransformer


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = DiffusionTransformer(feed_forward=lambda d: DiTMoE(d, 8, n_experts=5), d_model=16, n_blocks=2)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return made.eval()


@pytest.fixture(scope="module")
def record(model):
    return record_denoising(model, torch.randn(20, 1, 8, 8), torch.arange(20) % 10, levels=(0.25, 0.5, 0.75))


def titles(figure):
    return {axis.title.text for axis in [*figure.select_xaxes(), *figure.select_yaxes()]} - {"", None}


def test_tiles_by_hand():
    grid = tiled(torch.arange(8.0).reshape(2, 2, 1, 2))
    nan = np.nan
    np.testing.assert_array_equal(grid, [[0, 1, nan, 2, 3], [nan] * 5, [4, 5, nan, 6, 7]])


def test_ticks_stand_in_the_middle_of_images():
    figure = image_grid_figure(torch.zeros(2, 3, 8, 8), columns=["a", "b", "c"], rows=["r", "s"], x="what", y="which")
    assert figure.layout.xaxis.tickvals == (3.5, 12.5, 21.5)
    assert figure.layout.yaxis.ticktext == ("r", "s")
    assert figure.data[0].z.shape == (17, 26)
    assert (figure.data[0].zmin, figure.data[0].zmax) == (-1, 1)
    assert titles(figure) == {"what", "which"}


@pytest.mark.parametrize("picture", ["samples", "path"])
@pytest.mark.parametrize("digit", ["all", "7"])
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_samples_and_paths(model, picture, digit, steps):
    figure = sample_view(model, picture=picture, digit=digit, steps=steps, guidance=1.5)
    rows, columns = len(figure.layout.yaxis.ticktext), len(figure.layout.xaxis.ticktext)
    assert figure.data[0].z.shape == (9 * rows - 1, 9 * columns - 1)
    if picture == "path":
        assert columns == min(steps, 10) + 1
        assert (figure.layout.xaxis.ticktext[0], figure.layout.xaxis.ticktext[-1]) == ("1", "0")
        assert set(figure.layout.yaxis.ticktext) == ({"7"} if digit == "7" else {"0", "3", "6", "9"})
    else:
        assert set(figure.layout.xaxis.ticktext) == ({"7"} if digit == "7" else set("0123456789"))
    assert f"guidance 1.5, {steps} step" in figure.layout.title.text
    assert len(titles(figure)) == 2


def test_a_part_may_be_silent(model):
    whole, *others = (sample_view(model, steps=1, silence=part) for part in ("nothing", "shared", "routed"))
    for figure, part in zip(others, ("shared", "routed"), strict=True):
        assert not np.array_equal(figure.data[0].z, whole.data[0].z, equal_nan=True)
        assert figure.layout.title.text.endswith(f"{part} part silenced")


def test_the_same_seed_gives_the_same_picture(model):
    a, b, c = (sample_view(model, seed=seed, steps=2) for seed in (1, 1, 2))
    np.testing.assert_array_equal(a.data[0].z, b.data[0].z)
    assert not np.array_equal(a.data[0].z, c.data[0].z, equal_nan=True)


@pytest.mark.parametrize("by", ["time", "class"])
def test_expert_maps(record, by):
    figure = expert_map_view(record, by=by, layer=1)
    z = figure.data[0].z
    assert z.shape == (5, 3 if by == "time" else 10)
    np.testing.assert_allclose(z.sum(0), 1, rtol=1e-5)
    assert titles(figure) == {"expert", "noise level t (1 is noise)" if by == "time" else "digit"}


def test_positions_are_maps_of_the_image(record):
    figure = expert_map_view(record, by="position", layer=0)
    z = figure.data[0].z
    assert z.shape == (9, 14)  # two rows of three maps of 4 x 4, the sixth empty
    assert np.isnan(z[5:, 10:]).all()
    assert [note.text for note in figure.layout.annotations] == [f"expert {i}" for i in range(5)]
    with pytest.raises(ValueError, match=r"layer must be in \[0, 1\], got 7"):
        expert_map_view(record, layer=7)


def test_position_figure_by_hand():
    shares = pd.DataFrame({0: [1.0, 0, 0, 0], 1: [0, 1.0, 1.0, 1.0]})
    z = position_figure(shares).data[0].z
    np.testing.assert_array_equal(z, [[1, 0], [0, 0], [np.nan, np.nan], [0, 1], [1, 1]])


def test_bars_and_lines():
    table = pd.DataFrame({"position": [1.0, 0.5], "time": [0.1, 0.2], "position (chance)": [0.0, 0.0]})
    bars = dependence_figure(table)
    assert [bar.name for bar in bars.data] == ["position", "time"]
    assert bars.data[0].y.tolist() == [1.0, 0.5]
    lines = evenness_figure(pd.DataFrame({0: [0.9, 0.3], 1: [1.0, 0.8]}, index=[0.1, 0.9]))
    assert [line.name for line in lines.data] == ["layer 0", "layer 1"]
    assert lines.data[0].x.tolist() == [0.1, 0.9]
    assert lines.layout.yaxis.range[0] == pytest.approx(0.25)
    assert "mutual information (bits)" in titles(bars)
    assert len(titles(lines)) == 2


def test_balance_is_on_one_scale():
    loads = {0.0: [torch.tensor([0.8, 0.2]), torch.tensor([0.6, 0.4])], 0.1: [torch.tensor([0.5, 0.5])] * 2}
    first, last = balance_view(loads, balance_coef=0.0), balance_view(loads, balance_coef=0.1, layer=1)
    assert first.data[0].y.tolist() == pytest.approx([0.8, 0.2])
    assert first.layout.yaxis.range == last.layout.yaxis.range
    assert first.layout.title.text.startswith("Balance loss times 0, layer 0: the busiest expert has 80%")
    assert last.layout.shapes[0].y0 == 0.5
    assert len(titles(first)) == 2
    with pytest.raises(ValueError, match=r"balance_coef must be one of 0\.0, 0\.1, got 0\.01"):
        balance_view(loads)
    with pytest.raises(ValueError, match=r"layer must be in \[0, 1\], got 2"):
        balance_view(loads, balance_coef=0.0, layer=2)
