"""Permutation specs read from a model or its configuration: what may be reordered in each known architecture."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from notebook_kit.alignment.conv_nets import chain_spec, children_of, resnet_spec
from notebook_kit.alignment.spec import Part, PermutationSpec
from notebook_kit.alignment.t5 import t5

FULL_WIDTH_QK_NORM = ("olmoe", "olmo2", "olmo3")
LLAMA_LIKE = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "olmo2",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "deepseek_v3",
)
SUPPORTED = (*LLAMA_LIKE, "bert", "vit", "t5", "mt5", "resnet")
RESIDUAL = "residual"


def permutation_spec(
    model_or_config,
    *,
    weights: Mapping[str, Tensor] | None = None,
    residual: bool = False,
    expert_order: bool = False,
) -> PermutationSpec:
    """Say which axes of a network's weights must be permuted together.

    Hidden units of feed-forward layers (gate rows, up rows, down columns share one permutation; each expert has its
    own), whole attention heads (a key-value head takes its group of query heads along, which may also be reordered
    among themselves; nothing moves inside a head, where rotary positions live), channels of convolutions with their
    batch norm, and optionally the residual stream.

    Args:
        model_or_config: an `MLP`, an `nn.Sequential` of linear layers and convolutions (such as `VGG`), a `ResNet`, a
            transformers model, or its configuration.
        weights: state dict or `Checkpoint` whose names to use, when they are not the model's (files of Mixtral keep
            one tensor per expert).
        residual: permute the residual stream too: one permutation for the whole stack; in a ResNet one for each
            stretch between shortcuts.
        expert_order: permute the routed experts of each layer, too, with their router rows; each one's units move
            within it. Only where experts are fused tensors. Matching it by weights takes E² assignments a layer.

    Returns:
        PermutationSpec.

    Raises:
        ValueError: an architecture that is not known; the text lists those that are. An order of experts where there
            is none.

    Source: after the specs of samuela/git-re-basin; those for transformers follow from the architectures.
    """
    config = getattr(model_or_config, "config", model_or_config)
    kind = getattr(config, "model_type", None)
    if kind is None:
        return _ours(model_or_config, residual)
    # A model merged by this kit keeps its experts' layout under a name of its own.
    kind = kind.removeprefix("mapped_")
    if kind not in SUPPORTED:
        raise ValueError(
            f"no permutation spec for model type {kind!r}: known are {', '.join(SUPPORTED)}, MLP and nn.Sequential; "
            "write one with PermutationSpec(axes, sizes)"
        )
    if weights is None:
        weights = (model_or_config if isinstance(model_or_config, nn.Module) else _hollow(config)).state_dict()
    if kind == "resnet":
        return resnet_spec(weights, residual, kind)
    table = _Table({name: len(_shape(weights, name)) for name in weights}, config, RESIDUAL if residual else None)
    table.expert_order = expert_order
    {"bert": _bert, "vit": _vit, "t5": t5, "mt5": t5}.get(kind, _llama)(table, kind, config)
    if residual:
        table.sizes[RESIDUAL] = config.hidden_size
    if expert_order and not any(perm.endswith(".order") for perm in table.sizes):
        raise ValueError(f"{kind} has no routed experts that could be reordered: use expert_order=False")
    return PermutationSpec(table.axes, table.sizes, inside=table.inside, description=kind)


class _Table:
    """Rows of a spec while it is written: parameter to a list of parts per axis."""

    def __init__(self, dims: dict[str, int], config, residual: str | None):
        self.dims, self.config, self.residual = dims, config, residual
        self.rows: dict[str, list[list[Part]]] = {}
        self.sizes: dict[str, int] = {}
        self.inside: dict[str, tuple[str, int]] = {}
        self.expert_order = False

    @property
    def axes(self) -> dict[str, tuple]:
        return {name: tuple(tuple(parts) for parts in row) for name, row in self.rows.items()}

    def put(self, name: str, axis: int, *parts: Part | None, optional: bool = False) -> None:
        parts = [part for part in parts if part is not None]
        if name not in self.dims:
            if optional or not parts:
                return
            raise ValueError(
                f"the {self.config.model_type} weights have no {name!r}: pass weights=... with the names in use"
            )
        if parts:
            self.rows.setdefault(name, [[] for _ in range(self.dims[name])])[axis].extend(parts)

    def linear(self, name: str, out: tuple = (), into: tuple = ()) -> None:
        """A torch Linear: rows carry `out` (its bias too), columns carry `into`."""
        self.put(f"{name}.weight", 0, *out)
        self.put(f"{name}.weight", 1, *into)
        self.put(f"{name}.bias", 0, *out, optional=True)

    def stream(self, *names: str, axis: int = 0) -> None:
        """Vectors or tables along the residual stream, where it is permuted at all."""
        if self.residual is not None:
            for name in names:
                self.put(name, axis, Part(self.residual), optional=True)

    @property
    def r(self) -> tuple:
        return () if self.residual is None else (Part(self.residual),)

    def heads(
        self, perm: str, names: tuple[str, str, str, str], n: int, n_kv: int, dim: int, norms: tuple = ()
    ) -> None:
        """Attention heads: blocks of `dim` rows of q, k, v and columns of o; query heads move with their group."""
        q, k, v, o = names
        group = n // n_kv
        self.sizes[perm] = n_kv
        key = (Part(perm, block=dim),)
        query = [Part(perm, block=dim * group)]
        if group > 1:
            for g in range(n_kv):
                inner = f"{perm}.{g}"
                self.sizes[inner], self.inside[inner] = group, (perm, g)
                query.append(Part(inner, block=dim, start=g * group * dim))
        for name, part in ((q, tuple(query)), (k, key), (v, key)):
            self.linear(name, part, self.r)
        self.linear(o, self.r, tuple(query))
        for name, part in zip(norms, (tuple(query), key), strict=False):
            self.put(f"{name}.weight", 0, *part)

    def gated(self, perm: str, n: int, gate: str, up: str, down: str) -> None:
        """A gated feed-forward layer: gate rows, up rows and down columns; up and down share a free sign."""
        self.sizes[perm] = n
        self.linear(gate, (Part(perm),), self.r)
        self.linear(up, (Part(perm, signs=(True,)),), self.r)
        self.linear(down, self.r, (Part(perm, signs=(True,)),))

    def order(self, perm: str, prefix: str, n_experts: int) -> None:
        """The order of a layer's experts: router rows, their bias, and the first axis of the fused tensors."""
        grouped = (getattr(self.config, "n_group", None) or 1) > 1
        merged = getattr(self.config, "expert_map", None) is not None
        if grouped or merged or f"{prefix}.experts.gate_up_proj" not in self.dims:
            why = "its router picks groups of experts first" if grouped else "they are merged, or one tensor each"
            raise ValueError(f"the experts of {prefix!r} cannot be reordered ({why}): use expert_order=False")
        self.sizes[perm] = n_experts
        for name in ("gate.weight", "gate.e_score_correction_bias", "experts.gate_up_proj", "experts.down_proj"):
            self.put(f"{prefix}.{name}", 0, Part(perm), optional=True)

    def experts(self, perm: str, prefix: str, n_experts: int, n: int) -> None:
        """Routed experts, fused or one by one; each has its own permutation."""
        self.put(f"{prefix}.gate.weight", 1, *self.r, optional=True)
        stacked = f"{prefix}.experts.gate_up_proj"
        if self.expert_order:
            self.order(f"{perm}.order", prefix, n_experts)
        if stacked in self.dims:
            self.put(stacked, 2, *self.r)
            self.put(f"{prefix}.experts.down_proj", 1, *self.r)
        for e in range(n_experts):
            name = f"{perm}.{e}"
            if self.expert_order:
                self.inside[name] = (f"{perm}.order", e)
            if stacked in self.dims:  # (E, 2f, d), first f rows gate, last f rows up; (E, d, f)
                self.sizes[name] = n
                self.put(stacked, 1, Part(name, signs=(False, True), slice=(0, e)))
                self.put(f"{prefix}.experts.down_proj", 2, Part(name, signs=(True,), slice=(0, e)))
            elif f"{prefix}.experts.{e}.w1.weight" in self.dims:
                self.gated(name, n, *(f"{prefix}.experts.{e}.{w}" for w in ("w1", "w3", "w2")))
            else:
                self.gated(name, n, *(f"{prefix}.experts.{e}.{w}_proj" for w in ("gate", "up", "down")))


