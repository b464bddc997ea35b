import pytest
import torch

from notebook_kit import models
from notebook_kit.diagnostics.growing import (
    active_course,
    agreement_table,
    batch_table,
    cache_table,
    density_curve,
    domain_likelihood,
    gate_at,
    mask_table,
)
from notebook_kit.mixtures import ReadME, channel_scores, keep_channels
from notebook_kit.mixtures.read_me_training import next_token_loss

Z = torch.tensor([[2.0, 0.0, -2.0, -4.0]])
WINDOWS = {name: (torch.arange(24).reshape(2, 12) * step) % 256 for name, step in (("a", 3), ("b", 7))}


def test_a_gate_at_a_temperature():
    active = [int((gate_at(Z, temperature=t, noise=False).experts >= 0).sum()) for t in (2.0, 1.0, 0.5, 0.3, 0.25)]
    assert active == [4, 4, 2, 2, 1]
    assert gate_at(Z, temperature=2.0, hard=True, noise=False).experts.tolist() == [[0]]
    same = [gate_at(Z, temperature=1.0, seed=3).probs for _ in range(2)]
    assert torch.equal(*same)
    assert not torch.equal(same[0], gate_at(Z, temperature=1.0, seed=4).probs)


def test_the_course_of_a_schedule():
    snapshots = torch.randn(3, 40, 4)
    settings = {"duration": 20, "temperature": 2.0, "threshold": 1e-3, "decay": "linear"}
    course = active_course(snapshots, [0, 10, 20], final_temperature=0.1, **settings)
    assert course["temperature"].tolist() == pytest.approx([2.0, 1.05, 0.1])
    assert course["experts"].iloc[0] == 4
    assert course["experts"].iloc[2] < 2
    level = active_course(snapshots, [0, 10, 20], final_temperature=9.0, **settings)
    assert level["temperature"].tolist() == [2.0, 2.0, 2.0]


def test_shares_of_masks():
    scores = torch.tensor([[[5.0, 4, 3, 1, 0, 2], [5, 0, 1, 4, 3, 2]]])
    row = mask_table(keep_channels(scores, density=0.5)).loc[0]
    assert row.tolist() == pytest.approx([1 / 6, 2 / 6, 5 / 6, 0.5])


def test_likelihood_behind_the_own_expert():
    model = models.tiny_llama()
    readme = ReadME(model, keep_channels(channel_scores(model, WINDOWS), density=1.0), router_dim=16)
    figures = domain_likelihood(readme, WINDOWS)
    assert list(figures) == ["a", "b"]
    for name, ids in WINDOWS.items():
        assert figures[name] == pytest.approx(-next_token_loss(model, ids).item(), abs=1e-5)


def test_density_one_is_the_dense_model_for_both():
    model = models.tiny_llama()
    curve = density_curve(model, channel_scores(model, WINDOWS), WINDOWS, (0.25, 1.0))
    assert curve["density"].tolist() == [0.25, 1.0]
    assert curve["domain"].iloc[1] == pytest.approx(curve["random"].iloc[1], abs=1e-6)
    assert curve["domain"].iloc[0] != pytest.approx(curve["random"].iloc[0], abs=1e-6)


def test_agreement_beside_chance():
    choices = torch.tensor([[[0, 1, 0, 1]], [[0, 1, 0, 1]], [[1, 1, 0, 0]]])
    table = agreement_table(choices, 2)
    assert table["layers"].tolist() == ["0-1", "1-2"]
    assert table["agreement"].tolist() == [1, 0.5]
    assert table["chance"].tolist() == [0.5, 0.5]
    assert table["bits"].tolist() == pytest.approx([1, 0], abs=1e-6)
    assert agreement_table(choices[:1], 2).empty


def test_hit_rates_and_batches():
    sequence = torch.tensor([*map("ABCD".index, "ABCABDABCABD")])
    table = cache_table(sequence, (2, 3), lookaheads=(0, 12))
    assert table.loc[2, ["lru", "belady", "belady, 0 ahead", "belady, 12 ahead"]].tolist() == [0, 3 / 12, 0, 3 / 12]
    assert table.loc[3, ["lru", "belady"]].tolist() == [0.5, 0.5]
    batches = batch_table(torch.tensor([[0, 1], [1, 1], [0, 0]]), (3,))
    assert batches.loc[(3, "arrival")].tolist() == pytest.approx([2, 3, 4 / 6, 0, 0])
    assert batches.loc[(3, "expert")].tolist() == pytest.approx([4, 1.5, 4 / 6, 0.5, 1])
