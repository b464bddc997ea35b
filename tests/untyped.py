"""The kit as a user has it: without the type checks of the tests, which would catch a wrong type first."""

from collections.abc import Iterator
from contextlib import contextmanager

import jaxtyping


@contextmanager
def untyped() -> Iterator[None]:
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)
