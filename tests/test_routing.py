"""Recording, keeping and reading back what routers said."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from notebook_kit import models
from notebook_kit.checkpoints import BadCheckpoint
from notebook_kit.diagnostics.byte_mixture import ByteMixture
from notebook_kit.mixtures import MoE
from notebook_kit.models import MLP
from notebook_kit.routers import BalancedAssignment, ExpertChoice, LossFreeBias, StableMoE, TopK, install
from notebook_kit.routing import Routing, RoutingTrace, aux_loss, record_routing

BUILDERS = [models.tiny_mixtral, models.tiny_qwen3_moe, models.tiny_olmoe, models.tiny_deepseek_v3]
IDS = torch.arange(30).reshape(3, 10) * 5 % 256


@pytest.mark.parametrize("build", BUILDERS)
@torch.no_grad()
def test_the_trace_has_the_models_logits(build):
    model = build()
    with record_routing(model) as trace:
        logits = model(IDS, output_router_logits=True).router_logits
    assert len(trace) == 30
    for i, expected in enumerate(logits):
        torch.testing.assert_close(trace.layer(i).logits, expected.reshape(30, -1))
    assert torch.equal(trace.tokens, IDS.reshape(-1))
    assert trace.positions[:11].tolist() == [*range(10), 0]
    assert trace.sequences.unique().tolist() == [0, 1, 2]


@torch.no_grad()
def test_what_the_gates_are_like_is_remembered():
    expected = {
        "tiny_mixtral": (True, "softmax"),
        "tiny_olmoe": (False, "softmax"),
        "tiny_deepseek_v3": (True, "sigmoid"),
    }
    for name, (normalize, scoring) in expected.items():
        model = getattr(models, name)()
        with record_routing(model) as trace:
            model(IDS)
        assert (trace.k, trace.normalize, trace.scoring) == (2, normalize, scoring)


@torch.no_grad()
def test_qwen2_and_deepseek_v2():
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

    small = {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    small |= {"intermediate_size": 64, "moe_intermediate_size": 32, "num_key_value_heads": 4, "num_experts_per_tok": 2}
    qwen = Qwen2MoeForCausalLM(Qwen2MoeConfig(**small, num_experts=8, shared_expert_intermediate_size=32))
    latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
    config = DeepseekV2Config(**small, **latent, n_routed_experts=8, n_shared_experts=1, first_k_dense_replace=1)
    for model, layers in ((qwen.eval(), 2), (DeepseekV2ForCausalLM(config).eval(), 1)):
        with record_routing(model) as trace:
            plain = model(IDS).logits
        assert (len(trace), len(trace.layers), trace.normalize) == (30, layers, False)
        install(model, TopK)
        torch.testing.assert_close(model(IDS).logits, plain, atol=1e-5, rtol=0)


@torch.no_grad()
def test_labels_padding_and_several_batches():
    model = models.tiny_mixtral()
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    with record_routing(model) as trace:
        with trace.labelled("eng"):
            model(IDS, attention_mask=mask)
        with trace.labelled(["deu", "<b>x</b>", "eng"]):
            model(input_ids=IDS)
        model(IDS[:1])
    assert len(trace) == 26 + 30 + 10
    assert trace.label_names == ["eng", "deu", "<b>x</b>", ""]
    assert torch.bincount(trace.labels).tolist() == [26 + 10, 10, 10, 10]
    assert trace.positions[:6].tolist() == list(range(6))
    assert trace.sequences.max() == 6
    assert repr(trace) == "RoutingTrace(66 tokens, 2 layers, top 2 of 8 experts, labels eng, deu, <b>x</b>)"
    with (
        record_routing(model) as trace,
        trace.labelled(["one", "two"]),
        pytest.raises(ValueError, match="3 sequences, got 2"),
    ):
        model(IDS)


@torch.no_grad()
def test_generate_continues_its_sequences():
    model = models.tiny_mixtral()
    with record_routing(model) as trace:
        model.generate(IDS[:2], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert trace.sequences.unique().tolist() == [0, 1]
    last = trace.positions[trace.sequences == 1]
    assert last.tolist() == list(range(13))  # the fourth new token is never fed back


@torch.no_grad()
def test_installed_routers_and_our_own_layers():
    model = models.tiny_mixtral()
    install(model, TopK, k=2, capacity_factor=0.5)
    with record_routing(model) as trace:
        model(IDS)
    assert len(trace.layers) == 2
    net = nn.Sequential(nn.Linear(8, 6), MoE([MLP([6, 6]) for _ in range(3)], TopK(6, 3)), nn.Linear(6, 2))
    with record_routing(net) as trace:
        net(torch.randn(5, 8))
        net(torch.randn(2, 4, 8))
    assert trace.layers == ("1",)
    assert trace.sequences.tolist() == [0, 1, 2, 3, 4, *[5] * 4, *[6] * 4]
    assert (trace.tokens == -1).all()
    assert trace.text(0, 2) == ["", ""]


@pytest.mark.parametrize(
    ("router", "scoring"),
    [
        (lambda: TopK(6, 3), "softmax"),
        (lambda: LossFreeBias(6, 3), "sigmoid"),
        (lambda: LossFreeBias(6, 3, scores="softmax"), "softmax"),
        (lambda: BalancedAssignment(6, 3), "sigmoid"),
        (lambda: ExpertChoice(6, 3), "softmax"),
    ],
)
@torch.no_grad()
def test_a_trace_knows_how_logits_become_scores(router, scoring):
    layer = MoE([MLP([6, 6]) for _ in range(3)], router())
    with record_routing(layer) as trace:
        layer(torch.randn(9, 6))
    assert trace.scoring == scoring
    torch.testing.assert_close(trace.layer(0).probs, layer.routing.probs)


@torch.no_grad()
def test_scores_of_a_router_of_ids_and_of_an_installed_one():
    layer = ByteMixture([StableMoE(32, 8)])
    with record_routing(layer) as trace:
        layer(IDS)
    assert trace.scoring == "sigmoid"
    model = models.tiny_mixtral()
    install(model, LossFreeBias)
    with record_routing(model) as trace:
        model(IDS)
    assert trace.scoring == "sigmoid"


@torch.no_grad()
def test_layers_that_score_differently_are_refused():
    net = ByteMixture([TopK(32, 8), LossFreeBias(32, 8)])
    with (
        record_routing(net),
        pytest.raises(ValueError, match=r"moes\.0 by softmax, moes\.1 by sigmoid; record them apart"),
    ):
        net(IDS)


def test_hooks_are_taken_out_even_after_an_error():
    model = models.tiny_mixtral()
    with pytest.raises(KeyError), record_routing(model):
        raise KeyError
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert sum(hooks) == 0


def test_texts():
    trace = make_trace(tokens=[65, 10, 60, 195])
    assert trace.text() == ["A", "\n", "<", "\\xc3"]
    assert make_trace(tokens=[3, 4, 5, 900], vocabulary={3: "Hello", 4: "▁world"}).text() == [
        "Hello",
        "▁world",
        "#5",
        "#900",
    ]


def test_letters_of_several_bytes():
    tokens = [*"aé語😀<".encode(), 0xE8, 0xAA, 65, 300]
    texts = ["a", "é", "·", "語", "·", "·", "😀", "·", "·", "·", "<", "\\xe8", "\\xaa", "A", "#300"]
    assert make_trace(tokens=tokens).text() == texts
    assert make_trace(tokens=tokens).text(2, 4) == ["\\xa9", "\\xe8"]


@torch.no_grad()
def test_a_tokenizer_gives_the_texts():
    class Tokenizer:
        def convert_ids_to_tokens(self, ids):
            return [f"tok{i}" for i in ids]

    model = models.tiny_mixtral()
    with record_routing(model, tokenizer=Tokenizer()) as trace:
        model(IDS)
        model(IDS[:1])
    assert trace.text(0, 3) == ["tok0", "tok5", "tok10"]


def make_trace(tokens=(1, 2, 3, 4), vocabulary=None, layers=("a", "b")):
    trace = RoutingTrace(layers, k=2, vocabulary=vocabulary)
    n = len(tokens)
    routings = []
    for _ in layers:
        routing = TopK(1, 5).eval().route(torch.randn(n, 5))
        routings.append((routing.logits, routing.weights, routing.experts))
    zeros = torch.zeros(n, dtype=torch.int64)
    trace.append(routings, tokens=torch.tensor(tokens), positions=torch.arange(n), sequences=zeros, labels=["x"] * n)
    return trace


def test_save_and_load(tmp_path):
    trace = make_trace(vocabulary={1: "<i>", 2: "b", 77: "unused"})
    again = RoutingTrace.load(trace.save(tmp_path / "run.safetensors"))
    assert repr(again) == repr(trace)
    assert again.vocabulary == {1: "<i>", 2: "b"}
    for i in range(2):
        for part in ("logits", "probs", "weights", "experts"):
            assert torch.equal(getattr(again.layer(i), part), getattr(trace.layer(i), part))
    assert [file.name for file in tmp_path.iterdir()] == ["run.safetensors"]


def damaged(tmp_path, change):
    path = make_trace().save(tmp_path / "run.safetensors")
    tensors = load_file(path)
    from notebook_kit.checkpoints import read_header

    about = json.loads(read_header(path)[0]["__metadata__"]["routing_trace"])
    change(tensors, about)
    save_file(tensors, path, metadata={"routing_trace": json.dumps(about)})
    return path


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, about: tensors.pop("logits.1"),
        lambda tensors, about: tensors["logits.0"].fill_(float("nan")),
        lambda tensors, about: tensors["experts.0"].fill_(5),
        lambda tensors, about: tensors["labels"].fill_(-1),
        lambda tensors, about: tensors.update({"weights.0": torch.zeros(3, 2)}),
        lambda tensors, about: tensors.update(tokens=torch.zeros(4)),
        lambda tensors, about: about.update(layers=["a", "b", "c"]),
        lambda tensors, about: about.update(layers=7),
        lambda tensors, about: about.update(vocabulary={"x": "y"}),
        lambda tensors, about: about.update(k=-1),
        lambda tensors, about: about.pop("scoring"),
    ],
)
def test_a_hostile_file_is_refused(tmp_path, change):
    with pytest.raises(BadCheckpoint, match="not a sound routing trace"):
        RoutingTrace.load(damaged(tmp_path, change))


def test_other_files_are_refused(tmp_path):
    path = make_trace().save(tmp_path / "run.safetensors")
    (tmp_path / "short.safetensors").write_bytes(path.read_bytes()[:-9])
    with pytest.raises(BadCheckpoint, match="truncated"):
        RoutingTrace.load(tmp_path / "short.safetensors")
    torch.save({"a": 1}, tmp_path / "trace.pt")
    with pytest.raises(BadCheckpoint, match="pickle"):
        RoutingTrace.load(tmp_path / "trace.pt")
    save_file({"a": torch.ones(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(BadCheckpoint, match="not a sound routing trace"):
        RoutingTrace.load(tmp_path / "weights.safetensors")


def test_an_empty_trace_says_so(tmp_path):
    trace = RoutingTrace(["a"], k=2)
    assert repr(trace) == "RoutingTrace(empty, 1 layers)"
    for use in (lambda: trace.layer(0), lambda: trace.tokens, lambda: trace.save(tmp_path / "x"), trace.text):
        with pytest.raises(ValueError, match="the trace is empty: run the model inside"):
            use()
    assert list(tmp_path.iterdir()) == []


def test_bad_batches():
    trace = make_trace()
    with pytest.raises(ValueError, match=r"layer must be in \[0, 1\], got 2"):
        trace.layer(2)
    one = torch.zeros(1, dtype=torch.int64)
    rows = {"tokens": one, "positions": one, "sequences": one}
    with pytest.raises(ValueError, match="one routing a layer, 2, got 0"):
        trace.append([], **rows)
    bad = (torch.full((1, 5), float("nan")), torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="logits in a hold NaN"):
        trace.append([bad, bad], **rows)
    two = (torch.zeros(2, 5), torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="must have 1 rows, got 2"):
        trace.append([two, two], **rows)
    assert len(trace) == 4


def test_models_without_routers():
    with (
        pytest.raises(ValueError, match="no routed layer in LlamaForCausalLM: looked for"),
        record_routing(models.tiny_llama()),
    ):
        pass
    with pytest.raises(ValueError, match="remembers a routing"):
        aux_loss(models.tiny_llama())


def test_nan_in_a_model_is_reported_where_it_is():
    model = models.tiny_mixtral()
    model.model.layers[1].mlp.gate.weight.data.fill_(float("nan"))
    with record_routing(model), pytest.raises(ValueError, match=r"model\.layers\.1\.mlp hold NaN"):
        model(IDS)


def test_load_and_demand():
    experts, claimed = torch.tensor([[0, 1], [0, -1]]), torch.tensor([[0, 1], [0, 2]])
    z = torch.zeros(2, 3)
    routing = Routing(z, z, torch.zeros(2, 2), experts, torch.zeros(()), claimed)
    torch.testing.assert_close(routing.load, torch.tensor([2 / 3, 1 / 3, 0]))
    torch.testing.assert_close(routing.demand, torch.tensor([0.5, 0.25, 0.25]))
    assert routing.dropped == 0.25
