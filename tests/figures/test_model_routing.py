"""The pictures of routing between whole models: what is drawn, titles with numbers, text that stays text."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from notebook_kit.diagnostics.model_routing import ModelRoster, budget_curve
from notebook_kit.figures.model_routing import (
    PairBed,
    SceneBed,
    adaptation_view,
    budget_view,
    embedding_view,
    expert_share_figure,
    question_view,
)
from notebook_kit.mixtures import ContrastiveMoE, ExpertAggregator, MetaDMoE, MoVA, WordTokens, routing_prompt
from notebook_kit.models import MLP, tiny_bert, tiny_llama


def roster():
    scores = torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0, 0.5]])
    probs = torch.tensor([[0.9, 0.1], [0.4, 0.6]])
    names = ["<b>", "b", "c"], ["x", "y<i>"]
    return ModelRoster(scores, [4.0, 5.0, 3.0], scores.clone(), probs, torch.tensor([0, 1]), *names)


def test_a_budget():
    one = roster()
    curve = budget_curve(one, [3, 9, 12])
    figure = budget_view(one, curve, budget=9.0, threshold=0.6)
    ring = figure.data[1]
    assert ring.x.tolist() == [0, 1]
    assert ring.y.tolist() == [0, 1]
    assert "budget 9: hosted 9, active" in figure.layout.title.text
    assert "accuracy 0.500, 50% fell back" in figure.layout.title.text
    assert figure.layout.xaxis.ticktext[0] == "<b>&lt;b&gt;</b><br>● 4"
    assert figure.layout.xaxis.ticktext[2] == "c<br>3"
    assert figure.layout.yaxis.ticktext[1] == "y&lt;i&gt;"
    assert [trace.name for trace in figure.data[2:4]] == ["composition", "best single expert"]
    assert figure.data[4].x.tolist() == [9]
    assert figure.layout.yaxis2.title.text == "accuracy"
    assert len(budget_view(one, budget=3.0).data) == 2
    with pytest.raises(ValueError, match="no expert fits"):
        budget_view(one, budget=2.0)


def test_an_adaptation():
    torch.manual_seed(0)
    aggregator = ExpertAggregator(8, n_heads=2)
    model = MetaDMoE([MLP([6, 8])] * 2, MLP([6, 8]), nn.Linear(8, 2), aggregator=aggregator).eval()
    domains = {"15°": (torch.randn(30, 6), torch.arange(30) % 2), "a": (torch.randn(9, 6), torch.arange(9) % 2)}
    figure = adaptation_view(model, domains, {"ERM": {"15°": 0.5, "a": 0.25}}, inner_steps=0, n_support=1)
    assert [bar.name for bar in figure.data] == ["student, before", "student, after", "ERM"]
    assert list(figure.data[0].x) == ["15°", "a", "mean", "worst"]
    assert figure.data[0].y.tolist() == figure.data[1].y.tolist()
    assert figure.data[2].y.tolist() == [0.5, 0.25, 0.375, 0.25]
    assert len({bar.marker.color for bar in figure.data}) == 3
    assert adaptation_view(model, domains, inner_lr=1.0, inner_steps=20, n_support=1024).data


def test_shares():
    table = pd.DataFrame([[0.25, 0.75]], index=["<q>"], columns=["a", "b<"])
    figure = expert_share_figure(table, title="t", y="question", label="share")
    assert [list(trace.text) for trace in figure.data[1:]] == [["0.25"], ["0.75"]]
    assert list(figure.data[2].x) == [1]
    assert figure.layout.xaxis.ticktext == ("a", "b&lt;")
    assert figure.layout.yaxis.ticktext == ("&lt;q&gt;",)
    assert figure.layout.xaxis.title.text == "expert"


def test_embeddings():
    ids = torch.randint(1, 256, (2, 6, 9))
    bed = PairBed(ids[0], ids[1], torch.tensor([0, 1, 0, 1, 1, 0]), ["x", "y", "x", "y", "z", "x"])
    model = ContrastiveMoE(tiny_bert(), 2).eval()
    figure = embedding_view(model, bed)
    assert [trace.name for trace in figure.data[:3]] == ["x", "y", "z"]
    assert len(figure.data[0].x) == 9
    assert np.isnan(figure.data[0].x[2])
    np.testing.assert_allclose(figure.data[3].z.sum(1), 1, rtol=1e-5)
    assert "own experts" in figure.layout.title.text
    assert "1 further" in embedding_view(model, bed, shift=1, scale=1.0).layout.title.text
    assert "own experts" in embedding_view(model, bed, shift=2).layout.title.text


class Eye(nn.Module):
    def __init__(self, width, side):
        super().__init__()
        self.map, self.side = nn.Linear(3, width), side

    def forward(self, images):
        return self.map(nn.functional.adaptive_avg_pool2d(images, self.side).flatten(2).mT)


def test_a_question():
    torch.manual_seed(0)
    words = WordTokens([routing_prompt(["dots", "bars"], ""), ", none", "what", "yes no"])
    sizes = {"d_base": 8, "expert_widths": [4, 6], "grid": 2, "n_routing_tokens": 1, "n_heads": 1, "n_blocks": 2}
    lm = tiny_llama(vocab_size=len(words))
    model = MoVA(Eye(8, 2), [Eye(4, 2), Eye(6, 1)], lm, words, descriptions=["dots", "bars"], **sizes).eval()
    bed = SceneBed(torch.rand(3, 3, 8, 8), ["what"], [["yes", "no", "yes"]], ["dots", "bars"])
    for routing, chosen in (("all experts", [1, 1]), ("no expert", [0, 0])):
        figure = question_view(model, bed, picture=1, routing=routing)
        assert figure.data[1].y.tolist() == chosen
        assert figure.data[2].y.sum() == pytest.approx(float(any(chosen)))
        assert len(figure.data) == 2 + 2
        assert "(right: no)" in figure.layout.title.text
    written = question_view(model, bed)
    assert "wrote “" in written.layout.title.text
    assert list(written.data[1].x) == ["A dots", "B bars"]
    assert figure.layout.yaxis2.title.text == "chosen (0 or 1), gate weight"
    coloured = dataclasses.replace(bed, images=torch.zeros(3, 3, 8, 8))
    assert question_view(model, coloured).data[0].z.max() == 0
