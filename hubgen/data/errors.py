"""The error that every part of `hubgen.data` raises for input that cannot be used."""


class DataError(ValueError):
    """Unusable data: the message names the file, row or option, what was found and what was expected, on one line."""
