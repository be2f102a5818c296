"""Keeps the other libraries' remarks and loading bars away while a pipeline is found, loaded and called."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

CHATTY = ("torchao", "torch.utils._pytree")
"""Loggers that warn of their own parts when they are imported"""


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """No remarks and no loading bars of other libraries inside; their errors, and hubgen's warnings, come through."""
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    chatty = [(logger, logger.level) for logger in map(logging.getLogger, CHATTY)]
    for logger, _ in chatty:
        logger.setLevel(logging.ERROR)
    saved = [(module, module.get_verbosity()) for module in (diffusers_logging, transformers_logging)]
    for module, _ in saved:
        module.set_verbosity_error()
        module.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in chatty:
            logger.setLevel(level)
        for module, verbosity in saved:
            module.set_verbosity(verbosity)
            module.enable_progress_bar()
