import pytest
import torch
from torch import nn

from notebook_kit.diagnostics.random_routers import compare_paths, slim_curve
from notebook_kit.mixtures import MoE
from notebook_kit.models import MLP
from notebook_kit.routers import RandomRouter, StochasticExperts, TopK, consistency_loss, set_path

X = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))


def accuracy(logits):
    return float((logits.argmax(-1) == 0).float().mean())


@pytest.mark.parametrize("router", [RandomRouter(5, 4, k=2), TopK(5, 4)])
def test_every_k_and_the_old_one_back(router):
    moe = MoE([MLP([5, 5]) for _ in range(4)], router)
    seen = []

    def score(model):
        model(X)
        seen.append(model.routing.experts.shape[1])
        return float(model.router.k)

    assert slim_curve(moe, score, [1, 3, 4]) == {1: 1.0, 3: 3.0, 4: 4.0}
    assert seen == [1, 3, 4]
    with pytest.raises(ValueError, match="k must be at most n_experts=4, got 5"):
        slim_curve(moe, score, [2, 5])
    assert moe.router.k == 2
    with pytest.raises(ValueError, match="no router with a k in MLP"):
        slim_curve(MLP([2, 2]), lambda model: 0.0, [1])


def two_layers():
    torch.manual_seed(0)
    layers = [MoE([MLP([5, 5]) for _ in range(n)], StochasticExperts(5, n)) for n in (2, 3)]
    return nn.Sequential(*layers).train()


@torch.no_grad()
def test_paths_against_each_other():
    net = two_layers()
    set_path(net, [1, 2])
    paths = [(i, j) for i in range(2) for j in range(3)]
    found = compare_paths(net, X, paths, accuracy)
    assert [layer.router.inference for layer in net] == ["fixed"] * 2
    assert [layer.router.path for layer in net] == [1, 2]
    logits = [net[1].experts[j](net[0].experts[i](X)) for i, j in paths]
    for a in range(6):
        for b in range(6):
            assert found.disagreement[a, b].item() == pytest.approx(consistency_loss(logits[a], logits[b]).item())
            same = (logits[a].argmax(1) == logits[b].argmax(1)).float().mean().item()
            assert found.agreement[a, b].item() == pytest.approx(same)
    assert found.scores == {path: accuracy(z) for path, z in zip(paths, logits, strict=True)}
    off = found.disagreement[~torch.eye(6, dtype=torch.bool)]
    assert found.mean_disagreement == pytest.approx(off.mean().item())
    assert 0 <= found.mean_agreement <= 1
    set_path(net, "ensemble")
    assert found.ensemble == accuracy(net.eval()(X))


@torch.no_grad()
def test_one_path_and_bad_paths():
    net = two_layers()
    alone = compare_paths(net, X, [(0, 0)], accuracy)
    assert (alone.mean_disagreement, alone.mean_agreement) == (0.0, 1.0)
    with pytest.raises(ValueError, match="each of the 2 layers, got 1"):
        compare_paths(net, X, [(0,)], accuracy)
    assert [layer.router.inference for layer in net] == ["token"] * 2


@torch.no_grad()
def test_padding_does_not_count():
    net, mask = two_layers(), torch.arange(9) < 6
    whole = compare_paths(net, X, [(0, 0), (1, 2)], accuracy, mask=mask)
    part = compare_paths(net, X[:6], [(0, 0), (1, 2)], accuracy)
    torch.testing.assert_close(whole.disagreement, part.disagreement)
    torch.testing.assert_close(whole.agreement, part.agreement)
