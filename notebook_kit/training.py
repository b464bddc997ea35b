"""One short training loop: seeded, with a progress bar, and a history to look at afterwards."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def fit(
    model: nn.Module,
    batches: Callable[[torch.Generator], Any],
    loss: Callable[[nn.Module, Any], Tensor],
    *,
    steps: int,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    seed: int = 0,
    progress: bool = True,
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    evaluate_every: int = 0,
    schedule: Callable[[float], float] | None = None,
    moments: dict[str, Tensor] | None = None,
    desc: str = "",
):
    """Train a model in place with AdamW over its parameters that require a gradient.

    The same seed gives the same history; the caller's random state and the model's training mode are left alone.

    Args:
        model: any module; changed in place.
        batches: draws one batch from the generator it is given, which `seed` starts.
        loss: (model, batch) -> scalar to be minimised.
        steps: optimiser steps, >= 1.
        lr: learning rate, > 0.
        weight_decay: decoupled weight decay, >= 0; 0 is plain Adam.
        seed: of the batches and of dropout.
        progress: show a bar.
        evaluate: model -> figures for the history, run in evaluation mode without gradients.
        evaluate_every: steps between evaluations; 0 means after the last step only.
        schedule: share of the steps done, in [0, 1) -> factor of the learning rate; None keeps it constant.
        moments: an empty dict that is filled with what Adam knows of the curvature: its second moments after the last
            step, by parameter name (a tied weight once), in the parameter's shape. They are raw, about
            (1 - 0.999^steps) E[g²]: compare only runs of equally many steps. The methods `ota` and
            `fast_fisher_graft` read them.
        desc: text before the bar, and in errors.

    Returns:
        pandas.DataFrame with a row per step: step (from 1), loss, and evaluate's figures where it ran.

    Raises:
        ValueError: nothing is trainable, steps < 1, `moments` is not empty, or the loss is NaN or infinite (names the
            step).
    """
    import pandas as pd
    from tqdm.auto import trange

    name = desc or type(model).__name__
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError(f"{name} has no parameter that requires a gradient: nothing to train (is it frozen?)")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps} ({name})")
    if moments:
        raise ValueError(f"moments must be an empty dict to be filled, got one with {len(moments)} entries ({name})")
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    generator = torch.Generator().manual_seed(seed)
    was_training, history = model.training, []
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            bar = trange(1, steps + 1, desc=desc or None, disable=not progress)
            for step in bar:
                model.train()
                if schedule is not None:
                    optimizer.param_groups[0]["lr"] = lr * schedule((step - 1) / steps)
                value = loss(model, batches(generator))
                row = {"step": step, "loss": value.item()}
                if not torch.isfinite(value):
                    raise ValueError(f"the loss is {row['loss']} at step {step} ({name}): lower lr={lr:g}")
                optimizer.zero_grad(set_to_none=True)
                value.backward()
                optimizer.step()
                due = evaluate_every > 0 and step % evaluate_every == 0
                if evaluate is not None and (due or step == steps):
                    model.eval()
                    with torch.no_grad():
                        row.update(evaluate(model))
                history.append(row)
                if step % 10 == 0 or step == steps:
                    bar.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
    finally:
        model.train(was_training)
    if moments is not None:
        moments |= _second_moments(model, optimizer)
    return pd.DataFrame(history)


def _second_moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """exp_avg_sq by name; zeros for a parameter that the loss never reached."""
    return {
        name: optimizer.state[p]["exp_avg_sq"].clone() if p in optimizer.state else torch.zeros_like(p.detach())
        for name, p in model.named_parameters()
        if p.requires_grad
    }
