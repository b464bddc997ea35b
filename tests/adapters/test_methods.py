"""LoRA and the two bottlenecks: hand-worked examples, equations, identities between them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from notebook_kit.adapters import CannotFold, LoRA, ParallelBottleneck, SeriesBottleneck
from notebook_kit.catalog import cite, methods
from notebook_kit.hyperparameters import hyperparameters

X = torch.tensor([[2.0, 3.0]])


def linear(weight, bias=None):
    host = nn.Linear(len(weight[0]), len(weight), bias=bias is not None)
    host.weight.data = torch.tensor(weight)
    if bias is not None:
        host.bias.data = torch.tensor(bias)
    return host


def by_hand(adapter, **values):
    """D = [[1, 0]], U = [[0], [1]]: adds x's first entry to the second output."""
    adapter = adapter(values.pop("host"), rank=1, activation="identity", **values)
    adapter.D.data, adapter.U.data = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0], [1.0]])
    return adapter(X).tolist()[0]


@pytest.mark.parametrize(
    ("weight", "parallel", "output", "before"),
    [
        ([[1.0, 0.0], [0.0, 1.0]], [2, 5], [2, 5], [2, 5]),
        ([[2.0, 0.0], [0.0, 2.0]], [4, 8], [4, 10], [4, 10]),
        ([[2.0, 0.0], [0.0, 1.0]], [4, 5], [4, 7], [4, 5]),
    ],
)
def test_worked_example(weight, parallel, output, before):
    assert by_hand(ParallelBottleneck, host=linear(weight)) == parallel
    assert by_hand(SeriesBottleneck, host=linear(weight)) == output
    assert by_hand(SeriesBottleneck, host=linear(weight), side="input") == before


def test_lora_worked_example():
    lora = LoRA(linear([[1.0, 0.0], [0.0, 1.0]]), rank=1, alpha=3)
    assert lora.B.abs().sum() == 0
    lora.A.data, lora.B.data = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0], [0.0]])
    # 3 / 1 · B (A x) = 3 · (5, 0)
    assert lora(X).tolist() == [[17.0, 3.0]]
    assert lora.delta()["weight"].tolist() == [[3.0, 3.0], [0.0, 0.0]]


