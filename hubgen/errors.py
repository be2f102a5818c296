"""Which errors tell of what a user gave or of a full machine, and how they are said in one line."""

import errno
import os

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Named, not imported: the modules that define them are heavy, and may not have been loaded when the error came.
OF_LIBRARIES = {
    "torch.OutOfMemoryError",
    "safetensors_rust.SafetensorError",
    "safetensors._safetensors_rust.SafetensorError",
    "safetensors.SafetensorError",
    "huggingface_hub.EntryNotFoundError",
    "huggingface_hub.RevisionResolutionError",
}


def is_expected(error: BaseException) -> bool:
    """Whether an error tells of bad input or a full machine, rather than of a fault in the program."""
    if isinstance(error, (ValueError, OSError)):
        return True
    for kind in type(error).__mro__:
        home = kind.__module__
        if {f"{home}.{kind.__name__}", f"{home.split('.')[0]}.{kind.__name__}"} & OF_LIBRARIES:
            return True
    # On a CPU, torch reports exhausted memory as a plain RuntimeError.
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def one_line(error: BaseException, out_of_memory: str = "try a smaller batch or smaller pictures") -> str:
    """An error's message on one line; an OSError of the system names its file first.

    Args:
        error: Any.
        out_of_memory: What to try where memory was exhausted.
    """
    if isinstance(error, OSError) and error.errno in FULL:
        return f"disk full while writing {error.filename or 'the output'} ({os.strerror(error.errno)})"
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{os.fspath(error.filename)}: {error.strerror}"
    text = " ".join(str(error).split()) or type(error).__name__
    if "allocate memory" in text or "OutOfMemory" in type(error).__name__:
        text = f"out of memory; {out_of_memory} ({text})"
    return text
