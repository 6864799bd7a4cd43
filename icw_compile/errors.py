"""The errors and warnings that are ours. Everything else is one of Python's or torch's own."""

__all__ = ["KernelUnavailableError", "UnquantizedCacheError", "UnquantizedCacheWarning"]


class UnquantizedCacheWarning(UserWarning):
    """Something that looks like a key/value cache stays float, or is read through a dequantized copy."""


class UnquantizedCacheError(RuntimeError):
    """The same, with ``options={"icw.strict": True}``."""


class KernelUnavailableError(RuntimeError):
    """An attention kernel cannot be built or loaded here, or is for another device; the message says why."""
