"""The C++ kernels for attention on the CPU: ``icw_int8kv_cpu::attention`` and ``prompt``, built on first use.

The operator and its fake implementation exist as soon as this module is imported, so that graphs that hold it can be
traced and printed anywhere. `load` compiles ``attention.cpp`` for this machine with the compiler that Inductor
uses (two to five seconds; `begin` lets it run beside Inductor), keeps the shared library (`icw_compile.kernels.build`),
and gives the operator its CPU kernel; calling the operator before that is an error of torch's dispatcher.

Shapes, in the letters of `icw_compile.kernels.inductor`: ``B`` batch, ``Hq`` query heads, ``H`` key/value heads, ``T``
query tokens, ``S`` cached tokens, ``D`` head size of queries and keys, ``Dv`` head size of values.

``attention(query[B, Hq, T, D], key_qdata[B, H, S, D], key_scale[B, H, S, 1], value_qdata[B, H, S, Dv],
value_scale[B, H, S, 1], attn_mask, is_causal, scale, softcap, sinks=None, engine=-1, key_codes=None, value_codes=None,
key_exact=None, key_position=None, value_exact=None, value_position=None, key_shift=None, value_shift=None) ->
[B, Hq, T, Dv]``
    The function, the arguments and the semantics of ``icw_int8kv::attention``, with three licences. A position that a
    mask takes out (``False``, or minus infinity) contributes nothing even if its scale is not finite: its rows may
    never be read. A row of an additive mask that has values above -1e29 treats those below -1e30 (``finfo.min``) as
    minus infinity. And a row that reads any non-finite scale is NaN in every channel.
    ``query`` is bfloat16, float16 or float32; scales and sinks are of any floating dtype; ``attn_mask`` is ``None``,
    boolean or of any floating dtype, 4-dimensional, and broadcasts to ``[B, Hq, T, S]``. Any strides will do, except
    that the channels of stored tensors are contiguous. With ``key_codes``, uint8 ``[B, H, S, 2]``, the keys are packed
    as `icw_compile.formats.int4` has them, uint8 ``[B, H, S, D / 2]``; with ``value_codes`` the values are. With
    ``key_exact``, of a float dtype ``[B, H, K, D]``, row ``key_position[k]`` (int64; none if it is no position of
    ``S``) is ``key_exact[:, :, k]`` and not what is stored of it, and the values likewise; with ``key_shift``, uint8
    ``[B, H, 1, D]`` of less than 127, divided by two to its power. The result is contiguous, in the query's dtype.
    Raises RuntimeError for shapes and dtypes that do not fit, MemoryError for want of memory (from torch 2.15 on
    RuntimeError as well, which says so).
    ``engine`` caps the instructions that are used, for tests: 0 plain C++, 1 AVX-512 VNNI, 2 AMX, -1 the best there is.
``prompt(query[B, Hq, T, D], key[B, H, S, D], value[B, H, S, Dv], attn_mask, is_causal, scale, engine=-1) ->
[B, T, Hq, Dv]``
    The same over rows as they came, of any of the dtypes of a query; if ``is_causal``, token ``t`` reads the positions
    up to ``S - T + t``. In bfloat16 throughout, weights are rounded to it, as torch's kernel does. Heads come behind
    the tokens.
``engine(head_dim) -> int``
    The best engine that this build and this processor have for keys of that size.
``is_for_prompts(head_dim) -> bool``
    Whether ``prompt`` is made for them: with AVX-512 VNNI and bfloat16, and no AMX, with which it was not measured.
"""

import functools
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import torch
from torch import Tensor

from icw_compile.errors import KernelUnavailableError
from icw_compile.kernels.build import begin_build, build
from icw_compile.kernels.inductor import ATTENTION_ARGUMENTS
from icw_compile.kernels.interface import FEW_TOKENS, AttentionCall, AttentionKernel, declines_rows

__all__ = ["ENGINES", "KERNEL", "attention", "engines", "is_available", "is_for_prompts", "load"]

#: Instructions that the kernel can use, by the value of ``engine`` that caps them.
ENGINES = ("plain", "vnni", "amx")
#: How long a failure to build or load is repeated before it is tried again: a full disk is not full forever.
_RETRY_SECONDS = 60.0


def declines(call: AttentionCall) -> str | None:
    """Why the kernel does not take this call, or ``None`` if it does: `AttentionKernel.declines`."""
    if reason := declines_rows(call, KERNEL.devices, ("int8", "int4"), keeps_rows=True):
        return reason
    tokens = call.query.shape[2]
    if not isinstance(tokens, int):
        return f"a symbolic number of query tokens: the kernel is for at most {FEW_TOKENS}"
    if tokens > FEW_TOKENS:
        return f"a prompt: more than {FEW_TOKENS} query tokens"
    return None


