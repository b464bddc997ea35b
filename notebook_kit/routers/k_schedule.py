"""How many experts at which step: the curricula of SMoE-Dropout.

    u = step / steps in [0, 1]        s(u) in [0, 1]        up: k = k_min + round((k_max - k_min) s(u))

| schedule     | s(u), up                                            | paper's code      |
|--------------|-----------------------------------------------------|-------------------|
| linear       | u                                                   | linear_increase   |
| cosine       | 1 - cos(π u / 2): slow at first                     | cosine_increase   |
| exponential  | 1 - 0.99^floor(300 u): fast at first, ends at 0.951 | exp_increase      |
| multi-step   | k doubles from k_min to k_max in equal stretches    | 1, 2, 4, 8, 16    |
| constant     | 1                                                   |                   |

Down counts as many steps from k_max as up does from k_min, as their linear_decrease and multi_step_decrease do; their
cosine_decrease is k_min + round((k_max - k_min) cos(π u / 2)): the same up to a rounding half. Their code has no
exponential decrease. Halves round to even, as Python does.

Source: Chen et al. 2023, section 3; `calculate_gate_number` in their new_utils.py.
"""

import math
from typing import Annotated

from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Choice, Range


@method(family="routers", paper="smoe-dropout")
def k_schedule(
    step: int,
    steps: int,
    *,
    k_min: Annotated[int, Range(1, 512)] = 8,
    k_max: Annotated[int, Range(1, 512)] = 16,
    schedule: Annotated[str, Choice("linear", "cosine", "exponential", "multi-step", "constant")] = "linear",
    direction: Annotated[str, Choice("up", "down")] = "up",
) -> int:
    """Say how many experts a token uses at a step of training.

    Args:
        step: from 0; beyond `steps` k stays where it ended.
        steps: T, the length of the curriculum, at least 1.
        k_min: fewest experts; the paper has half of them.
        k_max: most experts, such as all N.
        schedule: the shape; "constant" is k_max throughout.
        direction: "up" from k_min to k_max, or "down".

    Returns:
        k, between k_min and k_max.

    Raises:
        ValueError: k_min > k_max, a negative step, or steps < 1.
    """
    if k_min > k_max:
        raise ValueError(f"k_min must be at most k_max={k_max}, got {k_min} (k_schedule)")
    if step < 0 or steps < 1:
        raise ValueError(f"step must be at least 0 and steps at least 1, got {step} and {steps} (k_schedule)")
    if schedule == "constant":
        return k_max
    u = min(step / steps, 1.0)
    if schedule == "multi-step":
        stairs = sorted({k_max, *(k_min * 2**i for i in range(10) if k_min * 2**i < k_max)})
        risen = stairs[min(int(len(stairs) * u), len(stairs) - 1)] - k_min
        down = stairs[::-1][min(int(len(stairs) * u), len(stairs) - 1)]
        return k_min + risen if direction == "up" else down
    shapes = {"linear": u, "cosine": 1 - math.cos(math.pi * u / 2), "exponential": 1 - 0.99 ** int(300 * u)}
    moved = round((k_max - k_min) * shapes[schedule])
    return k_min + moved if direction == "up" else k_max - moved
