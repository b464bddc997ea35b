"""MOS: what may change while a task is learnt, what must not, and what is kept of it."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from notebook_kit.adapters import LoRA, attach
from notebook_kit.data import class_increments
from notebook_kit.expert_merging import ModelSurgery, insert_mlp_adapters, merge_with_earlier, orthogonality_loss
from notebook_kit.models import tiny_vit
from notebook_kit.weights import load, save
from tests.untyped import untyped

TASKS = [(x[:24], y[:24]) for x, y in class_increments("train")]
IMAGES = class_increments("test", n_tasks=1)[0][0][:30]


def backbone(seed=0):
    return tiny_vit(seed, image_size=8).vit


def learner(n_tasks=0, *, model=None, **settings):
    if model is None:
        model = backbone()
        insert_mlp_adapters(model, scale=1.0)
    surgery = ModelSurgery(model, **({"epochs": 2, "batch_size": 12, "alignment_epochs": 2} | settings))
    for task in TASKS[:n_tasks]:
        surgery.learn(*task)
    return surgery


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def distance(a, b):
    return torch.cat([(a[key] - b[key]).flatten() for key in a]).norm().item()


# ---------------------------------------------------------------- the adapter
def test_a_fresh_adapter_changes_nothing_and_alone_is_trainable():
    plain, model = backbone(), backbone()
    names = insert_mlp_adapters(model)
    assert names == ["layers.0", "layers.1"]
    torch.testing.assert_close(model(IMAGES).last_hidden_state, plain(IMAGES).last_hidden_state, rtol=0, atol=1e-6)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    parts = ("down.weight", "down.bias", "up.weight", "up.bias")
    assert trained == {f"{block}.mlp.{part}" for block in names for part in parts}


def test_the_adapter_reads_the_stream_before_the_norm():
    model = backbone()
    insert_mlp_adapters(model, scale=0.5)
    adapter = model.layers[0].mlp
    with torch.no_grad():
        adapter.up.weight.normal_()
        adapter.up.bias.normal_()
        x = torch.randn(7, 32)
        by_hand = adapter.up.weight @ torch.relu(adapter.down.weight @ x[0] + adapter.down.bias) + adapter.up.bias
        expected = adapter.mlp(adapter.norm(x[0])) + 0.5 * by_hand
        torch.testing.assert_close(adapter(x)[0], expected)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"blocks": "nowhere"}, "no module of ViTModel matches blocks='nowhere'"),
        ({"norm": "ln"}, r"layers\.0 has no module 'ln', only attention"),
        ({"scale": 0.0}, "scale must be in"),
        ({"bottleneck": 0}, "bottleneck must be in"),
    ],
)
def test_adapters_that_cannot_be_inserted_change_nothing(settings, text):
    model = backbone()
    with pytest.raises(ValueError, match=text):
        insert_mlp_adapters(model, **settings)
    assert all(p.requires_grad for p in model.parameters())
    assert equal(model.state_dict(), backbone().state_dict())


def test_adapters_are_inserted_once():
    model = backbone()
    insert_mlp_adapters(model)
    with pytest.raises(ValueError, match=r"layers\.0 carries an MLPAdapter already"):
        insert_mlp_adapters(model)


def test_the_callers_random_state_is_left_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    learner(1)
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------- merging
def test_merging_by_hand():
    mean = {"w": torch.tensor([0.0, 1.0]).mean()}
    assert merge_with_earlier({"w": torch.tensor(3.0)}, mean, 0.1)["w"].item() == pytest.approx(2.75)


def test_merging_wholly_gives_the_mean_of_the_earlier_adapters():
    surgery = learner(2, adapter_momentum=0.0)
    surgery.adapter_momentum = 1.0
    mean = {name: (tensor + surgery.adapters[1][name]) / 2 for name, tensor in surgery.adapters[0].items()}
    surgery.learn(*TASKS[2])
    assert distance(surgery.adapters[0], surgery.adapters[1]) > 0.01
    assert distance(surgery.adapters[2], mean) < 1e-6


def test_the_first_task_has_nothing_to_merge_with():
    assert equal(learner(1, adapter_momentum=0.0).adapters[0], learner(1, adapter_momentum=0.9).adapters[0])


def test_an_adapter_starts_from_the_one_before_and_is_pulled_back_to_it():
    travelled = []
    for m in (0.0, 0.1, 0.5):
        surgery = learner(2, adapter_momentum=m, lr=0.05, epochs=4)
        travelled.append(distance(*surgery.adapters))
    assert travelled[0] > 1.5 * travelled[1] > 2 * travelled[2] > 0
    still = learner(2, adapter_momentum=0.0, lr=1e-5)
    assert distance(*still.adapters) < 1e-3


def undropped():
    model = backbone()
    insert_mlp_adapters(model, scale=1.0, dropout=0.0)
    return model


def test_without_merging_the_adapter_is_what_sgd_makes_of_it():
    surgery = learner(1, model=undropped(), adapter_momentum=0.0, epochs=1, orthogonality=0.0)
    model, (x, y) = undropped(), TASKS[0]
    torch.manual_seed(0)
    rows = nn.Linear(32, 2)
    adapter = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizers = [
        torch.optim.SGD(adapter.values(), lr=0.05, momentum=0.9, weight_decay=5e-4),
        torch.optim.SGD(rows.parameters(), lr=0.005, momentum=0.9, weight_decay=5e-4),
    ]
    # Two steps, and the cosine has the second at half the rate.
    for factor, batch in zip((1, 0.5), torch.randperm(24).split(12), strict=True):
        F.cross_entropy(rows(model(x[batch]).last_hidden_state[:, 0]), y[batch]).backward()
        for optimizer, rate in zip(optimizers, (0.05, 0.005), strict=True):
            optimizer.param_groups[0]["lr"] = factor * rate
            optimizer.step()
            optimizer.zero_grad()
    for name, parameter in adapter.items():
        torch.testing.assert_close(surgery.adapters[0][name], parameter.detach())
    torch.testing.assert_close(surgery.head, (rows.weight.detach(), rows.bias.detach()))


def test_the_loss_of_a_later_task_by_hand():
    surgery = learner(1, model=undropped(), orthogonality=0.3)
    means = torch.stack([gaussian.centre for gaussian in surgery.gaussians])
    x, y = TASKS[1]
    torch.manual_seed(1)
    rows, batch = nn.Linear(32, 2), torch.randperm(24)[:12]
    f = surgery.read(x, adapter=0)[batch]
    expected = F.cross_entropy(rows(f), y[batch] - 2) + 0.3 * orthogonality_loss(torch.cat([means, f]))
    assert surgery.learn(x, y)[0] == pytest.approx(expected.item(), rel=1e-4)


def test_backbone_and_earlier_adapters_are_never_touched():
    surgery = learner(2)
    frozen = {name: p for name, p in surgery.model.named_parameters() if not p.requires_grad}
    assert len(frozen) == len(list(backbone().parameters()))
    before, adapters = copy.deepcopy((frozen, surgery.adapters))
    surgery.learn(*TASKS[2])
    surgery.predict(IMAGES)
    surgery.logits(IMAGES)
    assert equal(frozen, before)
    assert all(equal(now, then) for now, then in zip(surgery.adapters, adapters, strict=False))


def test_answering_leaves_the_adapter_in_the_model_as_it_was():
    surgery = learner(2)
    before = copy.deepcopy(surgery.model.state_dict())
    surgery.predict(IMAGES)
    assert equal(surgery.model.state_dict(), before)


def test_running_statistics_of_the_backbone_stay():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen = nn.Linear(64, 8)
            self.norm = nn.BatchNorm1d(8)
            self.adapter = nn.Linear(8, 8)

        def forward(self, x):
            return self.adapter(self.norm(self.frozen(x.flatten(1))))

    net = Net()
    net.frozen.requires_grad_(False)
    net.norm.requires_grad_(False)
    surgery = learner(2, model=net, features=lambda model, x: model(x))
    assert net.norm.num_batches_tracked == 0
    assert not net.training
    assert surgery.predict(IMAGES).shape == (30,)


# ---------------------------------------------------------------- the head
def test_a_task_does_not_move_the_rows_of_older_classes():
    surgery = learner(1, alignment_epochs=0)
    old = surgery.head
    surgery.learn(*TASKS[1])
    assert surgery.head[0].shape == (4, 32)
    assert torch.equal(surgery.head[0][:2], old[0])
    assert torch.equal(surgery.head[1][:2], old[1])


def test_alignment_moves_the_head_and_nothing_else():
    plain, aligned = learner(2, alignment_epochs=0), learner(2, alignment_epochs=5)
    assert all(equal(a, b) for a, b in zip(plain.adapters, aligned.adapters, strict=True))
    assert torch.equal(plain.prototypes, aligned.prototypes)
    assert not torch.equal(plain.head[0][:2], aligned.head[0][:2])


def test_prototypes_are_means_under_the_first_adapter():
    surgery = learner(2)
    x, y = TASKS[1]
    features = surgery.read(x, adapter=0)
    torch.testing.assert_close(surgery.prototypes[2:], torch.stack([features[y == c].mean(0) for c in (2, 3)]))
    own = surgery.read(x, adapter=1)
    torch.testing.assert_close(surgery.gaussians[3].centre, own[y == 3].mean(0), rtol=1e-4, atol=1e-5)


def test_orthogonality_loss_falls_when_rows_are_made_orthogonal():
    rows = torch.randn(6, 8)
    spread = torch.linalg.qr(rows.T).Q.T
    assert orthogonality_loss(spread) < orthogonality_loss(rows)
    # Of n orthonormal rows by hand: log(e^(1/0.8) + n - 1) - 1/0.8.
    by_hand = (torch.tensor(1.25).exp() + 5).log() - 1.25
    torch.testing.assert_close(orthogonality_loss(spread), by_hand)
    torch.testing.assert_close(orthogonality_loss(7 * rows), orthogonality_loss(rows))


# ---------------------------------------------------------------- use
def test_labels_may_be_any_integers_and_arrive_in_any_order():
    renamed = learner()
    names = torch.tensor([70, -3, 12, 5])
    for x, y in TASKS[:2]:
        renamed.learn(x, names[y])
    plain = learner(2)
    assert renamed.classes == [-3, 70, 5, 12]
    assert renamed.tasks == [0, 0, 1, 1]
    assert set(renamed.predict(IMAGES).tolist()) <= {-3, 70, 5, 12}
    assert plain.classes == [0, 1, 2, 3]


def test_the_same_seed_gives_the_same_learner():
    assert equal(learner(2).weights(), learner(2).weights())
    assert not equal(learner(2).weights(), learner(2, seed=1).weights())


def test_it_learns_and_counts_only_classes_it_has_seen():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16))
    net[1].requires_grad_(False)
    surgery = learner(model=net, features=lambda model, x: model(x), epochs=8, alignment_epochs=30)
    losses = surgery.learn(*TASKS[0])
    assert len(losses) == 16
    assert sum(losses[-3:]) < sum(losses[:3])
    surgery.learn(*TASKS[1])
    x, y = (torch.cat(parts) for parts in zip(*TASKS[:2], strict=True))
    accuracy = surgery.score(x, y)
    assert accuracy == (surgery.predict(x) == y).float().mean().item()
    assert accuracy > 0.8


def test_any_adapter_will_do():
    model = backbone()
    attach(model, LoRA, targets=r"mlp\.fc1$", rank=2)
    surgery = learner(2, model=model)
    assert set(surgery.adapters[0]) == {f"layers.{i}.mlp.fc1.{part}" for i in (0, 1) for part in "AB"}
    assert surgery.predict(IMAGES).shape == (30,)


@pytest.mark.parametrize("statistics", ["variance", "centroids"])
def test_classes_may_leave_less_behind_or_more(statistics):
    assert learner(2, statistics=statistics).predict(IMAGES).shape == (30,)


# ---------------------------------------------------------------- keeping
def test_a_learner_is_saved_loaded_and_learns_on(tmp_path):
    first, second = learner(2), learner(1, seed=0)
    second.load(first.save(tmp_path / "stream.safetensors"))
    assert equal(second.weights(), first.weights())
    assert torch.equal(second.predict(IMAGES), first.predict(IMAGES))
    for surgery in (first, second):
        surgery.learn(*TASKS[2])
    assert equal(second.weights(), first.weights())


def test_no_image_and_no_backbone_is_kept():
    state = learner(2).weights()
    kept = sum(tensor.numel() for name, tensor in state.items() if name.startswith("adapters."))
    assert kept == 2 * sum(p.numel() for p in learner().model.parameters() if p.requires_grad)
    assert not any(tensor.shape[-2:] == (8, 8) for tensor in state.values())


def test_a_file_of_another_learner_is_refused_and_changes_nothing(tmp_path):
    path = learner(2).save(tmp_path / "a.safetensors")
    other = backbone(seed=1)
    insert_mlp_adapters(other)
    narrow = backbone()
    insert_mlp_adapters(narrow, bottleneck=4)
    for model, text in ((other, "made on another backbone"), (narrow, "adapter 0 of .* has other tensors")):
        surgery = learner(1, model=model)
        before = copy.deepcopy(surgery.weights())
        with pytest.raises(ValueError, match=text):
            surgery.load(path)
        assert equal(surgery.weights(), before)


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda state: state.pop("prototypes"), "it lacks 'prototypes'"),
        (lambda state: state.pop("gaussians.1.mean"), r"lacks 'gaussians\.1\.mean'"),
        (lambda state: state["head.bias"].fill_(float("nan")), r"'head\.bias' of .* holds NaN"),
        (lambda state: state.update(prototypes=state["prototypes"][:1].clone()), "'prototypes' of .* is of 1 classes"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, spoil, text):
    surgery = learner(1)
    state = {name: tensor.clone() for name, tensor in surgery.weights().items()}
    spoil(state)
    save(state, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=text):
        surgery.load(tmp_path / "b.safetensors")


def test_a_pickle_is_refused(tmp_path):
    torch.save(learner(1).weights(), tmp_path / "c.pt")
    with pytest.raises(ValueError, match="pickle"):
        learner().load(tmp_path / "c.pt")


def test_saved_tensors_are_plain(tmp_path):
    state = load(learner(1).save(tmp_path / "d.safetensors"))
    assert state["classes"].tolist() == [0, 1]
    assert state["adapters.0.layers.0.mlp.up.weight"].shape == (32, 16)


# ---------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("x", "y", "text"),
    [
        (TASKS[0][0], TASKS[0][1], "class 0 was learnt in task 0 already"),
        (TASKS[1][0][:0], TASKS[1][1][:0], "needs images and as many labels, got 0 and 0"),
        (TASKS[1][0][:3], torch.tensor([5, 5, 6]), "class 6 has one image"),
        (TASKS[1][0], TASKS[1][1][:5], "got 24 and 5"),
        (TASKS[1][0] * float("nan"), TASKS[1][1], "the loss of task 1 is nan"),
    ],
)
def test_a_bad_task_is_refused_and_changes_nothing(x, y, text):
    surgery = learner(1)
    before, inside = copy.deepcopy((surgery.weights(), surgery.model.state_dict()))
    with untyped(), pytest.raises(ValueError, match=text):
        surgery.learn(x, y)
    assert equal(surgery.weights(), before)
    assert equal(surgery.model.state_dict(), inside)


@pytest.mark.parametrize("use", ["predict", "retrieve", "logits"])
def test_nothing_can_be_asked_before_the_first_task(use):
    with pytest.raises(ValueError, match=r"nothing was learnt yet.*call `learn` first"):
        getattr(learner(), use)(IMAGES)


def test_nothing_can_be_kept_before_the_first_task():
    with pytest.raises(ValueError, match="nothing to keep"):
        learner().weights()


def test_classes_that_are_not_known_are_not_scored():
    surgery = learner(1)
    with pytest.raises(ValueError, match=r"class 2 was not learnt yet, only \[0, 1\]"):
        surgery.score(*TASKS[1])
    with pytest.raises(ValueError, match="at least one image"):
        surgery.score(IMAGES[:0], torch.empty(0, dtype=torch.long))


def test_other_bad_input():
    with pytest.raises(ValueError, match="nothing in the model requires a gradient"):
        ModelSurgery(backbone().requires_grad_(False))
    with pytest.raises(ValueError, match=r"adapter_momentum must be in \[0, 1\], got 1.5"):
        learner(adapter_momentum=1.5)
    with pytest.raises(ValueError, match="adapter must be one of 1 learnt so far, got 1"):
        learner(1).read(IMAGES, adapter=1)
    with pytest.raises(ValueError, match=r"rounds must be in \[1, 64\], got 0"):
        learner(1).predict(IMAGES, rounds=0)
