"""Greedy soup: who joins, and that the held-out score never falls."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from notebook_kit.merging import average, greedy_ingredients, greedy_soup, merge_files, save

BASE = {"w": torch.zeros(2)}


def runs(*rows):
    return [{"w": torch.tensor(row)} for row in rows]


def near(target):
    return lambda weights: -float((weights["w"] - torch.tensor(target)).norm())


def test_a_soup_by_hand():
    # Scores alone: -1, -1.5, -3. With the second the mean is (0.25, 0), nearer still; with the third it is worse.
    experts = runs([3.0, 0.0], [1.0, 0.0], [-1.5, 0.0])
    score = near([0.0, 0.0])
    assert greedy_ingredients(BASE, experts, score=score) == {"ingredients": [1, 2]}
    torch.testing.assert_close(greedy_soup(BASE, experts, score=score)["w"], torch.tensor([-0.25, 0.0]))


def test_a_run_that_changes_nothing_joins_unless_strict():
    experts = runs([1.0, 0.0], [1.0, 0.0])
    assert greedy_ingredients(BASE, experts, score=near([0.0, 0.0]))["ingredients"] == [0, 1]
    assert greedy_ingredients(BASE, experts, score=near([0.0, 0.0]), strict=True)["ingredients"] == [0]


@given(st.integers(1, 8), st.integers(0, 10**6))
@settings(deadline=None, max_examples=30)
def test_never_worse_than_the_best_on_what_chose_it(count, seed):
    g = torch.Generator().manual_seed(seed)
    experts = [{"w": torch.randn(2, generator=g)} for _ in range(count)]
    score = near(torch.randn(2, generator=g).tolist())
    asked = []
    soup = greedy_soup(BASE, experts, score=lambda weights: asked.append(1) or score(weights))
    assert score(soup) >= max(score(average(BASE, [expert])) for expert in experts)
    assert len(asked) <= 2 * count - 1


def test_files_are_scored_whole(tmp_path):
    base = {"a": torch.zeros(2), "b": torch.zeros(2)}
    experts = [{"a": torch.ones(2), "b": -torch.ones(2)}, {"a": -torch.ones(2), "b": torch.ones(2)}]
    paths = [save(weights, tmp_path / f"{i}.safetensors") for i, weights in enumerate([base, *experts])]
    seen = []

    def score(weights):
        seen.append(set(weights))
        return -sum(float(tensor.norm()) for tensor in weights.values())

    out = merge_files(greedy_soup, paths[0], paths[1:], tmp_path / "o.safetensors", progress=False, score=score)
    from notebook_kit.merging import load

    assert load(out)["a"].tolist() == [0, 0]
    assert seen == [{"a", "b"}] * 3


def test_a_score_that_is_no_number():
    with pytest.raises(ValueError, match=r"score .* gave NaN for a merged model"):
        greedy_soup(BASE, runs([1.0, 0.0], [2.0, 0.0]), score=lambda weights: float("nan"))


def test_no_expert():
    with pytest.raises(ValueError, match="at least one state dict"):
        greedy_soup(BASE, [], score=near([0.0, 0.0]))
