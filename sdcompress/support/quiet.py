"""Silence diffusers and transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """Turn off the progress bars and notices of diffusers and transformers within the block."""
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
