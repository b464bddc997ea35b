"""How transport plans flow through a network: which plan each layer reads, and which one it passes on."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from notebook_kit.alignment.transport import ground_cost, incoming, outgoing
from notebook_kit.alignment.transport_features import Features
from notebook_kit.weights import IncompatibleWeights, at_least_float32

RESIDUAL = ("mean", "weighted_scalar", "weighted_matrix", "branch", "stream", "identity")
Plan = Float[Tensor, "_ _"]  # [units_b, units_a] of its layer


class Flow:
    """One walk from the inputs to the outputs, carrying b's tensors over into a's units.

    Args:
        model_a: sets the units of the result.
        model_b: is carried over.
        plan: cost to transport plan.
        features: of both, where activations are compared.
        by_weight: compare incoming weights instead.
        residual: what becomes of two plans where a branch joins the stream.
        qk: plans of queries and keys: "separate", "shared" or "joint".
    """

    def __init__(
        self,
        model_a: nn.Module,
        model_b: nn.Module,
        plan: Callable[[Tensor], Plan],
        features: Features | None,
        *,
        by_weight: bool,
        residual: str,
        qk: str,
    ):
        self.model_a, self.model_b, self.plan, self.features = model_a, model_b, plan, features
        self.by_weight, self.residual, self.qk = by_weight, residual, qk
        self.a, self.b = model_a.state_dict(), model_b.state_dict()
        self.plans: dict[str, Plan] = {}
        self.moved: dict[str, Tensor] = {}

    # ------------------------------------------------------------ one tensor
    def read(self, name: str, into: Plan | None) -> Tensor:
        """b's tensor with its input axis (1) in a's units."""
        w = at_least_float32(self.b[name])
        if into is None:
            return w
        w = w.unflatten(1, (len(into), -1))  # flattened maps: a channel is a block of neighbouring columns
        return torch.tensordot(w, incoming(into).to(w), ([1], [0])).movedim(-1, 1).flatten(1, 2)

    def put(self, name: str, w: Tensor, plan: Plan | None, axis: int = 0) -> None:
        """Store b's tensor with one output axis in a's units."""
        if plan is not None:
            w = torch.tensordot(w, outgoing(plan).to(w), ([axis], [0])).movedim(-1, axis)
        if w.shape != self.a[name].shape:
            raise IncompatibleWeights(
                f"{name!r} has shape {list(self.a[name].shape)} in model_a and {list(w.shape)} in model_b once its "
                "hidden units are carried over: only hidden widths may differ, not inputs, outputs or positions"
            )
        self.moved[name] = w

    def cost(self, rows_b: Tensor, rows_a: Tensor, *modules: str, joint: bool = False) -> Tensor:
        """Of units as rows of (b's input-aligned) weights, or by their recorded activations."""
        if self.by_weight:
            return ground_cost(rows_b.flatten(1).T, at_least_float32(rows_a).flatten(1).T, center=False)
        return self.features.cost(*modules, joint=joint)

    # ------------------------------------------------------------ one layer
    def linear(self, name: str, into: Plan | None = None, *, last: bool = False) -> Plan | None:
        """A linear or convolutional layer: reads one plan, makes another (none at the outputs)."""
        w = self.read(f"{name}.weight", into)
        if w.shape[1:] != self.a[f"{name}.weight"].shape[1:]:
            self.put(f"{name}.weight", w, None)  # says what differs
        plan = None
        if not last:
            plan = self.plans[name] = self.plan(self.cost(w, self.a[f"{name}.weight"], name))
        self.store(name, w, plan)
        return plan

    def store(self, name: str, w: Tensor, plan: Plan | None) -> None:
        self.put(f"{name}.weight", w, plan)
        if f"{name}.bias" in self.b:
            self.put(f"{name}.bias", at_least_float32(self.b[f"{name}.bias"]), plan)

    def table(self, name: str, module: str | None = None) -> Plan:
        """An embedding table, whose last axis makes the units; a bare parameter is compared by its entries."""
        w, w_a = at_least_float32(self.b[name]), at_least_float32(self.a[name])
        if w.shape[:-1] != w_a.shape[:-1]:
            self.put(name, w, None)
        rows_b, rows_a = (x.reshape(-1, x.shape[-1]) for x in (w, w_a))
        if self.by_weight or module is None:
            cost = ground_cost(rows_b, rows_a, center=not self.by_weight)
        else:
            cost = self.features.cost(module)
        plan = self.plans[module or name] = self.plan(cost)
        self.put(name, w, plan, w.dim() - 1)
        return plan

    def vectors(self, module: str, plan: Plan | None) -> None:
        """A norm: its vectors take the plan of the units they stand on."""
        for name in (name for name in self.b if name.rpartition(".")[0] == module and self.b[name].dim() == 1):
            self.put(name, at_least_float32(self.b[name]), plan)

    def join(self, stream: Plan, branch: Plan, x_stream: Callable, x_branch: Callable) -> Plan:
        """Two plans meet where a branch is added to the stream; the activations are a's, read when needed."""
        if self.residual == "stream":
            return stream
        if self.residual == "branch":
            return branch
        if self.residual == "identity":
            n_b, n_a = stream.shape
            if n_b != n_a:
                raise ValueError(f'residual="identity" needs streams of equal width, got {n_a} in a and {n_b} in b')
            return torch.eye(n_a, dtype=stream.dtype, device=stream.device) / n_a
        if self.residual == "mean":
            return (stream + branch) / 2
        size, new = (x().abs().double().mean(0).to(stream) for x in (x_stream, x_branch))
        if self.residual == "weighted_scalar":
            size, new = size.mean(), new.mean()
        share = size / (size + new).clamp(min=1e-300)  # of the stream: one number, or one per unit of a
        return stream * share + branch * (1 - share)

    def attention(self, q: str, k: str, v: str, o: str, into: Plan) -> Plan:
        """Self-attention: plans run across heads; o reads the values' plan."""
        # softmax sees q·k/√d: where heads differ in size, each side takes half of the correction.
        d_a, d_b = (_head_size(model) for model in (self.model_a, self.model_b))
        scale = (d_b / d_a) ** 0.25
        w = {name: self.read(f"{name}.weight", into) for name in (q, k)}
        rows = torch.cat([w[q], w[k]]), torch.cat([self.a[f"{q}.weight"], self.a[f"{k}.weight"]])
        if self.qk == "joint":
            plan = self.plans[q] = self.plans[k] = self.plan(self.cost(*rows, q, k, joint=True))
            biases = [self.b.get(f"{name}.bias") for name in (q, k)]
            out = outgoing(plan)
            parts = (out.to(rows[0]).T @ rows[0]).chunk(2)
            for number, name in enumerate((q, k)):
                self.put(f"{name}.weight", scale * parts[number], None)
                if biases[0] is not None:
                    bias = at_least_float32(torch.cat(biases))
                    self.put(f"{name}.bias", scale * (out.to(bias).T @ bias).chunk(2)[number], None)
        else:
            for name in (q, k):
                if self.qk == "shared":
                    wide = (torch.cat([x.flatten(1) for x in side.chunk(2)], 1) for side in rows)
                    plan = self.plans[k] if name == k else self.plan(self.cost(*wide, q, k))
                    self.plans[q] = self.plans[k] = plan
                else:
                    plan = self.plans[name] = self.plan(self.cost(w[name], self.a[f"{name}.weight"], name))
                self.store(name, w[name], plan)
                for tensor in (f"{name}.weight", f"{name}.bias"):
                    if tensor in self.moved:
                        self.moved[tensor] = scale * self.moved[tensor]
        return self.linear(o, self.linear(v, into))

    def result(self) -> dict[str, Tensor]:
        """b's tensors in a's shapes; what is no parameter comes from a."""
        forgotten = [name for name, _ in self.model_a.named_parameters() if name not in self.moved]
        if forgotten:
            raise ValueError(
                f"no rule carries {', '.join(map(repr, forgotten[:5]))} of {type(self.model_a).__name__} over: use the "
                "model inside, or one with a classification head"
            )
        return {name: self.moved[name].to(tensor) if name in self.moved else tensor for name, tensor in self.a.items()}


def _head_size(model: nn.Module) -> int:
    config = model.config
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
