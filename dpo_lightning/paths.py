"""Paths that keys name, looked at: what the system refuses is told like any other mistake. Imports nothing heavy."""

from __future__ import annotations

import importlib.util
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dpo_lightning.types import UserError


@contextmanager
def looking(key: str, path: str | Path) -> Iterator[None]:
    """Make one line of what hinders a look at the path that a key names. Raises UserError.

    Path.exists and its like say False of what is not there, and raise for a closed folder or a name that is too long.
    """
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"{key}={path}: cannot be looked at ({why}); check the path, or choose another") from error


def at_home(override: str) -> str:
    """Return an override whose value begins with ~/ with the home folder in its place: no shell does it behind a =.

    >>> at_home("loss.beta=~1"), at_home("~callbacks.bar"), at_home("run_dir=~/x") == f"run_dir={Path.home()}/x"
    ('loss.beta=~1', '~callbacks.bar', True)
    """
    return re.sub(r"(?<==)~(?=/|$)", lambda _: str(Path.home()), override, count=1)


def fresh_name() -> str:
    """Return a run folder's name: the time, and four digits more, as several runs may start within a second."""
    return f"{time.strftime('%Y-%m-%d_%H-%M-%S')}-{secrets.token_hex(2)}"


def package_folder(name: str) -> Path | None:
    """Return where an installed package lies, without importing it; None where there is none."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # what a dotted name begins with is not there; no name at all
        return None
    return Path(spec.origin).parent if spec and spec.origin else None


def is_path(name: str) -> bool:
    """Return whether a name can only be meant as a path: no name on the hub begins so."""
    return name.startswith(("/", ".", "~"))
