"""`RoutingTrace`: what every router of a model decided, token by token; kept on disk as safetensors."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from notebook_kit.checkpoints import BadCheckpoint, Checkpoint, atomic, read_header
from notebook_kit.routing.decision import Routing, refuse_nan


class RoutingTrace:
    """Every router call of a run: for each token and layer the logits and what the model chose.

    Args:
        layers: names of the routed layers, first to last.
        k: experts per token that the model uses.
        normalize: whether it divides the picked probabilities by their sum.
        scoring: "softmax", or "sigmoid" where experts are scored apart from each other.
        vocabulary: token id to text; None means that ids are bytes.
    """

    PER_TOKEN = ("tokens", "positions", "sequences", "labels")

    def __init__(
        self,
        layers: Sequence[str],
        *,
        k: int,
        normalize: bool = True,
        scoring: str = "softmax",
        vocabulary: dict[int, str] | None = None,
    ):
        self.layers, self.k, self.normalize, self.scoring = tuple(layers), k, normalize, scoring
        self.vocabulary = vocabulary
        self.label_names: list[str] = []
        self._chunks: dict[str, list[Tensor]] = {name: [] for name in self._names()}
        self.current_label: str | Sequence[str] = ""

    def _names(self) -> list[str]:
        per_layer = [f"{part}.{i}" for i in range(len(self.layers)) for part in ("logits", "experts", "weights")]
        return [*self.PER_TOKEN, *per_layer]

    def _get(self, name: str) -> Tensor:
        chunks = self._chunks[name]
        if not chunks or len(self) == 0:
            raise ValueError("the trace is empty: run the model inside `with record_routing(model) as trace:`")
        if len(chunks) > 1:
            # Calls may use different numbers of slots; the joined trace has the most.
            width = max(chunk.shape[-1] for chunk in chunks)
            fill = -1 if name.startswith("experts") else 0
            if chunks[0].ndim == 2:
                chunks = [nn.functional.pad(chunk, (0, width - chunk.shape[1]), value=fill) for chunk in chunks]
            self._chunks[name] = [torch.cat(chunks)]
        return self._chunks[name][0]

    def __len__(self) -> int:
        return sum(len(chunk) for chunk in self._chunks["tokens"])

    def __repr__(self) -> str:
        if len(self) == 0:
            return f"RoutingTrace(empty, {len(self.layers)} layers)"
        experts = self._get("logits.0").shape[1]
        names = [name for name in self.label_names if name]
        more = ", ..." if len(names) > 4 else ""
        labels = f", labels {', '.join(names[:4])}{more}" if names else ""
        return f"RoutingTrace({len(self)} tokens, {len(self.layers)} layers, top {self.k} of {experts} experts{labels})"

    tokens = property(lambda self: self._get("tokens"), doc="Int[tokens]: token ids, -1 where the input has none.")
    positions = property(lambda self: self._get("positions"), doc="Int[tokens]: place in the sequence, from 0.")
    sequences = property(lambda self: self._get("sequences"), doc="Int[tokens]: number of the sequence, from 0.")
    labels = property(lambda self: self._get("labels"), doc="Int[tokens]: index into `label_names`.")

    def layer(self, index: int) -> Routing:
        """Return what the model's own router decided in one layer.

        Args:
            index: of the layer, from 0; negative counts from the end.

        Returns:
            Routing: as recorded; its aux_loss is 0.

        Raises:
            ValueError: no such layer, or the trace is empty.
        """
        logits = self.layer_logits(index)
        experts, weights = (self._get(f"{part}.{index % len(self.layers)}") for part in ("experts", "weights"))
        probs = logits.softmax(-1) if self.scoring == "softmax" else logits.sigmoid()
        return Routing(logits, probs, weights, experts, torch.zeros(()))

    def layer_logits(self, index: int) -> Float[Tensor, "tokens experts"]:
        """The router's logits in one layer, float32."""
        if not -len(self.layers) <= index < len(self.layers):
            raise ValueError(f"layer must be in [0, {len(self.layers) - 1}], got {index} (RoutingTrace)")
        return self._get(f"logits.{index % len(self.layers)}")

    def text(self, start: int = 0, stop: int | None = None) -> list[str]:
        """Return the tokens' texts.

        Of bytes, a letter of several shows at its first, with a dot for each of the others; a stray byte as \\xNN.
        """
        tokens = self.tokens[start:stop].tolist()
        if self.vocabulary is not None:
            return [self.vocabulary.get(token, f"#{token}") for token in tokens]
        texts = ["" if t < 0 else chr(t) if t < 128 else f"\\x{t:02x}" if t < 256 else f"#{t}" for t in tokens]
        for i, token in enumerate(tokens):
            if 0xC2 <= token < 0xF5:
                length = 2 if token < 0xE0 else 3 if token < 0xF0 else 4
                texts[i : i + length] = _letter(tokens[i : i + length], length) or texts[i : i + length]
        return texts

    @contextmanager
    def labelled(self, label: str | Sequence[str]) -> Iterator["RoutingTrace"]:
        """Give the sequences recorded inside the block a label.

        Args:
            label: one text for all, or a list with one for each sequence of the batch.
        """
        before, self.current_label = self.current_label, label if isinstance(label, str) else list(label)
        try:
            yield self
        finally:
            self.current_label = before

    def append(
        self,
        routings: Sequence[tuple[Tensor, Tensor, Tensor]],
        *,
        tokens: Int[Tensor, " tokens"],
        positions: Int[Tensor, " tokens"],
        sequences: Int[Tensor, " tokens"],
        labels: Sequence[str] = (),
    ) -> None:
        """Append a batch.

        Args:
            routings: for each layer logits [tokens, experts], weights [tokens, k_max], experts [tokens, k_max].
            tokens: token ids.
            positions: in the sequence.
            sequences: number of the sequence.
            labels: text of each token; empty means none.

        Raises:
            ValueError: another number of layers or tokens, or NaN logits.
        """
        if len(routings) != len(self.layers):
            raise ValueError(f"a batch needs one routing a layer, {len(self.layers)}, got {len(routings)}")
        names = list(labels) or [""] * len(tokens)
        known = {name: i for i, name in enumerate(dict.fromkeys([*self.label_names, *names]))}
        ids = torch.tensor([known[name] for name in names], dtype=torch.int64)
        batch = {"tokens": tokens, "positions": positions, "sequences": sequences, "labels": ids}
        for i, (logits, weights, experts) in enumerate(routings):
            refuse_nan(logits, f"the router's logits in {self.layers[i]}")
            batch |= {f"logits.{i}": logits.float(), f"weights.{i}": weights.float(), f"experts.{i}": experts.long()}
        for name, tensor in batch.items():
            if len(tensor) != len(tokens):
                raise ValueError(f"{name} of a batch must have {len(tokens)} rows, got {len(tensor)}")
        self.label_names = list(known)
        for name, tensor in batch.items():
            self._chunks[name].append(tensor.detach().to("cpu", copy=True))

    def save(self, path: str | Path) -> Path:
        """Write the trace as safetensors with JSON metadata, atomically.

        Args:
            path: the file; its folder must exist.

        Returns:
            The path written.

        Raises:
            ValueError: the trace is empty.
        """
        from safetensors.torch import save_file

        ids = set(self.tokens.tolist())
        words = None if self.vocabulary is None else {i: t for i, t in self.vocabulary.items() if i in ids}
        about = {"layers": self.layers, "labels": self.label_names, "vocabulary": words}
        about |= {"k": self.k, "normalize": self.normalize, "scoring": self.scoring}
        with atomic(path) as partial:
            tensors = {name: self._get(name).contiguous() for name in self._names()}
            save_file(tensors, partial, metadata={"routing_trace": json.dumps(about)})
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> "RoutingTrace":
        """Read a trace that `save` wrote.

        Args:
            path: the file.

        Returns:
            RoutingTrace

        Raises:
            BadCheckpoint: a pickle, a truncated or hostile file, or one that is no routing trace.
        """
        about = read_header(path)[0].get("__metadata__", {})
        checkpoint = Checkpoint(path)
        try:
            about = json.loads(about["routing_trace"])
            words = about["vocabulary"]
            words = None if words is None else {int(token): str(text) for token, text in words.items()}
            names = {"k": int(about["k"]), "normalize": bool(about["normalize"]), "scoring": str(about["scoring"])}
            trace = cls([str(name) for name in about["layers"]], **names, vocabulary=words)
            trace.label_names = [str(name) for name in about["labels"]]
            trace._chunks = {name: [checkpoint[name]] for name in trace._names()}
            _verify(trace)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise BadCheckpoint(f"{path} is not a sound routing trace: {error!r}") from None
        return trace


