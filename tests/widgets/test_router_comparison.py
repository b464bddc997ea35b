"""compare_routers: one budget, the same beginning for all, and nothing lost to one router's trouble."""

from functools import partial

import pytest
import torch

from notebook_kit import compare_routers
from notebook_kit.figures.router_comparison import PICTURES, router_comparison_view
from notebook_kit.routers import BalancedAssignment, ExpertChoice, HashRouter, LossFreeBias, NullExperts, TopK, TopP
from notebook_kit.widgets import RouterComparison
from notebook_kit.widgets import compare_routers as same_function
from notebook_kit.widgets.router_comparison import ROUTERS, _labelled

compare = partial(compare_routers, steps=4, d_model=16, d_ff=16, n_experts=4, batch_size=2, length=8, progress=False)


@pytest.fixture(scope="module")
def result():
    torch.set_num_threads(1)
    chosen = {"top": TopK, "<b>": (TopK, {"k": 9}), "made": LossFreeBias(16, 4), "fn": lambda d, n: TopP(d, n)}
    chosen |= {"hash": (HashRouter, {"table": "balanced"}), "choice": (ExpertChoice, {"k": 1})}
    return compare(chosen, seeds=2)


def test_every_kind_of_entry_and_one_that_fails(result):
    assert isinstance(result, RouterComparison)
    assert compare_routers is same_function
    table = result.table
    assert set(table.index) == {"top", "<b>", "made", "fn", "hash", "choice"}
    assert table["seeds"].to_dict() == {"top": 2, "made": 2, "fn": 2, "hash": 2, "choice": 2, "<b>": 0}
    assert "k must be at most n_experts=4, got 9" in table.loc["<b>", "problem"]
    assert list(result.errors) == ["<b>"]
    assert set(result.traces) == set(result.early) == {"top", "made", "fn", "hash", "choice"}
    assert repr(result).startswith("RouterComparison(6 routers, 1 failed; lowest loss")
    assert table["loss"].dropna().is_monotonic_increasing


def test_the_figures_are_what_they_say(result):
    table = result.table
    assert table.loc["top", "experts_per_token"] == 2
    assert table.loc["hash", "experts_per_token"] == 1
    assert table.loc["hash", "moved"] == 0
    assert table.loc["choice", "max_violation"] == 0
    assert not table.loc["choice", "causal"]
    assert table.loc["top", "causal"]
    # read 64 x 16 + 16, norm 32, gate 4 x 16, write 16 x 256 + 256, and two experts of 3 x 16 x 16
    assert table.loc["top", "active_parameters"] == 1040 + 32 + 64 + 4352 + 2 * 768
    assert 0 < table.loc["top", "loss"] < 8
    assert (result.traces["made"].scoring, result.traces["top"].scoring) == ("sigmoid", "softmax")
    assert len(result.traces["top"].label_names) == 12


def test_one_budget():
    """An expert less a token leaves compute for more text; at equal text all take the same steps."""
    chosen = {"one": (TopK, {"k": 1, "convention": "switch"}), "two": TopK, "four": (TopK, {"k": 4})}
    sizes = {"steps": 12, "d_ff": 256}
    steps = compare(chosen, **sizes).table["steps"]
    assert steps["one"] > steps["two"] == 12 > steps["four"]
    del chosen["two"]
    assert set(compare(chosen, budget="text", steps=5, d_ff=256).table["steps"]) == {5}


def test_the_same_seed_gives_the_same_figures():
    one, two = (compare([TopK, NullExperts]).frame.drop(columns="seconds") for _ in range(2))
    assert one.equals(two)
    state = torch.get_rng_state()
    given = LossFreeBias(16, 4)
    before = {name: value.clone() for name, value in given.state_dict().items()}
    torch.set_rng_state(state)
    compare([given])
    assert torch.equal(torch.get_rng_state(), state)  # the caller's random state is left alone
    assert all(torch.equal(before[name], value) for name, value in given.state_dict().items())  # a copy was trained


def test_the_routers_of_the_kit_all_run():
    result = compare(steps=3, n_layers=2)
    assert not result.errors
    assert set(result.table.index) == set(ROUTERS)
    assert len(result.traces["top-2"].layers) == 2
    assert result.explorer("BASE", picture="flow").value.data


@pytest.mark.parametrize("picture", PICTURES)
def test_every_picture(result, picture):
    for best_first in (True, False):
        figure = router_comparison_view(result.frame, result.curves, picture=picture, best_first=best_first)
        assert figure.layout.xaxis.title.text
        assert figure.layout.yaxis.title.text
        assert "1 failed" in figure.layout.title.text
        assert "<b>" not in figure.to_json()


def test_what_a_result_offers(result, tmp_path):
    assert result.figure.data
    assert result.widget().settings["picture"] == "loss"
    page = result.to_html(tmp_path / "routers.html").read_text()
    assert "specialisation" in page
    explorer = result.explorer("top", picture="drift")
    assert "all layers" in explorer.value.layout.title.text
    with pytest.raises(ValueError, match="'nobody' has no trace here; these have: top"):
        result.explorer("nobody")
    assert "image/png" in result._repr_mimebundle_()[0]


def test_when_all_fail():
    result = compare({"a": (TopK, {"k": 99}), "b": BalancedAssignment(3, 2), "c": (TopK, {"kk": 2})})
    problems = result.table["problem"]
    assert "got 99" in problems["a"]
    assert "d_model=16 and n_experts=4, got 3 and 2" in problems["b"]
    assert "no hyperparameter 'kk'" in problems["c"]
    assert repr(result) == "RouterComparison(3 routers, 3 failed)"
    assert "got 99" in result._repr_mimebundle_()["text/html"]
    with pytest.raises(ValueError, match="no router has a loss"):
        router_comparison_view(result.frame, result.curves)


def test_bad_arguments():
    with pytest.raises(ValueError, match="a router and a seed at least, got 0 and 1"):
        compare([])
    with pytest.raises(ValueError, match="a router and a seed at least, got 1 and 0"):
        compare([TopK], seeds=[])
    with pytest.raises(ValueError, match=r"steps must be in \[1, 1000000\], got 0"):
        compare([TopK], steps=0)


def test_labels():
    entries = [TopK, TopK, (TopK, {"k": 1, "convention": "switch"}), ExpertChoice(4, 2)]
    assert list(_labelled(entries)) == ["TopK", "TopK'", "TopK(k=1, convention=switch)", "ExpertChoice"]
