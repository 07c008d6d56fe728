"""Make glibc's malloc keep large blocks of memory.

By default, malloc requests the memory of each large activation (typically 30 to 130 MB) from the
operating system and returns this memory after use. This happens at every operation and makes a
training step on a CPU slower. In docs/performance.md, the code of other projects was timed with and
without this module; without it, that code is 23 to 38 % slower. The module has an effect only on
Linux with glibc.
"""

import ctypes
import platform

# the numbers of these parameters of mallopt in glibc's malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4


def keep_large_blocks() -> bool:
    """Keep freed blocks of memory for reuse; call this once, before the first large tensor is made.

    The kept blocks take 0.2 to 0.4 GiB of memory. Returns whether the change took effect.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # Blocks of less than 1 GiB come from malloc's heap, not from a request of their own to the
    # operating system. The heap returns memory only if more than 1 GiB at its end is free, and
    # requests 256 MiB more than it needs each time it grows.
    # Older versions of glibc refuse a threshold above 32 MiB. With these versions, blocks of every
    # size come from the heap.
    unmapped = mallopt(_M_MMAP_THRESHOLD, 2**30) or mallopt(_M_MMAP_MAX, 0)
    return all([unmapped, mallopt(_M_TRIM_THRESHOLD, 2**30), mallopt(_M_TOP_PAD, 2**28)])
