"""What glibc's allocator does with memory that is freed; other C libraries have no such switches."""

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4  # of glibc's malloc.h
BLOCKS = 65536  # how many blocks may be mapped each by itself, glibc's default


def _mallopt() -> Callable[[int, int], int]:
    if sys.platform == "linux":
        try:
            return ctypes.CDLL(None).mallopt
        except (OSError, AttributeError):
            pass  # musl has none
    return lambda option, value: 1


def keep_freed_memory() -> None:
    """Keeps the blocks that a step frees for the next step."""
    mallopt = _mallopt()
    mallopt(TRIM_THRESHOLD, 2**31 - 1)
    mallopt(MMAP_MAX, 0)


@contextmanager
def give_freed_memory_back() -> Iterator[None]:
    """Large blocks, of sizes that differ, go back to the system when they are freed: kept, they leave holes, which
    took three times the memory in use where four shards of 38 MB were merged. Afterwards `keep_freed_memory` holds."""
    mallopt = _mallopt()
    mallopt(MMAP_THRESHOLD, 2**20)
    mallopt(MMAP_MAX, BLOCKS)
    try:
        yield
    finally:
        mallopt(MMAP_MAX, 0)
