"""Permutation specs of Llama and its relatives: decoders with gated layers, dense or mixtures of experts."""

from dataclasses import replace

from notebook_kit.alignment.spec import Part
from notebook_kit.alignment.spec_table import Table

FULL_WIDTH_QK_NORM = ("olmoe", "olmo2", "olmo3")


def llama(table: Table, kind: str, config) -> None:
    """Write the rows of a decoder.

    Args:
        table: of the architecture, to be filled.
        kind: model type, such as "qwen3_moe".
        config: of the model.
    """
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


def _latent_attention(table: Table, attention: str, perm: str, config) -> None:
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


def _n_experts(config, dims: dict[str, int], mlp: str, layer: int) -> int:
    kept = getattr(config, "expert_map", None)
    if kept is not None:
        return max(kept[str(layer)]) + 1
    return next(
        getattr(config, name)
        for name in ("n_routed_experts", "num_local_experts", "num_experts")
        if getattr(config, name, None)
    )