@settings(deadline=None, max_examples=30)
@given(
    rank=st.integers(1, 4),
    alpha=st.floats(0.5, 64),
    rslora=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_lora_equals_its_equation_and_its_delta(rank, alpha, rslora, bias, seed):
    generator = torch.Generator().manual_seed(seed)
    lora = LoRA(nn.Linear(5, 4, bias=bias), rank=rank, alpha=alpha, rslora=rslora).double()
    lora.A.data, lora.B.data = (torch.randn(p.shape, generator=generator).double() for p in (lora.A, lora.B))
    x = torch.randn(3, 5, generator=generator).double()
    scale = alpha / (rank**0.5 if rslora else rank)
    y = x @ lora.weight.T + scale * x @ lora.A.T @ lora.B.T + (lora.bias if bias else 0)
    torch.testing.assert_close(lora(x), y)
    left, right = lora.factors()
    torch.testing.assert_close(left @ right, scale * lora.B.detach() @ lora.A.detach())


@settings(deadline=None, max_examples=20)
@given(rank=st.integers(1, 4), scale=st.floats(0.2, 4), seed=st.integers(0, 2**16))
def test_linear_parallel_bottleneck_is_lora_with_alpha_equal_rank(rank, scale, seed):
    torch.manual_seed(seed)
    host = nn.Linear(6, 5)
    lora = LoRA(host, rank=rank, alpha=rank * scale)
    parallel = ParallelBottleneck(host, rank=rank, activation="identity", scale=scale)
    nn.init.normal_(lora.B)
    parallel.D, parallel.U = lora.A, lora.B
    x = torch.randn(7, 6)
    torch.testing.assert_close(parallel(x), lora(x), rtol=1e-6, atol=1e-6)


@settings(deadline=None, max_examples=20)
@given(side=st.sampled_from(["output", "input"]), scale=st.floats(0.1, 2), seed=st.integers(0, 2**16))
def test_linear_series_bottleneck_is_a_product_of_matrices(side, scale, seed):
    torch.manual_seed(seed)
    series = SeriesBottleneck(nn.Linear(6, 5), rank=2, side=side, activation="identity", scale=scale, init="normal")
    series = series.double()
    nn.init.normal_(series.D)
    nn.init.normal_(series.U)
    stretch = torch.eye(series.U.shape[0], dtype=torch.float64) + scale * series.U @ series.D
    weight = stretch @ series.weight if side == "output" else series.weight @ stretch
    bias = stretch @ series.bias if side == "output" else series.bias
    delta = series.delta()
    torch.testing.assert_close(series.weight + delta["weight"], weight)
    torch.testing.assert_close(series.bias + delta.get("bias", 0), bias)
    x = torch.randn(3, 6).double()
    torch.testing.assert_close(series(x), x @ weight.T + bias)


@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh"])
def test_nonlinear_bottlenecks_are_not_linear_and_do_not_fold(activation):
    torch.manual_seed(0)
    for adapter in (ParallelBottleneck, SeriesBottleneck):
        module = adapter(nn.Linear(4, 4, bias=False), rank=2, activation=activation, init="normal")
        nn.init.normal_(module.D)
        nn.init.normal_(module.U)
        x = torch.randn(5, 4)
        assert (module(-2 * x) + 2 * module(x)).abs().max() > 1e-2
        with pytest.raises(CannotFold, match=f"{adapter.__name__} with activation='{activation}' is not linear"):
            module.delta()


def test_parameter_counts():
    host = nn.Linear(6, 10, bias=False)

    def count(adapter):
        return sum(p.numel() for p in adapter.parameters()) - 60

    assert count(SeriesBottleneck(host, rank=3)) == 2 * 3 * 10
    assert count(SeriesBottleneck(host, rank=3, side="input")) == 2 * 3 * 6
    assert count(ParallelBottleneck(host, rank=3)) == count(LoRA(host, rank=3)) == 3 * (6 + 10)


def test_init_normal_is_small_and_not_zero():
    for adapter in (ParallelBottleneck, SeriesBottleneck):
        module = adapter(nn.Linear(64, 64), rank=32, init="normal")
        for p in (module.D, module.U):
            assert p.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(
    "build",
    [
        lambda host: LoRA(host, rank=4, dropout=0.5),
        lambda host: ParallelBottleneck(host, rank=4, dropout=0.5, init="normal"),
        lambda host: SeriesBottleneck(host, rank=4, dropout=0.5, init="normal"),
        lambda host: SeriesBottleneck(host, rank=4, dropout=0.5, init="normal", side="input"),
    ],
)
def test_dropout_only_in_training_and_only_beside_the_host(build):
    adapter = build(nn.Linear(8, 8))
    for name, p in adapter.named_parameters():
        if not name.startswith("host."):
            nn.init.normal_(p)
    x = torch.randn(3, 8)
    adapter.train()
    assert not torch.equal(adapter(x), adapter(x))
    adapter.eval()
    assert torch.equal(adapter(x), adapter(x))
    for name, p in adapter.named_parameters():
        if name in ("B", "U"):
            nn.init.zeros_(p)
    adapter.train()
    torch.testing.assert_close(adapter(x), adapter.host(x))


def test_rank_above_what_the_host_has():
    with pytest.raises(
        ValueError, match=r"rank must be at most 4 for a host of 6 inputs and 4 outputs, got 5 \(LoRA\)"
    ):
        LoRA(nn.Linear(6, 4), rank=5)
    with pytest.raises(ValueError, match="at most 4"):
        SeriesBottleneck(nn.Linear(6, 4), rank=5)
    SeriesBottleneck(nn.Linear(6, 4), rank=5, side="input")
    with pytest.raises(ValueError, match="side must be one of 'output', 'input', got 'both'"):
        SeriesBottleneck(nn.Linear(6, 4), side="both")
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 0.9\], got 1.0"):
        LoRA(nn.Linear(6, 4), dropout=1.0)


def test_catalogue_knows_them():
    assert {"LoRA", "SeriesBottleneck", "ParallelBottleneck"} <= set(methods())
    assert list(hyperparameters(LoRA)) == ["rank", "alpha", "dropout", "rslora"]
    assert all(
        row.help for name in (LoRA, SeriesBottleneck, ParallelBottleneck) for row in hyperparameters(name).values()
    )
    assert "2106.09685" in cite("LoRA")
