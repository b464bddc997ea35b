import math

import pytest
import torch

from notebook_kit import zoo
from notebook_kit.diagnostics.diffusion import (
    Denoising,
    dependence,
    evenness,
    expert_shares,
    read_as,
    record_denoising,
    silenced,
    token_cost,
    variety,
)
from notebook_kit.mixtures import DiTMoE
from notebook_kit.models import DiffusionTransformer
from notebook_kit.routing import RoutingTrace

PICKS = {"position": lambda image, place: place % 4, "class": lambda image, place: image % 2}


def by_hand(rule, n_images=40, places=16):
    """A record in which the first expert follows one rule; images 0..19 are at t = 0.1, the others at 0.9."""
    trace = RoutingTrace(["layer"], k=2, normalize=False)
    image = torch.arange(n_images).repeat_interleave(places)
    place = torch.arange(places).repeat(n_images)
    first = rule(image, place)
    experts = torch.stack([first, (first + 1) % 4], 1)
    logits = torch.nn.functional.one_hot(first, 4).float()
    trace.append(
        [(logits, torch.full(experts.shape, 0.4), experts)],
        tokens=torch.full_like(image, -1),
        positions=place,
        sequences=image,
        labels=[str(int(i) % 2) for i in image],
    )
    return Denoising(trace, (0.1, 0.9), (torch.arange(n_images) >= n_images // 2).long())


def small():
    torch.manual_seed(0)
    model = DiffusionTransformer(feed_forward=lambda d: DiTMoE(d, 8, n_experts=4), d_model=16, n_blocks=2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def test_what_was_recorded_is_what_the_model_chose():
    model = small()
    x, y = torch.randn(3, 1, 8, 8), torch.tensor([7, 2, 7])
    record = record_denoising(model, x, y, levels=(0.2, 0.7))
    assert len(record.trace) == 2 * 3 * 16
    assert record.level.tolist() == [0, 0, 0, 1, 1, 1]
    assert torch.equal(record.trace.layer(1).experts[48:], model.blocks[1].feed_forward.routing.experts)
    groups, names = record.groups("class")
    assert [names[i] for i in groups[::16]] == ["7", "2", "7"] * 2
    assert record.groups("time")[1] == ["0.2", "0.7"]
    assert record.groups("position")[0][:17].tolist() == [*range(16), 0]
    with pytest.raises(ValueError, match=r"position, time, class.*'digit'"):
        record.groups("digit")


def test_shares_by_hand():
    shares = expert_shares(by_hand(PICKS["position"]), by="position", layer=0)
    assert shares.shape == (16, 4)
    assert shares.loc["5"].tolist() == [0, 1, 0, 0]
    assert expert_shares(by_hand(PICKS["class"]), by="class", layer=0).loc["1"].tolist() == [0, 1, 0, 0]


def test_dependence_by_hand():
    table = dependence(by_hand(PICKS["position"]))
    assert table["position"][0] == pytest.approx(2)
    assert table["class"][0] == table["time"][0] == pytest.approx(0, abs=1e-6)
    assert table["position (chance)"][0] < 0.2
    table = dependence(by_hand(PICKS["class"]))
    assert table["class"][0] == pytest.approx(1)
    assert table["position"][0] == pytest.approx(0, abs=1e-6)
    assert table["class (chance)"][0] < 0.2
    table = dependence(by_hand(lambda image, place: (image >= 20).long()))
    assert table["time"][0] == pytest.approx(1)


def test_evenness_by_hand():
    table = evenness(by_hand(lambda image, place: torch.where(image < 20, place % 4, 0)))
    assert table[0][0.1] == pytest.approx(1)
    assert table[0][0.9] == pytest.approx(0.5)  # two experts of four: 1 of 2 bits


@pytest.mark.parametrize("part", ["shared", "routed"])
def test_silenced_parts_answer_zero_and_come_back(part):
    model, x = small(), torch.randn(2, 16, 16)
    layer = model.blocks[0].feed_forward
    whole, shared = layer(x), layer.shared(x)
    with silenced(model, part):
        quiet = layer(x)
    torch.testing.assert_close(quiet, whole - shared if part == "shared" else shared, atol=1e-5, rtol=1e-5)
    assert torch.equal(layer(x), whole)


def test_silenced_refuses_what_is_not_there():
    with pytest.raises(ValueError, match=r"'shared' or 'routed'.*'gate'"), silenced(small(), "gate"):
        pass
    with pytest.raises(ValueError, match=r"no DiTMoE with a routed part in DiffusionTransformer"):  # noqa: SIM117
        with silenced(DiffusionTransformer(), "routed"):
            pass
    bare = DiffusionTransformer(feed_forward=lambda d: DiTMoE(d, n_shared=0))
    with pytest.raises(ValueError, match=r"shared part"), silenced(bare, "shared"):
        pass


def test_cost_by_hand():
    # d 16, experts 3 · 16 · 8 each, shared 3 · 16 · 32, router 16 · 4
    cost = token_cost(small())
    assert cost == {"stored": 2 * (4 * 384 + 1536 + 64), "active": 2 * (2 * 384 + 1536 + 64)}
    dense = token_cost(DiffusionTransformer(n_blocks=1))
    assert dense == {"stored": 2 * 48 * 192, "active": 2 * 48 * 192}


def test_the_shipped_pair_costs_a_token_the_same():
    dense, mixture = (token_cost(zoo.digit_diffusion(kind).model) for kind in ("dense", "mixture"))
    assert mixture["active"] == pytest.approx(dense["active"], rel=0.02)
    assert mixture["stored"] > 2.5 * dense["stored"]


def test_real_digits_are_read():
    x, y = zoo.digit_images("test")
    assert (read_as(x) == y).float().mean() > 0.95
    assert torch.equal(read_as(x[:5] * 3), read_as((x[:5] * 3).clamp(-1, 1)))


def test_variety_by_hand():
    images = torch.zeros(4, 1, 8, 8)
    images[1], images[3] = 2.0, 0.0
    assert variety(images, torch.tensor([0, 0, 1, 1])) == pytest.approx(math.sqrt((2 + 0) / 2))
