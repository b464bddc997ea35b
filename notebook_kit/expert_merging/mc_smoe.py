"""MC-SMoE: merge experts, then split each merged matrix into low rank plus a few rows, while the model learns."""

from collections.abc import Callable, Mapping
from typing import Annotated

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from notebook_kit.catalog import method
from notebook_kit.expert_merging.low_rank import drop_rows, factor, row_sizes, rows_of, top_rows
from notebook_kit.expert_merging.m_smoe import m_smoe
from notebook_kit.expert_merging.outputs import trace_batches
from notebook_kit.expert_merging.view import expert_view
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.routing import RoutingTrace

EMA = 0.85  # of a row's importance
WARM_UP, COOL_DOWN = 0.1, 0.3  # shares of the steps before the first row falls and after the last


@method(family="expert_merging", paper="m-smoe")
def mc_smoe(
    model: nn.Module,
    trace: RoutingTrace,
    *,
    n_experts: Annotated[int, Range(1, 512)] = 4,
    rank: Annotated[int, Range(1, 1024, log=True)] = 32,
    density: Annotated[float, Range(0, 1)] = 0.1,
    steps: Annotated[int, Range(0, 10_000)] = 100,
    lr: Annotated[float, Range(1e-6, 1e-1, log=True)] = 1e-3,
    align: Annotated[bool | str, Choice(True, False, "weight", "activation")] = True,
    batches: Callable[[torch.Generator], Tensor | tuple | Mapping] | None = None,
    seed: Annotated[int, Range(0, 2**31 - 1)] = 0,
    progress: bool = False,
) -> nn.Module:
    """Merge experts as `m_smoe`, then store each merged matrix as low rank plus a few whole rows.

    1. W ≈ L R + S for gate (if any), up and down of each merged expert: L = U_r √Σ_r, R = √Σ_r V_rᵀ, and
       S = W − L R, so that nothing changes at first.
    2. Train all but the routers: loss = task + 0.2 KL(original ‖ student at T = 2). Meanwhile rows of S fall: a
       row's importance is the mean of I = EMA_0.85 |w · ∂loss/∂w|; at step t of T the top share

           v(t) = density + (1 − density) (1 − (t − t_i) / (T − t_i − t_f))³

       of all rows of all layers together stays, the others are zeroed for good.
    3. Rows that fell are really dropped. With steps=0, nothing is trained and the rows of largest norm stay.

    Args:
        model: a mixture of experts of transformers, as `m_smoe`; it also teaches.
        trace: `record_routing(model)` over calibration text.
        n_experts: experts that each layer stores afterwards.
        rank: r, at most the smaller side of a matrix.
        density: share of the rows of S that stays.
        steps: optimiser steps.
        lr: learning rate at first; it falls linearly to 0.
        align: as `m_smoe`.
        batches: generator to token ids [n, length], a tuple that begins with them, or keyword arguments of the model
            (for Switch `input_ids` and `decoder_input_ids`); default: the trace's text.
        seed: of the batches, and of dropout and router noise where the model has them.
        progress: show a bar.

    Returns:
        A new model with factored experts; save_pretrained, from_pretrained and generate work on it.

    Raises:
        ValueError: as `m_smoe`; a rank that the matrices do not have; steps without token ids.

    Source: Li et al. (2023), section 3.2; UNITES-Lab/MC-SMoE, `mcsmoe/pruning/losparse.py`, whose rows may come back
        while it trains; here a row that fell stays zero. It warms up for 16 steps, here the rate falls from the start.
    """
    merged = m_smoe(model, trace, n_experts=n_experts, align=align)
    student, alive = factor(merged, rank), ()
    sparse = [(layer.experts, kind) for layer in expert_view(student) for kind in layer.experts.kinds]
    importance = row_sizes(student)
    if steps:
        device = next(model.parameters()).device
        draw = batches or _drawn(trace, device)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):  # dropout, router noise
            torch.manual_seed(seed)
            importance, alive = _train(model, student, sparse, draw, density, steps, lr, seed, progress)
    drop_rows(student, importance, density, alive)
    return student.eval()


def kept_share(step: int, steps: int, density: float) -> float:
    """v(t): the share of rows that may stay after `step` of `steps`; falls from 1 to `density` by a cubic."""
    start, end = WARM_UP * steps, (1 - COOL_DOWN) * steps
    done = min(max((step - start) / max(end - start, 1e-9), 0.0), 1.0)
    return density + (1 - density) * (1 - done) ** 3


def distillation_loss(
    teacher: nn.Module, student: nn.Module, batch: Int[Tensor, "n length"] | Mapping[str, Tensor]
) -> Float[Tensor, ""]:
    """Cross entropy of the next token (the decoder's) + 0.2 KL(teacher ‖ student), both at temperature 2."""
    batch = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
    written = "decoder_input_ids" if student.config.is_encoder_decoder else "input_ids"
    if written not in batch:
        raise ValueError(f"a {type(student).__name__} learns from batches with {written}, got {', '.join(batch)}")
    ids = batch[written]
    ours = student(**batch, use_cache=False).logits[:, :-1]
    with torch.no_grad():
        theirs = teacher(**batch, use_cache=False).logits[:, :-1]
    task = F.cross_entropy(ours.transpose(1, 2), ids[:, 1:])
    student_log, teacher_log = (F.log_softmax(z.flatten(0, 1) / 2, -1) for z in (ours, theirs))
    return task + 0.2 * F.kl_div(student_log, teacher_log, reduction="batchmean", log_target=True)


def _train(teacher, student, sparse, draw, density, steps, lr, seed, progress) -> tuple[list, list]:
    from tqdm.auto import trange

    student.train().requires_grad_(True)
    for layer in expert_view(student):
        layer.router_module.requires_grad_(False)
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, eps=1e-6, betas=(0.9, 0.98), weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    importance = [torch.zeros(len(rows_of(*place))) for place in sparse]
    alive = [torch.ones(len(i), dtype=torch.bool) for i in importance]
    for step in trange(1, steps + 1, desc="mc_smoe", disable=not progress):
        optimizer.param_groups[0]["lr"] = lr * (1 - (step - 1) / steps)
        batch = draw(generator)
        loss = distillation_loss(teacher, student, batch[0] if isinstance(batch, tuple) else batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for i, place in zip(importance, sparse, strict=True):
            w = rows_of(*place)
            i.lerp_((w * w.grad).detach().abs().float().mean(1).cpu() if w.grad is not None else 0 * i, 1 - EMA)
        optimizer.step()
        alive = top_rows(importance, alive, kept_share(step, steps, density))
        with torch.no_grad():
            for rows, place in zip(alive, sparse, strict=True):
                rows_of(*place)[~rows] = 0
    return importance, alive


def _drawn(
    trace: RoutingTrace, device: torch.device, n: int = 8
) -> Callable[[torch.Generator], dict[str, Int[Tensor, "n length"]]]:
    """Batches of the trace's own sequences."""
    # The last entry is what is written: the text itself, or the decoder's.
    groups = [batch for batch in trace_batches(trace, device) if [*batch.values()][-1].shape[1] > 1]
    if not groups:
        raise ValueError("the trace has no sequence of two tokens or more to learn from: give batches=...")

    def draw(generator: torch.Generator) -> dict[str, Tensor]:
        batch = groups[int(torch.randint(len(groups), (), generator=generator))]
        rows = torch.randint(total := len(batch["input_ids"]), (min(n, total),), generator=generator)
        return {name: ids[rows] for name, ids in batch.items()}

    return draw
