"""The adapter that begins as nothing, the gate, the letters, and who runs."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from notebook_kit.mixtures import (
    MoVA,
    MoVAdapter,
    WordTokens,
    loss_labels,
    masked_gate,
    read_letters,
    routing_prompt,
    write_letters,
)
from notebook_kit.mixtures.grid_attention import GridAttention
from notebook_kit.models import tiny_llama

WIDTHS, SIDES = (5, 8, 3), (2, 4, 1)


class Eye(nn.Module):
    def __init__(self, width, side):
        super().__init__()
        self.map, self.side, self.seen = nn.Linear(3, width), side, 0

    def forward(self, images):
        self.seen += len(images)
        return self.map(nn.functional.adaptive_avg_pool2d(images, self.side).flatten(2).mT)


def model(dtype=torch.float32, **options):
    torch.manual_seed(0)
    names = ["digits", "charts", "noise"]
    words = WordTokens([routing_prompt(names, ""), ", none", "which digit it is", "0 1 2"])
    lm = tiny_llama(vocab_size=len(words))
    sizes = {"d_base": 8, "expert_widths": WIDTHS, "grid": 4, "d_text": 6, "n_blocks": 2, "n_heads": 1}
    eyes = [Eye(w, s) for w, s in zip(WIDTHS, SIDES, strict=True)]
    return MoVA(Eye(8, 4), eyes, lm, words, descriptions=names, **sizes, **options).eval().to(dtype)


def adapter(trained=False, **options):
    torch.manual_seed(0)
    made = MoVAdapter(8, WIDTHS, 6, 10, 4, n_heads=1, **options).eval()
    if trained:
        for p in made.parameters():
            p.data += 0.2 * torch.randn_like(p)
    return made


def inputs(n=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    features = [torch.randn(n, 16, w, generator=g) for w in WIDTHS]
    return torch.randn(n, 16, 8, generator=g), features, torch.randn(n, 6, generator=g)


def packed(features, mask):
    return [v[mask[:, j]] for j, v in enumerate(features)]


@pytest.mark.parametrize("bits", range(8))
def test_at_first_the_tokens_are_the_base_encoders(bits):
    x, features, text = inputs()
    mask = torch.tensor([[bool(bits >> j & 1) for j in range(3)]]).expand(4, -1)
    fused, gates = adapter().fuse(x, packed(features, mask), mask, text)
    assert torch.equal(fused, x)
    assert gates.shape == (3, 4, 3)
    assert torch.equal(gates.sum(-1) > 0.5, mask.any(1).expand(3, -1))


def test_the_gate_by_hand():
    zeros = torch.zeros(1, 3)
    assert masked_gate(zeros, torch.tensor([[True, False, True]]), 2).tolist() == [[0.5, 0, 0.5]]
    assert masked_gate(zeros, torch.tensor([[False, True, False]]), 3).tolist() == [[0, 1, 0]]
    assert masked_gate(zeros, torch.zeros(1, 3, dtype=torch.bool), 3).tolist() == [[0, 0, 0]]
    assert masked_gate(zeros, torch.ones(1, 3, dtype=torch.bool), 2).tolist() == [[0.5, 0.5, 0]]


@given(st.integers(0, 9999), st.integers(1, 5), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
@settings(deadline=None, max_examples=30)
def test_gates_sum_to_one_over_the_chosen(seed, k, dtype):
    g = torch.Generator().manual_seed(seed)
    logits, mask = 5 * torch.randn(6, 4, generator=g).to(dtype), torch.rand(6, 4, generator=g) < 0.6
    w = masked_gate(logits, mask, k)
    assert not w[~mask].any()
    assert ((w > 0).sum(1) <= k).all()
    torch.testing.assert_close(w.sum(1), mask.any(1).float())


def test_no_expert_is_no_expert_whatever_the_gate():
    made = adapter(trained=True)
    x, features, text = inputs()
    nobody = torch.zeros(4, 3, dtype=torch.bool)
    alone = made.fuse(x, packed(features, nobody), nobody, text)[0]
    for block in made.blocks:
        block.gate[2].bias.data += 7 * torch.randn(3)
        for cross in block.cross:
            cross.out.weight.data += 1
    assert torch.equal(made.fuse(x, packed(features, nobody), nobody, text)[0], alone)


def test_a_batch_is_its_rows():
    made = adapter(trained=True)
    x, features, text = inputs()
    mask = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 1]]).bool()
    together, gates = made(x, packed(features, mask), mask, text)
    assert together.shape == (4, 4, 10)
    for i in range(4):
        row = slice(i, i + 1)
        alone, own = made(x[row], packed([v[row] for v in features], mask[row]), mask[row], text[row])
        torch.testing.assert_close(together[row], alone, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(gates[:, row], own)


def test_the_question_may_be_kept_out_of_the_gate():
    x, features, text = inputs()
    mask = torch.ones(4, 3, dtype=torch.bool)
    for gate_text in (True, False):
        made = adapter(trained=True, gate_text=gate_text)
        gates = [made.blocks[0](x, features, mask, t)[1] for t in (text, -text)]
        assert torch.equal(*gates) != gate_text


def test_gradients_reach_everything_but_the_experts_and_have_no_nan():
    made = model()
    with torch.no_grad():
        for name, p in made.named_parameters():
            p += 0.1 * torch.randn_like(p) if "experts" not in name else 0
    images = torch.rand(3, 3, 8, 8)
    mask = torch.tensor([[1, 1, 1], [0, 0, 0], [0, 1, 0]]).bool()
    seen, _ = made.look(images, ["which digit"] * 3, mask)
    made.text_loss(seen, ["which digit"] * 3, ["0", "1", "2"]).sum().backward()
    for name, p in made.named_parameters():
        if name.startswith("experts."):
            assert p.grad is None
        else:
            assert p.grad is not None, name
            assert p.grad.isfinite().all(), name


def test_only_the_chosen_run():
    made, images = model(), torch.rand(5, 3, 8, 8)
    mask = torch.tensor([[1, 0, 0]] * 2 + [[1, 0, 1]] + [[0, 0, 0]] * 2).bool()
    first = made(images, ["which digit"] * 5, mask=mask)
    assert made.runs.tolist() == [3, 0, 1] == [eye.seen for eye in made.experts]
    made.experts[1].map.weight.data.fill_(1e9)
    again = made(images, ["which digit"] * 5, mask=mask)
    assert again.texts == first.texts
    known = [made.features(images, j) for j in range(3)]
    ran, cached = (made.look(images, ["which digit"] * 5, mask, features=f)[0] for f in (None, known))
    torch.testing.assert_close(ran, cached, atol=1e-6, rtol=1e-5)


def test_features_are_resized_to_the_base_grid():
    made, images = model(), torch.rand(2, 3, 8, 8)
    assert [made.features(images, j).shape for j in range(3)] == [(2, 16, w) for w in WIDTHS]
    one = made.features(images, 2)
    torch.testing.assert_close(one, made.experts[2](images).expand(-1, 16, -1))


def test_routing_writes_text_and_reads_letters():
    made, images = model(), torch.rand(3, 3, 8, 8)
    answer = made(images, ["which digit", "which", "digit"])
    assert len(answer.texts) == len(answer.letters) == 3
    for text, row in zip(answer.letters, answer.mask, strict=True):
        assert torch.equal(row, read_letters(text, 3))
    empty = made(images[:0], [], mask=torch.zeros(0, 3, dtype=torch.bool))
    assert empty.texts == []
    assert made.routing_look(images, ["which"] * 3).shape == (3, 4, 32)
    assert model(n_routing_tokens=1).routing_look(images, ["which"] * 3).shape == (3, 1, 32)


def test_losses_do_not_depend_on_the_neighbours_length():
    made, images = model(), torch.rand(2, 3, 8, 8)
    prompts, answers = ["which digit it is", "which"], ["none", "A , C"]
    seen = made.routing_look(images, ["which"] * 2)
    both = made.text_loss(seen, prompts, answers)
    for i in range(2):
        alone = made.text_loss(seen[i : i + 1], prompts[i : i + 1], answers[i : i + 1])
        torch.testing.assert_close(alone[0], both[i], atol=1e-5, rtol=1e-4)
    together = made.write(seen, prompts, max_new_tokens=3)
    assert together == [made.write(seen[i : i + 1], prompts[i : i + 1], max_new_tokens=3)[0] for i in range(2)]


def test_positions_are_exact_to_the_precision_of_their_sines():
    torch.manual_seed(0)
    exact = GridAttention(16, 8, 2, 32)
    half = copy.deepcopy(exact).bfloat16()
    angles = torch.atan2(exact.sin, exact.cos)
    assert (torch.atan2(half.sin.float(), half.cos.float()) - angles).abs().max() < 0.01
    assert len(exact.state_dict()) == 7


def test_bfloat16():
    made = model(torch.bfloat16)
    answer = made(torch.rand(2, 3, 8, 8).bfloat16(), ["which digit"] * 2)
    assert answer.gates.dtype == torch.bfloat16


def test_letters():
    assert read_letters("A,C", 4).tolist() == [True, False, True, False]
    assert not read_letters("none", 4).any()
    assert not read_letters("Answer: BAD", 4).any()
    assert read_letters("A,B,C,D", 4).tolist() == [True, True, True, False]
    assert read_letters("D D Z A", 4, at_most=2).tolist() == [True, False, False, True]
    assert write_letters([2, 0]) == "C , A"
    assert write_letters([]) == "none"
    assert routing_prompt(["cats", "dogs"], "who barks") == "A cats B dogs who barks"


@given(st.lists(st.integers(0, 5), unique=True, max_size=3))
def test_letters_there_and_back(experts):
    assert read_letters(write_letters(experts), 6).nonzero().flatten().tolist() == sorted(experts)


def test_labels_from_losses():
    base, losses = torch.tensor([1.0, 1.0, 0.1]), torch.tensor([[0.5, 0.2, 1.2], [0.9, 0.99, 0.5], [0.2, 0.3, 0.4]])
    assert loss_labels(base, losses) == [[1, 0], [2, 0, 1], []]
    assert loss_labels(base, losses, margin=0.2, at_most=1) == [[1], [2], []]


def test_the_planted_expert_is_labelled_and_noise_is_not_in_the_mean():
    g = torch.Generator().manual_seed(0)
    base = 1 + 0.1 * torch.randn(500, generator=g)
    losses = torch.stack([base - 0.8, base + 0.05 + 0.1 * torch.randn(500, generator=g)], 1)
    labels = loss_labels(base, losses, margin=0.2)
    assert all(label[0] == 0 for label in labels)
    assert sum(1 in label for label in labels) < 0.02 * 500


def test_words():
    words = WordTokens(["which digit ?", "7"])
    assert words.decode([*words.encode("digit 7 ?"), words.end, 3]) == "digit 7 ?"
    with pytest.raises(ValueError, match="no word 'cat', only which, digit"):
        words.encode("which cat")


def test_bad_input():
    with pytest.raises(ValueError, match="must be a square number, got 3"):
        model(n_routing_tokens=3)
    with pytest.raises(ValueError, match="grid must be even to be halved, got 3"):
        MoVAdapter(8, WIDTHS, 6, 10, 3)
    with pytest.raises(ValueError, match="multiple of 4 n_heads = 16"):
        MoVAdapter(8, WIDTHS, 6, 10, 4, n_heads=4)
    with pytest.raises(ValueError, match="27 experts"):
        routing_prompt(["x"] * 27, "")
    words = WordTokens(["x"])
    lm = tiny_llama(vocab_size=len(words))
    with pytest.raises(ValueError, match="2 experts need as many widths"):
        MoVA(Eye(8, 4), [Eye(1, 1)] * 2, lm, words, descriptions=["x"], d_base=8, expert_widths=(1, 1), grid=4)
