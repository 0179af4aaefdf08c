"""diffusers and transformers without their own progress bars and notices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


@contextmanager
def quiet() -> Iterator[None]:
    """diffusers and transformers without their own bars and notices, for the block."""
    import diffusers
    import transformers

    states = []
    for logging in (diffusers.utils.logging, transformers.utils.logging):
        states.append((logging, logging.get_verbosity(), logging.is_progress_bar_enabled()))
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    try:
        yield
    finally:
        for logging, verbosity, bars in states:
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()
