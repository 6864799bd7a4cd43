"""Attention kernels of our own, for what Inductor does not generate well.

A kernel computes ``icw_int8kv::attention`` for the devices and calls that it takes (`icw_compile.kernels.interface`).
The ``lower`` pass asks `find_kernel` and falls back on Inductor, with the reason in the report. The C++ file and
`icw_compile.kernels.settle` have kernels for a few operations of `icw_compile.formats` as well, which graphs hold as
they are.
"""

from icw_compile.errors import KernelUnavailableError
from icw_compile.kernels import cpu, gpu, prompt, settle
from icw_compile.kernels.interface import AttentionCall, AttentionKernel, StoredRows

__all__ = ["AS_ASKED", "KERNELS", "AttentionCall", "AttentionKernel", "StoredRows", "find_kernel", "prompt", "settle"]

#: Why there is no kernel where the user wants none.
AS_ASKED = "as asked"
KERNELS: tuple[AttentionKernel, ...] = (cpu.KERNEL, gpu.KERNEL)


def find_kernel(device_type: str, choice: str = "auto", *, wait: bool = True) -> AttentionKernel | str:
    """The kernel for tensors on ``device_type``, ready to run, or why there is none: never an empty text.

    Args:
        device_type: ``"cpu"``, ``"cuda"``, ...
        choice: the option ``icw.attention``: ``"auto"``, ``"inductor"`` (no kernel), or `AttentionKernel.option`.
        wait: otherwise one that is being built is taken to be ready. Call `AttentionKernel.load` before it runs.

    Raises:
        KernelUnavailableError: the kernel was asked for by name, and is for another device or cannot be built here.
    """
    if choice == "inductor":
        return AS_ASKED
    kernel = next((kernel for kernel in KERNELS if device_type in kernel.devices), None)
    if choice != "auto" and (kernel is None or kernel.option != choice):
        devices = " and ".join(next(kernel.devices for kernel in KERNELS if kernel.option == choice))
        raise KernelUnavailableError(
            f'options={{"icw.attention": "{choice}"}} asks for the kernel for {devices}, and the model is on '
            f'{device_type}: leave the option out, or use "auto".'
        )
    if kernel is None:
        return f"there is no kernel for {device_type}"
    if not wait and kernel.begin():
        return kernel
    try:
        kernel.load()
    except KernelUnavailableError as error:
        if choice != "auto":
            raise
        return str(error).splitlines()[0]
    return kernel
