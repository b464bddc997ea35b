"""The rows of a transformer's permutation spec while they are written: linear layers, heads, gated layers, experts."""

from notebook_kit.alignment.spec import Part


class Table:
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
