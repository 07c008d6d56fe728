"""glibc's malloc, told to keep large blocks.

Activations of 30-130 MB are otherwise mapped and unmapped at every operation, a fifth to a third of
a training step on a CPU. Linux with glibc only; elsewhere nothing happens.
"""

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def keep_large_blocks() -> bool:
    """Call once, before the first large tensor.

    True where it took effect; costs 0.2-0.4 GiB of memory.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    keep = mallopt(_M_MMAP_THRESHOLD, 2**30) and mallopt(_M_TRIM_THRESHOLD, 2**30)
    return bool(keep and mallopt(_M_TOP_PAD, 2**28))
