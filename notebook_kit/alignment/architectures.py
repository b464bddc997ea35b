"""Permutation specs read from a model or its configuration: what may be reordered in each known architecture."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from notebook_kit.alignment.spec import Part, PermutationSpec

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
SUPPORTED = (*LLAMA_LIKE, "bert", "vit")
RESIDUAL = "residual"
# Modules in an nn.Sequential that act on each unit alone.
UNITWISE = (nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.LeakyReLU, nn.ELU, nn.Dropout, nn.Identity)
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.BatchNorm1d)


def permutation_spec(
    model_or_config, *, weights: Mapping[str, Tensor] | None = None, residual: bool = False
) -> PermutationSpec:
    """Say which axes of a network's weights must be permuted together.

    Hidden units of feed-forward layers (gate rows, up rows, down columns share one permutation; each expert has its
    own), whole attention heads (a key-value head takes its group of query heads along, which may also be reordered
    among themselves; nothing moves inside a head, where rotary positions live), and optionally the residual stream.

    Args:
        model_or_config: an `MLP`, an `nn.Sequential` of linear layers, a transformers model, or its configuration.
        weights: state dict or `Checkpoint` whose names to use, when they are not the model's (files of Mixtral keep
            one tensor per expert).
        residual: permute the residual stream too: one permutation for the whole stack.

    Returns:
        PermutationSpec.

    Raises:
        ValueError: an architecture that is not known; the text lists those that are.

    Source: after the specs of samuela/git-re-basin; those for transformers follow from the architectures.
    """
    config = getattr(model_or_config, "config", model_or_config)
    kind = getattr(config, "model_type", None)
    if kind is None:
        return _mlp(model_or_config)
    # A model merged by this kit keeps its experts' layout under a name of its own.
    kind = kind.removeprefix("mapped_")
    if kind not in SUPPORTED:
        raise ValueError(
            f"no permutation spec for model type {kind!r}: known are {', '.join(SUPPORTED)}, MLP and nn.Sequential; "
            "write one with PermutationSpec(axes, sizes)"
        )
    if weights is None:
        weights = (model_or_config if isinstance(model_or_config, nn.Module) else _hollow(config)).state_dict()
    table = _Table({name: len(_shape(weights, name)) for name in weights}, config, RESIDUAL if residual else None)
    {"bert": _bert, "vit": _vit}.get(kind, _llama)(table, kind, config)
    if residual:
        table.sizes[RESIDUAL] = config.hidden_size
    return PermutationSpec(table.axes, table.sizes, inside=table.inside, description=kind)


class _Table:
    """Rows of a spec while it is written: parameter to a list of parts per axis."""

    def __init__(self, dims: dict[str, int], config, residual: str | None):
        self.dims, self.config, self.residual = dims, config, residual
        self.rows: dict[str, list[list[Part]]] = {}
        self.sizes: dict[str, int] = {}
        self.inside: dict[str, tuple[str, int]] = {}

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

    def experts(self, perm: str, prefix: str, n_experts: int, n: int) -> None:
        """Routed experts, fused or one by one; each has its own permutation."""
        self.put(f"{prefix}.gate.weight", 1, *self.r, optional=True)
        stacked = f"{prefix}.experts.gate_up_proj"
        if stacked in self.dims:
            self.put(stacked, 2, *self.r)
            self.put(f"{prefix}.experts.down_proj", 1, *self.r)
        for e in range(n_experts):
            name = f"{perm}.{e}"
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


def _mlp(model: nn.Module) -> PermutationSpec:
    """Linear layers one after another; between them only what acts on each unit alone, and norms."""
    from notebook_kit.models import MLP

    if isinstance(model, MLP):
        chain = [(f"layers.{i}", layer) for i, layer in enumerate(model.layers)]
    elif isinstance(model, nn.Sequential):
        chain = list(model.named_children())
    else:
        raise ValueError(
            f"no permutation spec for {type(model).__name__}: known are MLP, nn.Sequential of linear layers, and "
            f"transformers models of type {', '.join(SUPPORTED)}; write one with PermutationSpec(axes, sizes)"
        )
    linears = [place for place, (_, layer) in enumerate(chain) if isinstance(layer, nn.Linear)]
    if len(linears) < 2:
        raise ValueError(f"{type(model).__name__} has {len(linears)} linear layers: hidden units need two")
    axes: dict[str, list] = {}
    sizes, last = {}, None
    for place, (name, layer) in enumerate(chain):
        if isinstance(layer, nn.Linear):
            new = None if place == linears[-1] else name
            axes[f"{name}.weight"] = (new, last)
            if layer.bias is not None:
                axes[f"{name}.bias"] = (new,)
            if new is not None:
                sizes[new] = layer.out_features
            last = new
        elif isinstance(layer, NORMS):
            axes |= {f"{name}.{key}": (last,) for key, value in layer.state_dict().items() if value.dim() == 1}
        elif not isinstance(layer, UNITWISE):
            raise ValueError(
                f"layer {name!r} is a {type(layer).__name__}, which may mix units; in an nn.Sequential only Linear, "
                f"{', '.join(kind.__name__ for kind in (*UNITWISE, *NORMS))} are understood"
            )
    return PermutationSpec(axes, sizes, description=type(model).__name__)


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
