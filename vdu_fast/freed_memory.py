"""Memory that was freed stays with the process, for the next tensors of the same loop.

glibc gives large blocks back to the system as soon as they are free, and every step of a loop asks for them again, page
by page: up to a tenth of the time of a small network on the CPU.
"""

from __future__ import annotations

import ctypes
import os
import sys

KEPT_BYTES = 512 * 2**20  # at the end of the heap
LARGE_BYTES = 32 * 2**20  # blocks from here on go back as ever; glibc before 2.35 refuses more
_LARGE, _KEPT = -3, -1  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h
_SET_BY_USER = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Have malloc take blocks below 32 MiB from the heap and keep 512 MiB free at its end; returns whether it does.

    Other processes cannot use what is kept. It is a setting of the whole process, so commands and their worker
    processes call this, and `import vdu_fast` never does. Nothing is changed where the C library is not glibc, or where
    the environment says what malloc shall do.
    """
    if not sys.platform.startswith("linux") or any(name in os.environ for name in _SET_BY_USER):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_LARGE, LARGE_BYTES)) and bool(mallopt(_KEPT, KEPT_BYTES))