def _llama(table: _Table, kind: str, config) -> None:
    model = "model." if any(name.startswith("model.") for name in table.dims) else ""
    table.stream(f"{model}embed_tokens.weight", "lm_head.weight", "score.weight", axis=1)
    table.stream(f"{model}norm.weight")
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for i in range(config.num_hidden_layers):
        layer, short = f"{model}layers.{i}", f"layers.{i}"
        table.stream(f"{layer}.input_layernorm.weight", f"{layer}.post_attention_layernorm.weight")
        table.stream(f"{layer}.post_feedforward_layernorm.weight")
        attention = f"{layer}.self_attn"
        if kind == "deepseek_v3":
            _latent_attention(table, attention, f"{short}.heads", config)
        else:
            # A norm over all heads together moves with them; one over a single head's entries stays.
            norms = (f"{attention}.q_norm", f"{attention}.k_norm") if kind in FULL_WIDTH_QK_NORM else ()
            names = tuple(f"{attention}.{w}_proj" for w in "qkvo")
            n_kv = config.num_key_value_heads or config.num_attention_heads
            table.heads(f"{short}.heads", names, config.num_attention_heads, n_kv, dim, norms)
        mlp = f"{layer}.mlp"
        if f"{layer}.block_sparse_moe.gate.weight" in table.dims:
            mlp = f"{layer}.block_sparse_moe"
        if f"{mlp}.gate.weight" in table.dims:
            n = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
            stored = _n_experts(config, table.dims, mlp, i)
            table.experts(f"{short}.experts", mlp, stored, n)
            for name, size in (
                ("shared_experts", n * (getattr(config, "n_shared_experts", None) or 1)),
                ("shared_expert", getattr(config, "shared_expert_intermediate_size", 0)),
            ):
                if f"{mlp}.{name}.gate_proj.weight" in table.dims:
                    names = (f"{mlp}.{name}.{w}_proj" for w in ("gate", "up", "down"))
                    table.gated(f"{short}.shared", size, *names)
            table.stream(f"{mlp}.shared_expert_gate.weight", axis=1)
        else:
            table.gated(f"{short}.ffn", config.intermediate_size, *(f"{mlp}.{w}_proj" for w in ("gate", "up", "down")))


