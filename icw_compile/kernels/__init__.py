"""Attention kernels of our own, for what Inductor does not generate well.

A kernel computes ``icw_int8kv::attention`` for the devices, shapes and dtypes that it takes. The ``lower`` pass asks
`find_kernel` and falls back on Inductor, with the reason in the report.
"""

from icw_compile.kernels import cpu
from icw_compile.passes import Kernel

__all__ = ["find_kernel"]


def find_kernel(device_type: str, choice: str = "auto") -> Kernel | str:
    """The kernel for tensors on ``device_type``, ready to run, or why there is none (empty: none is wanted).

    Args:
        device_type: ``"cpu"``, ``"cuda"``, ...
        choice: the option ``icw.attention``: ``"auto"``, ``"inductor"`` (no kernel) or ``"cpu"``.

    Raises:
        KernelUnavailableError: the kernel was asked for by name, and cannot be built here.
    """
    if choice == "inductor":
        return ""
    if device_type != "cpu":
        return f"there is no kernel for {device_type}"
    try:
        cpu.load()
    except cpu.KernelUnavailableError as error:
        if choice == "cpu":
            raise
        return str(error).splitlines()[0]
    return Kernel("cpu kernel", cpu.attention, cpu.supports)
