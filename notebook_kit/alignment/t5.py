"""The permutation spec of T5: an encoder and a decoder that share their embedding, and a position bias per head."""

from notebook_kit.alignment.spec import Part


def t5(table, kind: str, config) -> None:
    """Write T5's rows.

    The bias table [buckets, heads] of a stack's first layer serves all its layers, so that self-attention has ONE
    permutation of heads for the whole stack; cross-attention has no bias, and one for each layer. Encoder and decoder
    read one embedding, so that both residual streams carry the same permutation.

    Args:
        table: of the architecture, to be filled.
        kind: "t5" or "mt5".
        config: of the model.
    """
    names, n = table.dims, config.num_heads
    table.stream(
        "shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight", axis=1
    )
    depths = {"encoder": config.num_layers, "decoder": config.num_decoder_layers}
    for stack, depth in depths.items():
        if f"{stack}.final_layer_norm.weight" not in names:
            continue  # T5EncoderModel has no decoder
        table.stream(f"{stack}.final_layer_norm.weight")
        heads = f"{stack}.heads"
        first = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        table.put(first, 1, Part(heads))
        for i in range(depth):
            block, short = f"{stack}.block.{i}", f"{stack}.{i}"
            self_names = tuple(f"{block}.layer.0.SelfAttention.{w}" for w in "qkvo")
            table.heads(heads, self_names, n, n, config.d_kv)
            if stack == "decoder":
                cross = tuple(f"{block}.layer.1.EncDecAttention.{w}" for w in "qkvo")
                table.heads(f"{short}.cross_heads", cross, n, n, config.d_kv)
            last = 2 if stack == "decoder" else 1
            table.stream(*(f"{block}.layer.{j}.layer_norm.weight" for j in range(last + 1)))
            ffn, perm = f"{block}.layer.{last}.DenseReluDense", f"{short}.ffn"
            if f"{ffn}.wi_0.weight" in names:
                table.gated(perm, config.d_ff, f"{ffn}.wi_0", f"{ffn}.wi_1", f"{ffn}.wo")
            else:
                table.sizes[perm] = config.d_ff
                table.linear(f"{ffn}.wi", (Part(perm),), table.r)
                table.linear(f"{ffn}.wo", table.r, (Part(perm),))