def _latent_attention(table: _Table, attention: str, perm: str, config) -> None:
    """DeepSeek's multi-head latent attention: heads, and the entries of the two latents."""
    n, latent = config.num_attention_heads, perm.removesuffix("heads")
    table.sizes[perm] = n
    query = Part(perm, block=config.qk_nope_head_dim + config.qk_rope_head_dim)
    if config.q_lora_rank:
        table.sizes[f"{latent}q_latent"] = config.q_lora_rank
        table.linear(f"{attention}.q_a_proj", (Part(f"{latent}q_latent"),), table.r)
        table.put(f"{attention}.q_a_layernorm.weight", 0, Part(f"{latent}q_latent"))
        table.linear(f"{attention}.q_b_proj", (query,), (Part(f"{latent}q_latent"),))
    else:
        table.linear(f"{attention}.q_proj", (query,), table.r)
    # The rows after the latent are the rotary key that all heads share: they stay.
    table.sizes[f"{latent}kv_latent"] = config.kv_lora_rank
    shared = Part(f"{latent}kv_latent")
    table.linear(f"{attention}.kv_a_proj_with_mqa", (replace(shared, partial=True),), table.r)
    table.put(f"{attention}.kv_a_layernorm.weight", 0, shared)
    table.linear(f"{attention}.kv_b_proj", (Part(perm, block=config.qk_nope_head_dim + config.v_head_dim),), (shared,))
    table.linear(f"{attention}.o_proj", table.r, (Part(perm, block=config.v_head_dim),))


