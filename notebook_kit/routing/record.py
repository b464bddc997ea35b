"""`record_routing`: fills a trace by forward hooks, on transformers' mixtures of experts and on the kit's layers."""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from notebook_kit.routing.decision import Routing
from notebook_kit.routing.switch import is_switch_router, stack_of, switch_decision, switch_routers
from notebook_kit.routing.trace import RoutingTrace


def transformers_gates(model: nn.Module) -> dict[str, nn.Module]:
    """Return the routers of a transformers model by the name of the block they belong to.

    A block counts when it has `experts` and a router, named `gate` or `router`, with a 2-D `weight` and a `top_k`.
    """
    found = {}
    for name, block in model.named_modules():
        children = dict(block.named_children())
        gate = children.get("gate", children.get("router"))
        weight = getattr(gate, "weight", None)
        if "experts" in children and hasattr(gate, "top_k") and isinstance(weight, Tensor) and weight.ndim == 2:
            found[name] = gate
    return found


@contextmanager
def record_routing(model: nn.Module, *, tokenizer: Any = None) -> Iterator[RoutingTrace]:
    """Record what every router of a model decides while the block runs.

        with record_routing(model) as trace:
            for language, ids in texts.items():
                with trace.labelled(language):
                    model(ids)

    Padding (attention_mask 0) is left out; `generate` continues the sequences it began. Where the model takes no
    token ids, a batch x [n, d] is n sequences of one token, and [n, length, d] n sequences. An encoder and its decoder
    (Switch Transformers) read sequences of their own: a layer that did not see a token has logits 0, expert -1 and
    weight 0 for it.

    Args:
        model: a transformers mixture of experts, before or after `install`, or any module with the kit's routers.
        tokenizer: gives token ids their texts (`convert_ids_to_tokens`); None if ids are bytes.

    Yields:
        RoutingTrace: empty at first; grows with each forward pass of `model`.

    Raises:
        ValueError: the model has no routed layer; while running: NaN logits, labels that are not one a sequence,
            or layers that make scores of their logits in different ways (softmax, sigmoid).
    """
    recorder = _Recorder(model, tokenizer)
    with ExitStack() as stack:
        for part in recorder.parts:
            stack.callback(part.register_forward_pre_hook(recorder.begin, with_kwargs=True).remove)
        for name, router in recorder.routers.items():
            stack.callback(router.register_forward_hook(recorder.listen(name)).remove)
        for part in recorder.parts:
            stack.callback(part.register_forward_hook(recorder.finish).remove)
        yield recorder.trace


def _routers(model: nn.Module) -> dict[str, nn.Module]:
    found = transformers_gates(model) | switch_routers(model)
    # An installed router sits inside its gate and is heard there.
    inside = {id(module) for gate in found.values() for module in gate.modules()}
    for name, module in model.named_modules():
        if callable(getattr(module, "route", None)) and hasattr(module, "n_experts") and id(module) not in inside:
            found[name.rpartition(".")[0] or name or type(module).__name__] = module
    if not found:
        raise ValueError(
            f"no routed layer in {type(model).__name__}: looked for transformers blocks with `experts` and a router "
            "named `gate` or `router` that has `top_k` (Mixtral, Qwen-MoE, OLMoE, DeepSeek), for Switch's and the "
            "kit's routers"
        )
    return found


def _scoring(routing: Routing) -> str | None:
    """How the logits became scores; None if neither way, as with a hash table or noise."""
    z, probs = routing.logits[:64].detach().float(), routing.probs[:64].detach().float()
    for name, scores in (("softmax", z.softmax(1)), ("sigmoid", z.sigmoid())):
        if torch.allclose(scores, probs, rtol=1e-3, atol=1e-5):
            return name
    return None