def _letter(tokens: list[int], length: int) -> list[str] | None:
    """The UTF-8 letter that these bytes are, then dots; None if they are none."""
    try:
        return [bytes(tokens).decode("utf-8"), *"·" * (length - 1)]
    except ValueError:
        return None


def _verify(trace: RoutingTrace) -> None:
    """Everything a stranger's file could get wrong and a later index would trip over."""
    length = len(trace.tokens)
    for name in trace._names():
        tensor = trace._get(name)
        per_token, floating = name in trace.PER_TOKEN, name.startswith(("logits", "weights"))
        dtype = torch.float32 if floating else torch.int64
        if tensor.ndim != (1 if per_token else 2) or len(tensor) != length or tensor.dtype != dtype:
            raise ValueError(f"tensor {name!r} has shape {list(tensor.shape)} and dtype {tensor.dtype}")
    bounds = [("labels", 0, len(trace.label_names)), ("sequences", 0, length)]
    bounds += [(f"experts.{i}", -1, trace._get(f"logits.{i}").shape[1]) for i in range(len(trace.layers))]
    for name, low, stop in bounds:
        values = trace._get(name)
        if values.numel() and not (low <= int(values.min()) and int(values.max()) < stop):
            raise ValueError(f"tensor {name!r} must hold numbers from {low} to {stop - 1}")
    for i, layer in enumerate(trace.layers):
        refuse_nan(trace._get(f"logits.{i}"), f"the logits of {layer[:80]}")
    if not trace.layers or trace.scoring not in ("softmax", "sigmoid") or trace.k < 1:
        raise ValueError("layers, scoring or k is out of range")
