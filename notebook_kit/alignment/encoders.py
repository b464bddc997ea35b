"""Permutation specs of BERT and ViT: encoders with plain feed-forward layers."""

from notebook_kit.alignment.spec import Part
from notebook_kit.alignment.spec_table import Table


def bert(table: Table, kind: str, config) -> None:
    """Write BERT's rows; arguments as `t5`."""
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


def vit(table: Table, kind: str, config) -> None:
    """Write ViT's rows; arguments as `t5`."""
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
