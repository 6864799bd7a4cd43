"""The calling convention: a caller that holds `QuantizedKV` tensors, a compiled function that takes their parts."""

from collections.abc import Callable, Sequence
from typing import Any

from icw_compile.passes import KVGraph, Output
from icw_compile.tensor import QuantizedKV

__all__ = ["bind"]


def bind(graph: KVGraph, compiled: Callable[..., Sequence[Any]]) -> Callable[..., list[Any]]:
    """Wrap ``compiled``, which has the rewritten graph's signature, into the signature of the captured graph.

    Args:
        graph: the rewritten graph.
        compiled: takes the rewritten graph's inputs and returns its outputs.

    A quantized input keeps the position of its tensor for its first part, and its other parts follow after all
    inputs. This runs at every call: nothing in it looks at an ordinary input or output.
    """
    unwrap = [position for position, name in enumerate(graph.input_names) if name in graph.inputs]
    outputs = graph.outputs
    plain_outputs = all(output.dtype is None for output in outputs)

    def call(*args: Any) -> list[Any]:
        inputs = list(args)
        for position in unwrap:
            tensor = inputs[position]
            inputs[position] = tensor.qdata
            inputs.append(tensor.scale)
        returned = compiled(*inputs)
        return list(returned) if plain_outputs else [_wrap(returned, output) for output in outputs]

    return call


def _wrap(returned: Sequence[Any], output: Output) -> Any:
    if output.dtype is None:
        return returned[output.positions[0]]
    qdata, scale = (returned[position] for position in output.positions)
    return QuantizedKV(qdata, scale, output.dtype)
