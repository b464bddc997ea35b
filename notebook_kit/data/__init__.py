"""Small data that need no network: handwritten digits, their labelings and views, and a text in twelve languages."""

from notebook_kit.data.digits import Labeling, digit_labelings, digits
from notebook_kit.data.increments import class_increments
from notebook_kit.data.text import LANGUAGES, byte_batches, byte_windows, udhr
from notebook_kit.data.views import VIEWS, digit_views

__all__ = [
    "LANGUAGES",
    "VIEWS",
    "Labeling",
    "byte_batches",
    "byte_windows",
    "class_increments",
    "digit_labelings",
    "digit_views",
    "digits",
    "udhr",
]