def _unheard(router: nn.Module, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """What stands in a trace for tokens that a layer did not see."""
    return torch.zeros(rows, router.num_experts), torch.zeros(rows, 1), torch.full((rows, 1), -1)


class _Recorder:
    """One forward pass at a time: `begin` reads the arguments, the routers are heard, `finish` appends a batch."""

    def __init__(self, model: nn.Module, tokenizer: Any):
        self.routers, self.tokenizer, self.n_sequences = _routers(model), tokenizer, 0
        first = next(iter(self.routers.values()))
        # What runs on one batch of tokens, with the names of its layers: the model, or an encoder and a decoder.
        self.parts: dict[nn.Module, list[str]] = {}
        for name, router in self.routers.items():
            part = model.get_submodule(stack_of(name) if is_switch_router(router) else "")
            self.parts.setdefault(part, []).append(name)
        # The gates that never divide and have no switch for it.
        divides = "DeepseekV2" not in type(first).__name__ and not is_switch_router(first)
        self.trace = RoutingTrace(
            list(self.routers),
            k=int(getattr(first, "top_k", None) or getattr(first, "k", None) or 1),
            normalize=bool(getattr(first, "norm_topk_prob", getattr(first, "normalize", divides))),
            scoring="sigmoid" if hasattr(first, "e_score_correction_bias") else "softmax",
            vocabulary=None if tokenizer is None else {},
        )
        self.scorings: dict[str, str] = {}  # of the layers that have shown it

    def begin(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.calls: dict[str, list] = {name: [] for name in self.parts[module]}
        arguments = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        first = arguments.get("inputs_embeds")  # masks and positions that come before it are no tokens
        if first is None:
            first = next((value for value in arguments.values() if isinstance(value, Tensor)), None)
        self.ids = arguments.get("input_ids")
        if self.ids is None and first is not None and first.ndim == 2 and not first.is_floating_point():
            self.ids = first
        self.shape = (*(() if first is None else first.shape[: max(1, first.ndim - 1)]), 1)[:2]
        cache = arguments.get("past_key_values")
        self.past = cache.get_seq_length() if hasattr(cache, "get_seq_length") else 0
        self.mask = arguments.get("attention_mask")
        if isinstance(self.mask, Tensor) and self.mask.ndim != 2:
            raise ValueError(f"record_routing reads padding from a 2-D attention_mask, got {self.mask.ndim} axes")

    def listen(self, name: str):
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            if is_switch_router(module):
                output = switch_decision(output)
            if isinstance(output, Routing):
                self.see(name, output)
                output = (output.logits, output.weights, output.experts)
            if not isinstance(output, tuple) or len(output) != 3:
                raise ValueError(f"{name}: {type(module).__name__} must give (logits, weights, experts)")
            said = getattr(module, "routing", None)
            if isinstance(said, Routing):  # of an installed router: it knows which slots are unused
                output = (*output[:2], said.experts)
                self.see(name, said)
            self.calls[name].append(tuple(part.detach().cpu() for part in output))

        return hook

    def see(self, name: str, routing: Routing) -> None:
        """Learn from a router's first decision how it makes scores of logits."""
        if name not in self.scorings and len(routing) and (found := _scoring(routing)):
            self.scorings[name] = found

    def finish(self, module: nn.Module, args: tuple, output: Any) -> None:
        silent = [name for name, calls in self.calls.items() if not calls]
        if silent:
            raise ValueError(f"{silent[0]} did not route in this forward pass, so its tokens cannot be recorded")
        if len(known := set(self.scorings.values())) > 1:
            told = ", ".join(f"{name} by {scoring}" for name, scoring in self.scorings.items())
            raise ValueError(
                f"a trace has one way of scoring, but the layers score {told}; record them apart, a submodule at a time"
            )
        if known:
            self.trace.scoring = known.pop()
        heard = {name: tuple(map(torch.cat, zip(*calls, strict=True))) for name, calls in self.calls.items()}
        rows = len(next(iter(heard.values()))[0])
        routings = [heard[name] if name in heard else _unheard(router, rows) for name, router in self.routers.items()]
        n, length = self._grid(rows)
        ids = torch.full((rows,), -1) if self.ids is None else self.ids.cpu().reshape(-1)
        positions, keep = self._positions(n, length)
        # Tokens that continue a cache belong to the sequences of the pass before.
        start = max(self.n_sequences - n, 0) if self.past else self.n_sequences
        self.n_sequences = start + n
        sequences = torch.arange(start, start + n)[:, None].expand(n, length)
        self._learn_words(ids)
        self.trace.append(
            [tuple(part[keep] for part in routing) for routing in routings],
            tokens=ids[keep],
            positions=positions.reshape(-1)[keep],
            sequences=sequences.reshape(-1)[keep],
            labels=self._labels(n, length, keep),
        )

    def _grid(self, rows: int) -> tuple[int, int]:
        """Sequences x length; a module that reshapes its input counts every row as a sequence."""
        n, length = self.shape if self.ids is None else tuple(self.ids.shape)
        return (n, length) if n * length == rows else (rows, 1)

    def _positions(self, n: int, length: int) -> tuple[Tensor, Tensor]:
        if not isinstance(self.mask, Tensor):
            return (self.past + torch.arange(length)).expand(n, length), torch.ones(n * length, dtype=torch.bool)
        mask = self.mask.cpu().bool()
        return (mask.long().cumsum(1) - 1)[:, -length:], mask[:, -length:].reshape(-1)

    def _labels(self, n: int, length: int, keep: Tensor) -> list[str]:
        given = self.trace.current_label
        labels = [given] * n if isinstance(given, str) else list(given)
        if len(labels) != n:
            raise ValueError(f"labels must be one text, or one for each of the {n} sequences, got {len(labels)}")
        return [labels[i // length] for i in keep.nonzero().reshape(-1).tolist()]

    def _learn_words(self, ids: Tensor) -> None:
        if self.tokenizer is not None:
            new = [i for i in ids.unique().tolist() if i >= 0 and i not in self.trace.vocabulary]
            self.trace.vocabulary |= dict(zip(new, self.tokenizer.convert_ids_to_tokens(new), strict=True))
