"""The diffusion bed: the manifest's figures, and images that a classifier can read."""

import pytest
import torch

from notebook_kit import zoo
from notebook_kit.mixtures import DiTMoE
from notebook_kit.models import sample
from notebook_kit.zoo.diffusion import KINDS, diffusion_model, digit_batches, flow_score

kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
def test_scores_are_those_of_the_manifest(kind):
    bed, entry = zoo.digit_diffusion(kind), zoo.manifest()[f"digit_diffusion_{kind}"]
    score = bed.score(bed.base)
    assert score.tasks == pytest.approx(entry["score"]["base"], abs=0.01)
    assert bed.names == list(score.tasks) == [str(digit) for digit in range(10)]
    assert entry["minutes"] < 6


@kinds
def test_it_learned_and_did_not_only_remember(kind):
    model = zoo.digit_diffusion(kind).model
    torch.manual_seed(0)
    new = diffusion_model(kind).eval()
    few = {split: {d: (x[:12], y[:12]) for d, (x, y) in digit_batches(split).items()} for split in ("train", "test")}

    def mean(model, split):
        return sum(flow_score(model, None, few[split]).values()) / 10

    assert mean(model, "test") > mean(new, "test") / 2
    assert mean(model, "train") - mean(model, "test") < 0.1


@kinds
def test_its_digits_are_read_as_what_was_asked(kind):
    model, reader = zoo.digit_diffusion(kind).model, zoo.digit_twins(128).model
    y = torch.arange(50) % 10
    images = sample(model, y, steps=10, guidance=2.0).clamp(-1, 1)
    read = reader((images.flatten(1) + 1) / 2).argmax(1)
    assert (read == y).float().mean() > 0.85


def test_the_mixture_has_the_papers_layers_and_uses_all_experts():
    model = zoo.digit_diffusion("mixture").model
    x, y = zoo.digit_images("test")
    with torch.no_grad():
        model(x, torch.full((len(x),), 0.5), y)
    for block in model.blocks:
        assert isinstance(block.feed_forward, DiTMoE)
        assert block.feed_forward.router.k == 2
        assert block.feed_forward.routing.load.min() > 0.01


def test_images_are_digits_from_minus_one_to_one():
    x, y = zoo.digit_images("val")
    assert x.shape == (200, 1, 8, 8)
    assert (float(x.min()), float(x.max())) == (-1, 1)
    pixels, digit = zoo.digit_diffusion().batches("val")["4"]
    assert torch.equal(pixels, x[y == 4])
    assert set(digit.tolist()) == {4}


def test_an_unknown_kind():
    with pytest.raises(ValueError, match=r"'sparse'.*dense, mixture"):
        zoo.digit_diffusion("sparse")