def is_available() -> bool:
    """Whether `load` succeeds on this machine; builds the kernel if that has not been tried."""
    try:
        load()
    except KernelUnavailableError:
        return False
    return True


def engines(head_dim: int = 128) -> tuple[str, ...]:
    """Which of `ENGINES` this build and this processor have for keys of ``head_dim`` channels, slowest first.

    The last is what runs unless ``engine`` caps it; rows that have scales that are not finite are always left to the
    first.

    Raises:
        KernelUnavailableError: the kernel cannot be built or loaded here.
    """
    load()
    return ENGINES[: torch.ops.icw_int8kv_cpu.engine.default(head_dim) + 1]


@functools.cache
def is_for_prompts(head_dim: int) -> bool:
    """Whether ``icw_int8kv_cpu::prompt`` is made for this processor, and for heads of ``head_dim`` channels.

    Raises:
        KernelUnavailableError: the kernel cannot be built or loaded here.
    """
    load()
    return bool(torch.ops.icw_int8kv_cpu.is_for_prompts.default(head_dim))


class _Loader:
    """Loads the library once; a failure is repeated for a while, since building takes seconds, and then forgotten."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.loaded = False
        self.building: Future[Path] | None = None
        self.failure = ""
        self.failed_at = 0.0

    def begin(self) -> bool:
        with self.lock:
            if self.loaded or self.failure:
                return False
            try:
                self.building = self.building or begin_build()
            except KernelUnavailableError:
                return False  # `load` says why
            return not self.building.done()

    def load(self) -> None:
        with self.lock:
            if self.loaded:
                return
            if self.failure and time.monotonic() - self.failed_at < _RETRY_SECONDS:
                raise KernelUnavailableError(self.failure)
            building, self.building = self.building, None
            try:
                library = build() if building is None else building.result()
                torch.ops.load_library(str(library))
            except KernelUnavailableError as error:
                self.failure = str(error)
            except OSError as error:
                self.failure = f"The CPU attention kernel was built but does not load: {error}"
            else:
                self.loaded = True
                return
            self.failed_at = time.monotonic()
            raise KernelUnavailableError(self.failure)


_loader = _Loader()


def load() -> None:
    """Build the kernel unless this machine has it in the cache, and register it for the CPU.

    Does nothing after the first success; repeats a failure for a minute, and then tries again.

    Raises:
        KernelUnavailableError: no C++ compiler, a failed compilation, no safe place for the library, or one that does
            not load.
    """
    _loader.load()


def begin() -> bool:
    """Start to build the kernel unless this machine has it, for `load` to wait for; returns whether that is under way.

    It is not once building failed in this process: the next `load` says why, or tries again.
    """
    return _loader.begin()


def _register() -> None:
    torch.library.define("icw_int8kv_cpu::engine", "(int head_dim) -> int")
    torch.library.define("icw_int8kv_cpu::is_for_prompts", "(int head_dim) -> bool")
    torch.library.define(
        "icw_int8kv_cpu::prompt",
        "(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, bool is_causal, float scale, int engine=-1) "
        "-> Tensor",
    )
    torch.library.define(
        "icw_int8kv_cpu::attention",
        f"({ATTENTION_ARGUMENTS}, int engine=-1, Tensor? key_codes=None, Tensor? value_codes=None, "
        "Tensor? key_exact=None, Tensor? key_position=None, Tensor? value_exact=None, Tensor? value_position=None, "
        "Tensor? key_shift=None, Tensor? value_shift=None) "
        "-> Tensor",
        tags=(torch.Tag.pt2_compliant_tag,),
    )

    def fake(
        query: Tensor,
        key_qdata: Tensor,
        key_scale: Tensor,
        value_qdata: Tensor,
        value_scale: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None = None,
        engine: int = -1,
        key_codes: Tensor | None = None,
        value_codes: Tensor | None = None,
        *kept: Tensor | None,
        **named_kept: Tensor | None,
    ) -> Tensor:
        channels = value_qdata.shape[3] * (1 if value_codes is None else 2)
        return query.new_empty((*query.shape[:3], channels))

    torch.library.register_fake("icw_int8kv_cpu::attention", fake)


_register()

#: The operator, as a graph calls it.
attention = torch.ops.icw_int8kv_cpu.attention.default

KERNEL = AttentionKernel("cpu kernel", "cpu", ("cpu",), load, declines, attention, begin=begin, divides_kept=True)
