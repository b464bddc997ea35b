"""Transport plans against POT called directly and scipy's assignment; PLeaS' squares against numpy's solver."""

import numpy as np
import ot
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from notebook_kit.alignment import pleas, transport_plan
from notebook_kit.alignment.pleas_pair import read_pair
from notebook_kit.models import MLP


def cost(n, m, seed):
    return np.random.default_rng(seed).random((n, m))


@pytest.mark.parametrize("shape", [(8, 8), (12, 5), (5, 12)])
@pytest.mark.parametrize("epsilon", [1.0, 0.2, 0.05])
def test_sinkhorn(shape, epsilon):
    M = cost(*shape, 0)
    a, b = (np.full(n, 1 / n) for n in shape)
    plain = ot.sinkhorn(a, b, M, epsilon, numItermax=20_000, stopThr=1e-12)
    logged = ot.sinkhorn(a, b, M, epsilon, method="sinkhorn_log", numItermax=20_000, stopThr=1e-12)
    ours = transport_plan(torch.from_numpy(M), epsilon=epsilon, max_iter=20_000).numpy()
    assert np.abs(ours - plain).max() < 1e-7
    assert np.abs(ours - logged).max() < 1e-7


@pytest.mark.parametrize("shape", [(8, 8), (12, 5), (5, 12), (6, 4)])
def test_exact(shape):
    M = cost(*shape, 1)
    a, b = (np.full(n, 1 / n) for n in shape)
    ours = transport_plan(torch.from_numpy(M), method="exact").numpy()
    assert abs((ours * M).sum() - ot.emd2(a, b, M)) < 1e-10
    assert np.abs(ours - ot.emd(a, b, M)).max() < 1e-10


def test_square_exact_plan_is_the_assignment():
    M = cost(20, 20, 2)
    rows, columns = linear_sum_assignment(M)
    ours = transport_plan(torch.from_numpy(M), method="exact").numpy()
    assert np.array_equal(ours.nonzero()[1], columns[rows])
    assert np.allclose(ours[rows, columns], 1 / 20)


def test_refit_against_stacked_least_squares():
    torch.manual_seed(0)
    a, b, x = MLP([6, 8, 4]), MLP([6, 8, 4]), torch.randn(200, 6)
    joined = pleas(a, b, [x], align="none", ridge=0.01)
    pair = read_pair(a, b, [x])
    for name in pair.layers:
        mean_x, mean_y = (sum(side[name]).double().numpy() / 2 for side in (pair.inputs, pair.outputs))
        start = sum(m.get_submodule(name).weight.detach().double().numpy() for m in (a, b)) / 2
        # ridge around the start as extra rows of an ordinary least-squares problem, the bias as a free column
        n, d = mean_x.shape
        weight = np.sqrt(0.01 * n)
        design = np.block([[mean_x, np.ones((n, 1))], [weight * np.eye(d), np.zeros((d, 1))]])
        target = np.concatenate([mean_y, weight * start.T])
        solution = np.linalg.lstsq(design, target, rcond=None)[0]
        rows = joined.get_submodule(name).rows["merged"]
        assert np.abs(rows.weight.detach().numpy() - solution[:-1].T).max() < 1e-5
        assert np.abs(rows.bias.detach().numpy() - solution[-1]).max() < 1e-5
