"""What the command says to the user, and what it keeps the other libraries from saying."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

CHATTY = ("torchao", "torch.utils._pytree")
"""Loggers that warn of their own parts when they are imported"""


def say(text: str) -> None:
    """Progress goes to standard error; standard output holds only what was made."""
    print(text, file=sys.stderr, flush=True)


class SayOnce(logging.Handler):
    """Shows hubgen's own warnings, each once: a prompt of n pictures is encoded in several batches."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = " ".join(record.getMessage().split())
        if text not in self.said:
            self.said.add(text)
            say(f"hubgen: warning: {text}")


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep the other libraries' remarks and loading bars out of the command's few lines; errors still come through."""
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    ours, handler = logging.getLogger("hubgen"), SayOnce()
    ours.addHandler(handler)
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
        ours.removeHandler(handler)
        for logger, level in chatty:
            logger.setLevel(level)
        for module, verbosity in saved:
            module.set_verbosity(verbosity)
            module.enable_progress_bar()
