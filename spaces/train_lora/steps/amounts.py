"""Times and sizes, in words."""


def lasts(seconds: float) -> str:
    """A time."""
    if seconds < 50:
        return f"{max(round(seconds / 5) * 5, 5)} seconds"
    minutes = round(seconds / 60)
    return "a minute" if minutes <= 1 else f"{minutes} minutes" if minutes < 100 else f"{seconds / 3600:.1f} hours"


def room(size: float) -> str:
    """Bytes."""
    if size >= 1e9:
        return f"{size / 1e9:.1f} GB"
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{max(round(size / 1000), 1)} kB"
