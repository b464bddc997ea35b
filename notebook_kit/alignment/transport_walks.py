"""The ways of transport plans through the architectures that `ot_fusion` knows, from inputs to outputs."""

import torch
from torch import nn

from notebook_kit.alignment.architectures import permutation_spec
from notebook_kit.alignment.conv_nets import NORMS, children_of
from notebook_kit.alignment.transport_flow import Flow, Plan
from notebook_kit.models import MLP
from notebook_kit.weights import IncompatibleWeights, at_least_float32


def flow_through(flow: Flow) -> None:
    """Walk through a known architecture."""
    config = getattr(flow.model_a, "config", None)
    {"vit": _vit, "bert": _bert}.get(getattr(config, "model_type", None), _chain)(flow)


def _chain(flow: Flow) -> None:
    plan, layers = None, _layers(flow.model_a)
    makers = [name for name, layer in layers if isinstance(layer, (nn.Linear, nn.Conv2d))]
    for name, layer in layers:
        if name in makers:
            plan = flow.linear(name, plan, last=name == makers[-1])
        elif isinstance(layer, NORMS):
            flow.vectors(name, plan)


def _vit(flow: Flow) -> None:
    model = "vit." if "vit.embeddings.cls_token" in flow.a else ""
    at = flow.features.a if flow.features is not None else {}
    patches, positions = f"{model}embeddings.patch_embeddings.projection", f"{model}embeddings.position_embeddings"
    branch = (flow.linear(patches), flow.table(positions))
    t = flow.join(*branch, lambda: at[patches], lambda: flow.a[positions][0])
    # One vector has no direction to be compared in: the class token goes where the patches go.
    for name in ("cls_token", "mask_token"):
        if f"{model}embeddings.{name}" in flow.a:
            flow.put(f"{model}embeddings.{name}", at_least_float32(flow.b[f"{model}embeddings.{name}"]), t, 2)
    for i in range(flow.model_a.config.num_hidden_layers):
        layer = f"{model}layers.{i}"
        before, after = f"{layer}.layernorm_before", f"{layer}.layernorm_after"
        q, k, v, o = (f"{layer}.attention.{w}_proj" for w in "qkvo")
        fc1, fc2 = f"{layer}.mlp.fc1", f"{layer}.mlp.fc2"
        flow.vectors(before, t)
        t = flow.join(t, flow.attention(q, k, v, o, t), lambda at=at, n=before: at[n], lambda at=at, n=o: at[n])
        flow.vectors(after, t)
        branch = flow.linear(fc2, flow.linear(fc1, t))
        t = flow.join(t, branch, lambda at=at, n=after: at[n], lambda at=at, n=fc2: at[n])
    flow.vectors(f"{model}layernorm", t)
    _head(flow, f"{model}pooler.dense", "classifier", t)


def _bert(flow: Flow) -> None:
    model = "bert." if any(name.startswith("bert.") for name in flow.a) else ""
    at = flow.features.a if flow.features is not None else {}
    words, positions, kinds = (f"{model}embeddings.{w}_embeddings" for w in ("word", "position", "token_type"))
    branch = (flow.table(f"{words}.weight", words), flow.table(f"{positions}.weight", positions))
    t = flow.join(*branch, lambda: at[words], lambda: at[positions])
    flow.put(f"{kinds}.weight", at_least_float32(flow.b[f"{kinds}.weight"]), t, 1)
    flow.vectors(f"{model}embeddings.LayerNorm", t)
    for i in range(flow.model_a.config.num_hidden_layers):
        layer = f"{model}encoder.layer.{i}"
        q, k, v = (f"{layer}.attention.self.{w}" for w in ("query", "key", "value"))
        o, wide, back = f"{layer}.attention.output.dense", f"{layer}.intermediate.dense", f"{layer}.output.dense"
        # BERT normalises after the join: what the norm reads, less the branch, is the stream.
        for norm, name in ((f"{layer}.attention.output.LayerNorm", o), (f"{layer}.output.LayerNorm", back)):
            branch = flow.attention(q, k, v, o, t) if name == o else flow.linear(back, flow.linear(wide, t))
            t = flow.join(t, branch, lambda n=norm, m=name: at[n] - at[m], lambda m=name: at[m])
            flow.vectors(norm, t)
    _head(flow, f"{model}pooler.dense", "classifier", t)


def _head(flow: Flow, pooler: str, classifier: str, t: Plan) -> None:
    last = f"{classifier}.weight" in flow.a
    if f"{pooler}.weight" in flow.a:
        t = flow.linear(pooler, t, last=False)
    if last:
        flow.linear(classifier, t, last=True)


def compare(model_a: nn.Module, model_b: nn.Module) -> None:
    """Refuse networks that cannot be fused.

    Raises:
        IncompatibleWeights: other classes, other layers.
        ValueError: an architecture without rules; NaN or Inf in a tensor.
    """
    kind = getattr(getattr(model_a, "config", None), "model_type", None)
    if kind not in ("vit", "bert"):
        if kind is not None:
            raise ValueError(
                f"no rules for model type {kind!r}: known are vit, bert, MLP and nn.Sequential (ot_fusion)"
            )
        permutation_spec(model_a)  # says what is wrong with a chain
    if type(model_a) is not type(model_b):
        raise IncompatibleWeights(
            f"cannot fuse {type(model_a).__name__} with {type(model_b).__name__}: both must be of one architecture"
        )
    names = [dict(model.named_parameters()) for model in (model_a, model_b)]
    odd = sorted(names[0].keys() ^ names[1].keys())
    if odd:
        owner = "model_a" if odd[0] in names[0] else "model_b"
        raise IncompatibleWeights(f"{odd[0]!r} is only in {owner}: both networks must have the same layers")
    if kind is None and [type(layer) for _, layer in _layers(model_a)] != [
        type(layer) for _, layer in _layers(model_b)
    ]:
        raise IncompatibleWeights("the two networks have other layers between the linear ones")
    for owner, model in (("model_a", model_a), ("model_b", model_b)):
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise ValueError(f"tensor {name!r} of {owner} holds NaN or Inf")


def _layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    if isinstance(model, MLP):
        return [(f"layers.{i}", layer) for i, layer in enumerate(model.layers)]
    return children_of(model)
