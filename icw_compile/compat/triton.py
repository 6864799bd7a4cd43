"""What Triton keeps to itself. Imports Triton where a function needs it: it is not everywhere.

Read and run in Triton 3.6, 3.7 and 3.8.
"""

__all__ = ["is_interpreting"]


def is_interpreting() -> bool:
    """Whether Triton runs kernels in Python, on any device (``TRITON_INTERPRET``). ``triton.knobs.runtime.interpret``.

    Decided where a kernel is defined.
    """
    import triton

    return bool(triton.knobs.runtime.interpret)
