"""The calling convention: a caller that holds `QuantizedKV` tensors, a compiled function that takes their parts."""

from collections.abc import Callable, Sequence
from typing import Any

from icw_compile.passes import KVGraph
from icw_compile.tensor import QuantizedKV

__all__ = ["bind"]


def bind(graph: KVGraph, names: Sequence[str], compiled: Callable[..., Sequence[Any]]) -> Callable[..., list[Any]]:
    """Wrap ``compiled``, which has the rewritten graph's signature, into the signature of the captured graph.

    Args:
        graph: the rewritten graph.
        names: the captured graph's placeholder names, in order.
        compiled: takes the rewritten graph's inputs and returns its outputs.

    A quantized input keeps the position of its tensor for its first part, and its other parts follow after all
    inputs. This runs at every call: nothing in it looks at an ordinary input or output.
    """
    positions = {name: i for i, name in enumerate(names)}
    unwrap = [(positions[name], parts) for name, parts in graph.inputs.items()]
    plain_outputs = all(output.dtype is None for output in graph.outputs)
    outputs = graph.outputs

    def call(*args: Any) -> list[Any]:
        inputs = list(args)
        for position, _ in unwrap:
            tensor = inputs[position]
            inputs[position] = tensor.qdata
            inputs.append(tensor.scale)
        returned = compiled(*inputs)
        if plain_outputs:
            return list(returned)
        return [
            returned[output.positions[0]]
            if output.dtype is None
            else QuantizedKV(*[returned[i] for i in output.positions], output.dtype)
            for output in outputs
        ]

    return call
