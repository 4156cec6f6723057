"""Memory that is free and that malloc keeps, handed back between weights.

Every thread that compiles or multiplies leaves an arena behind, which counts as resident until it is trimmed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache


@cache
def _trim() -> Callable[[int], int] | None:
    """glibc's malloc_trim, where there is one."""
    try:
        return ctypes.CDLL(None).malloc_trim  # type: ignore[no-any-return]
    except (AttributeError, OSError, TypeError):  # another libc; Windows takes no None
        return None


def hand_back() -> None:
    """Give what malloc keeps back to the system; does nothing without glibc."""
    trim = _trim()
    if trim is not None:
        trim(0)
