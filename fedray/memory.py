"""The memory of a process that is fedray's own."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's <malloc.h>


def keep_freed_memory() -> None:
    """Have this process keep what it frees, for its next vector; nothing where the C library is not glibc.

    glibc returns large blocks to the system at once, and a fresh one is written at a tenth of the speed of memory, page
    by page; on a virtual machine that may take more than half of a round of the paper's model. Threads other than the
    first, in which Ray's actors do their work, need MALLOC_ARENA_MAX=1 in the environment besides, from the start of
    the process: in an arena of their own, glibc maps large blocks whatever it is told here.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)  # never
