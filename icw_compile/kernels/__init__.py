"""Attention kernels of our own, for what Inductor does not generate well.

A kernel computes ``icw_int8kv::attention`` for the devices, shapes and dtypes that it takes. The ``lower`` pass asks
`find_kernel` and falls back on Inductor, with the reason in the report.
"""

from icw_compile.errors import KernelUnavailableError
from icw_compile.kernels import cpu, gpu
from icw_compile.passes import Kernel

__all__ = ["find_kernel"]

#: Device type -> the option that asks for its kernel by name, and the module of the kernel.
_KERNELS = {"cpu": ("cpu", cpu), "cuda": ("triton", gpu)}


def find_kernel(device_type: str, choice: str = "auto") -> Kernel | str:
    """The kernel for tensors on ``device_type``, ready to run, or why there is none (empty: none is wanted).

    Args:
        device_type: ``"cpu"``, ``"cuda"``, ...
        choice: the option ``icw.attention``: ``"auto"``, ``"inductor"`` (no kernel), ``"cpu"`` or ``"triton"``.

    Raises:
        KernelUnavailableError: the kernel was asked for by name, and is for another device or cannot be built here.
    """
    if choice == "inductor":
        return ""
    name, module = _KERNELS.get(device_type, ("", None))
    if choice not in ("auto", name):
        device = next(device for device, (option, _) in _KERNELS.items() if option == choice)
        raise KernelUnavailableError(
            f'options={{"icw.attention": "{choice}"}} asks for the kernel for {device}, and the model is on '
            f'{device_type}: leave the option out, or use "auto".'
        )
    if module is None:
        return f"there is no kernel for {device_type}"
    try:
        module.load()
    except KernelUnavailableError as error:
        if choice != "auto":
            raise
        return str(error).splitlines()[0]
    return Kernel(f"{name} kernel", module.attention, module.attention_lse, module.supports)
