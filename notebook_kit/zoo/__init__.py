"""Small trained checkpoints that ship with the kit, each with held-out data and a score: higher is better.

`python -m notebook_kit.zoo.build` trains them again.
"""

from notebook_kit.zoo.bed import Bed, Score
from notebook_kit.zoo.diffusion import digit_diffusion, digit_images
from notebook_kit.zoo.digits import digit_labels, digit_twins, digit_views
from notebook_kit.zoo.language import language_experts, language_moe
from notebook_kit.zoo.store import manifest

__all__ = [
    "Bed",
    "Score",
    "digit_diffusion",
    "digit_images",
    "digit_labels",
    "digit_twins",
    "digit_views",
    "language_experts",
    "language_moe",
    "manifest",
]
