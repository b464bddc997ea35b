"""Linear combinations: blended or summed, the same; and finiteness is proved without a second look."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from notebook_kit.merging import combination
from notebook_kit.merging.combination import combine


@given(st.lists(st.floats(-2, 2), min_size=2, max_size=7), st.booleans(), st.integers(0, 999))
@settings(deadline=None, max_examples=40)
def test_it_is_the_weighted_sum(factors, mean, seed):
    if mean:
        factors = [abs(factor) + 0.01 for factor in factors]
        factors = [0.0, *(factor / sum(factors) for factor in factors)]
    g = torch.Generator().manual_seed(seed)
    base, *experts = ({"w": torch.randn(7, 5, generator=g)} for _ in factors)
    found = combine(base, experts, lambda name: (factors[0], factors[1:]))["w"]
    exact = sum(c * model["w"].double() for c, model in zip(factors, (base, *experts), strict=True))
    torch.testing.assert_close(found, exact.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("where", [0, 5, 24])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_whatever_is_not_finite_is_found_and_named(where, bad, monkeypatch):
    monkeypatch.setattr(combination, "PIECE", 10)
    for of_base, factors in ((0.0, [0.5, 0.5]), (0.5, [1.0, -1.0]), (1.0, [0.0, 0.0])):
        for i, name in enumerate(("base", r"experts\[0\]", r"experts\[1\]")):
            models = [{"w": torch.ones(25)} for _ in range(3)]
            models[i]["w"][where] = bad
            with pytest.raises(ValueError, match=f"tensor 'w' of {name} holds (NaN|Inf)"):
                combine(models[0], models[1:], lambda name, c=(of_base, factors): c)


def test_large_numbers_are_not_taken_for_bad_ones():
    huge = 3e38
    models = [{"w": torch.tensor([value] * 3)} for value in (huge, huge, -huge)]
    assert combine(models[0], models[1:], lambda name: (0.0, [0.5, 0.5]))["w"].tolist() == [0, 0, 0]
    same = combine(models[0], [models[1]] * 2, lambda name: (0.0, [0.5, 0.5]))["w"]
    torch.testing.assert_close(same, models[0]["w"])
