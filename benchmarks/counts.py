"""Numbers on a command line; argparse makes a usage error of what is raised."""

from __future__ import annotations


def whole(text: str) -> int:
    """Return a whole number, 0 or more."""
    if (value := int(text)) < 0:
        raise ValueError
    return value


def positive(text: str) -> int:
    """Return a whole number above 0."""
    if not (value := whole(text)):
        raise ValueError
    return value
