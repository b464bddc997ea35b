"""How hot a Gumbel softmax is at which step: EvoMoE's way from all experts to very few.

    t step, D = steps, τ₀ = temperature, τ₁ = final_temperature

| decay       | τ(t)                                                     | official name |
|-------------|----------------------------------------------------------|---------------|
| exponential | max(τ₀ exp(ln(τ₁ / τ₀) t / D), τ₁): equal ratios a step  | Exp           |
| linear      | max(τ₀ - t (τ₀ - τ₁) / D, τ₁): equal differences a step  | Linear        |
| constant    | τ₀                                                       |               |

Source: Nie et al. 2021, section 4; the training loop of their fairseq fork (its defaults are 1.0 and 0.5; the gate that
SMoE-Dropout's repository compares with goes from 2.0 to 0.3, ours too).
"""

import math
from typing import Annotated

from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Choice, Range


@method(family="routers", paper="evomoe")
def temperature_schedule(
    step: int,
    steps: int,
    *,
    temperature: Annotated[float, Range(0.01, 20, log=True)] = 2.0,
    final_temperature: Annotated[float, Range(0.01, 20, log=True)] = 0.3,
    decay: Annotated[str, Choice("exponential", "linear", "constant")] = "exponential",
) -> float:
    """Say how hot the gate is at a step of training.

    Args:
        step: t, from 0; beyond `steps` the temperature stays where it ended.
        steps: D, the length of the cooling, at least 1.
        temperature: τ₀, at step 0.
        final_temperature: τ₁, from step D on; without effect if the decay is constant.
        decay: the shape.

    Returns:
        τ, between the two.

    Raises:
        ValueError: a gate that would heat up, a negative step, or steps < 1.
    """
    if step < 0 or steps < 1:
        raise ValueError(f"step must be at least 0 and steps at least 1, got {step} and {steps} (temperature_schedule)")
    if decay == "constant":
        return temperature
    if final_temperature > temperature:
        raise ValueError(
            f"final_temperature must be at most temperature={temperature:g}, got {final_temperature:g}: the gate cools "
            "(temperature_schedule)"
        )
    if decay == "linear":
        return max(temperature - step * (temperature - final_temperature) / steps, final_temperature)
    return max(temperature * math.exp(math.log(final_temperature / temperature) * step / steps), final_temperature)
