"""What the command says to the user."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from hubgen.hub.quiet import quiet_libraries


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
def few_lines() -> Iterator[None]:
    """hubgen's own warnings, in the command's words, and nothing of the other libraries' remarks and loading bars."""
    ours, handler = logging.getLogger("hubgen"), SayOnce()
    ours.addHandler(handler)
    try:
        with quiet_libraries():
            yield
    finally:
        ours.removeHandler(handler)
