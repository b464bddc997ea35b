"""The shipped checkpoints: what the manifest says of them is so."""

import hashlib
from functools import partial

import pytest
import torch

from notebook_kit import zoo
from notebook_kit.data import LANGUAGES
from notebook_kit.zoo import store
from notebook_kit.zoo.build import build
from notebook_kit.zoo.specialisation import first_experts, mutual_information, window_information
from notebook_kit.zoo.train_language import router_report

TWINS = {f"digit_twins_{width}": partial(zoo.digit_twins, width) for width in (32, 64, 128)}
FAMILIES = {
    "digit_labels": zoo.digit_labels,
    "digit_views": zoo.digit_views,
    "language_experts": zoo.language_experts,
}
BEDS = FAMILIES | TWINS | {"language_moe": zoo.language_moe}


@pytest.mark.parametrize("name", BEDS)
def test_scores_are_those_of_the_manifest(name):
    bed, entry = BEDS[name](), zoo.manifest()[name]
    weights = {"base": bed.base} | (dict(zip(bed.names, bed.experts, strict=True)) if bed.experts else {})
    chosen = list(entry["score"])[:2]  # the base and one expert: the others are alike, and time is short
    for checkpoint in chosen:
        assert bed.score(weights[checkpoint]).tasks == pytest.approx(entry["score"][checkpoint], abs=0.01)


@pytest.mark.parametrize("name", FAMILIES)
def test_each_expert_beats_the_base_on_its_own_task(name):
    bed, scores = FAMILIES[name](), zoo.manifest()[name]["score"]
    assert bed.names == list(scores)[1:]
    for expert in bed.names:
        assert scores[expert][expert] > scores["base"][expert] + 0.02, expert


@pytest.mark.parametrize("name", TWINS)
def test_twins_are_good_and_differ(name):
    bed = TWINS[name]()
    assert bed.names == ["A", "B"]
    assert all(torch.equal(bed.base[key], bed.experts[0][key]) for key in bed.base)
    assert min(bed.score(weights) for weights in bed.experts) >= 0.95
    assert not torch.allclose(bed.experts[0]["layers.1.weight"], bed.experts[1]["layers.1.weight"], atol=0.1)


def test_the_files_are_those_of_the_manifest_and_small():
    listed = {f"{bed}/{file}": facts for bed, entry in zoo.manifest().items() for file, facts in entry["files"].items()}
    found = {str(p.relative_to(store.FOLDER)): p for p in store.FOLDER.glob("*/*")}
    assert set(listed) == set(found)
    for name, path in found.items():
        assert listed[name]["bytes"] == path.stat().st_size, name
        assert listed[name]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest(), name
    assert sum(path.stat().st_size for path in found.values()) < 25_000_000


def test_language_batches_are_held_out_windows():
    bed = zoo.language_moe()
    windows = bed.batches("test")
    assert list(windows) == list(LANGUAGES) == bed.names
    assert all(ids.shape[1] == 128 for ids in windows.values())
    assert bed.experts == []


def test_weights_are_float32_in_memory():
    assert {t.dtype for t in zoo.language_experts().base.values()} == {torch.float32}


def test_each_language_is_best_known_by_its_own_expert():
    scores = zoo.manifest()["language_experts"]["score"]
    for task in zoo.language_experts().names:
        assert max(scores, key=lambda checkpoint: scores[checkpoint][task]) == task


@pytest.mark.parametrize(("name", "scale"), [("digit_labels", 0.2), ("digit_views", 0.1), ("language_experts", 0.2)])
def test_adding_task_vectors_helps_and_does_not_reach_the_experts(name, scale):
    bed, scores = FAMILIES[name](), zoo.manifest()[name]["score"]
    merged = {k: w + scale * sum(expert[k] - w for expert in bed.experts) for k, w in bed.base.items()}
    own = sum(scores[expert][expert] for expert in bed.names) / len(bed.names)
    assert bed.score(bed.base) + 0.01 < bed.score(merged) < own - 0.05


def test_the_routers_choice_tells_of_the_language_more_than_chance():
    bed = zoo.language_moe()
    windows = bed.batches("test")
    ids = torch.cat(list(windows.values()))
    labels = torch.repeat_interleave(torch.arange(12), torch.tensor([len(w) for w in windows.values()]))
    layers = first_experts(bed.model, ids)
    reported = zoo.manifest()["language_moe"]["router"]
    assert len(layers) == len(reported) == 3
    for experts, layer in zip(layers, reported, strict=True):
        now = window_information(labels, experts)
        assert now["bits"] > 1.5 * now["chance_99"] > 1.5 * now["chance_mean"] > 0
        assert now["bits"] == pytest.approx(layer["bits"], abs=0.01)


def test_no_expert_is_dead():
    for layer in router_report(zoo.language_moe().model):
        assert min(layer["load"]) >= 0.02
        assert sum(layer["load"]) == pytest.approx(1, abs=1e-3)


def test_the_mixture_is_a_transformers_checkpoint(tmp_path):
    from transformers import MixtralForCausalLM

    bed = zoo.language_moe()
    bed.model.save_pretrained(tmp_path)
    again = MixtralForCausalLM.from_pretrained(tmp_path).eval()
    ids = bed.batches("val")["eng"][:2]
    with torch.no_grad():
        assert torch.allclose(again(input_ids=ids).logits, bed.model(input_ids=ids).logits, atol=1e-5)


def test_mutual_information_by_hand():
    labels = torch.tensor([0, 0, 1, 1])
    assert mutual_information(labels, labels) == pytest.approx(1.0)
    assert mutual_information(labels, torch.tensor([0, 1, 0, 1])) == pytest.approx(0.0)
    # p(l, e) = [[2, 1], [0, 1]] / 4, so I = 1/2 log2 4/3 + 1/4 log2 2/3 + 1/4 log2 2 = 0.3113
    assert mutual_information(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 1, 1])) == pytest.approx(0.3113, abs=1e-4)


def test_shuffling_windows_and_not_tokens_sets_chance():
    # Four windows, each wholly in one expert: any window order gives the same choices, so chance is not small.
    labels = torch.tensor([0, 0, 1, 1])
    experts = torch.tensor([0, 1, 2, 3])[:, None].expand(4, 50)
    report = window_information(labels, experts)
    assert report["bits"] == pytest.approx(1.0)
    assert report["chance_mean"] == pytest.approx(1.0)


def test_an_unknown_bed_or_a_missing_checkpoint_says_what_to_do():
    with pytest.raises(ValueError, match=r"'nothing'.*digit_labels"):
        build("nothing")
    with pytest.raises(FileNotFoundError, match=r"python -m notebook_kit\.zoo\.build nothing"):
        store.read("nothing", "base")