def _bert(table: _Table, kind: str, config) -> None:
    model = "bert." if any(name.startswith("bert.") for name in table.dims) else ""
    tied = next((name for name in table.dims if name.startswith("cls.predictions.transform")), None)
    if table.residual and tied:
        raise ValueError(
            f"{tied!r} carries BERT's residual stream on both axes, so the stream cannot be permuted as one: "
            "use residual=False, or the BertModel inside"
        )
    for word in ("word", "position", "token_type"):
        table.stream(f"{model}embeddings.{word}_embeddings.weight", axis=1)
    table.stream(f"{model}embeddings.LayerNorm.weight", f"{model}embeddings.LayerNorm.bias")
    table.stream(f"{model}pooler.dense.weight", axis=1)
    n = config.num_attention_heads
    for i in range(config.num_hidden_layers):
        layer, short = f"{model}encoder.layer.{i}", f"layers.{i}"
        names = (*(f"{layer}.attention.self.{w}" for w in ("query", "key", "value")), f"{layer}.attention.output.dense")
        table.heads(f"{short}.heads", names, n, n, config.hidden_size // n)
        table.sizes[f"{short}.ffn"] = config.intermediate_size
        table.linear(f"{layer}.intermediate.dense", (Part(f"{short}.ffn"),), table.r)
        table.linear(f"{layer}.output.dense", table.r, (Part(f"{short}.ffn"),))
        for norm in (f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"):
            table.stream(f"{norm}.weight", f"{norm}.bias")


def _vit(table: _Table, kind: str, config) -> None:
    model = "vit." if any(name.startswith("vit.") for name in table.dims) else ""
    for name in ("cls_token", "position_embeddings", "mask_token"):
        table.stream(f"{model}embeddings.{name}", axis=2)
    patches = f"{model}embeddings.patch_embeddings.projection"
    table.stream(f"{patches}.weight", f"{patches}.bias", f"{model}layernorm.weight", f"{model}layernorm.bias")
    table.stream("classifier.weight", f"{model}pooler.dense.weight", axis=1)
    n = config.num_attention_heads
    for i in range(config.num_hidden_layers):
        layer, short = f"{model}layers.{i}", f"layers.{i}"
        names = tuple(f"{layer}.attention.{w}_proj" for w in "qkvo")
        table.heads(f"{short}.heads", names, n, n, config.hidden_size // n)
        table.sizes[f"{short}.ffn"] = config.intermediate_size
        table.linear(f"{layer}.mlp.fc1", (Part(f"{short}.ffn"),), table.r)
        table.linear(f"{layer}.mlp.fc2", table.r, (Part(f"{short}.ffn"),))
        for norm in (f"{layer}.layernorm_before", f"{layer}.layernorm_after"):
            table.stream(f"{norm}.weight", f"{norm}.bias")


def _ours(model: nn.Module, residual: bool) -> PermutationSpec:
    """A network of the kit, or an nn.Sequential."""
    from notebook_kit.models import MLP, ResNet

    if isinstance(model, MLP):
        return chain_spec(model, [(f"layers.{i}", layer) for i, layer in enumerate(model.layers)])
    if isinstance(model, nn.Sequential):
        return chain_spec(model, children_of(model))
    if isinstance(model, ResNet):
        return resnet_spec(model.state_dict(), residual, "ResNet")
    raise ValueError(
        f"no permutation spec for {type(model).__name__}: known are MLP, VGG, ResNet, nn.Sequential of linear layers "
        f"and convolutions, and transformers models of type {', '.join(SUPPORTED)}; write one with "
        "PermutationSpec(axes, sizes)"
    )


def _n_experts(config, dims: dict[str, int], mlp: str, layer: int) -> int:
    kept = getattr(config, "expert_map", None)
    if kept is not None:
        return max(kept[str(layer)]) + 1
    return next(
        getattr(config, name)
        for name in ("n_routed_experts", "num_local_experts", "num_experts")
        if getattr(config, name, None)
    )


def _hollow(config) -> nn.Module:
    """The architecture without weights, for its names and shapes."""
    import transformers

    name = (getattr(config, "architectures", None) or [None])[0]
    automatic = transformers.AutoModelForCausalLM if config.model_type in LLAMA_LIKE else transformers.AutoModel
    with torch.device("meta"):
        return getattr(transformers, name)(config) if name else automatic.from_config(config)


def _shape(weights: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    return weights.spec()[name][0] if hasattr(weights, "spec") else tuple(weights[name].shape)
