"""Durations as people read them."""


def in_words(seconds: float) -> str:
    """A duration in the unit that suits it: "40 s", "12 min" or "2.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
