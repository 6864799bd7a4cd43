"""The calling convention: a caller that holds `QuantizedKV` tensors, a compiled function that takes their parts."""

from collections.abc import Callable, Sequence
from typing import Any

from icw_compile.cache.adopt import adopt, find_owners
from icw_compile.cache.tensor import QuantizedKV
from icw_compile.formats.rows import Keep, Quantized
from icw_compile.passes import KVGraph

__all__ = ["bind"]


def bind(graph: KVGraph, compiled: Callable[..., Sequence[Any]]) -> Callable[..., list[Any]]:
    """Wrap ``compiled``, which has the rewritten graph's signature, into the signature of the captured graph.

    Args:
        graph: the rewritten graph.
        compiled: takes the rewritten graph's inputs and returns its outputs.

    A quantized input keeps the position of its tensor for its first part, and its other parts follow after all
    inputs. Where the graph appends rows to one, it is given room for them first, and the same tensor is returned. This
    runs at every call: nothing in it looks at an ordinary input or output.
    """
    at = {name: position for position, name in enumerate(graph.input_names)}
    taken = [(at[name], each, at.get(each.rows)) for name, each in graph.inputs.items()]
    adopted = [(position, each.adopted) for position, each, _ in taken if each.adopted is not None]
    outputs = [(each.position, each.quantized, at.get(each.input)) for each in graph.outputs]
    plain_outputs = all(output.position >= 0 for output in graph.outputs)

    def call(*args: Any) -> list[Any]:
        inputs = list(args)
        if adopted:
            owners = find_owners(args[position] for position, _ in adopted)
            for position, like in adopted:
                equalize, keep = like.shift is not None, Keep.as_in(like)
                inputs[position] = adopt(args[position], owners.get(id(args[position])), equalize=equalize, keep=keep)
        grown = {}
        for position, each, rows_at in taken:
            tensor = inputs[position]
            if each.spare is not None:
                length = tensor.shape[2]
                tensor = grown[position] = tensor.reserve(each.rows if rows_at is None else args[rows_at])
                inputs += tensor.parts[1:]
                inputs.append(tensor.spare_rows)
                if each.length is not None:
                    inputs.append(length)
            else:
                if each.written:
                    tensor.separate()
                inputs += tensor.parts[1:]
            inputs[position] = tensor.qdata
        returned = compiled(*inputs)
        if plain_outputs:
            return list(returned)
        return [
            grown[source]
            if source is not None
            else _wrap(quantized.of_parts(returned[part] for part in quantized.parts.values()))
            if quantized is not None
            else returned[position]
            for position, quantized, source in outputs
        ]

    return call


def _wrap(value: Quantized) -> QuantizedKV:
    if all(part.is_contiguous() and part.dim() == 4 for part in value.rows):
        return QuantizedKV.growing(value)
    return QuantizedKV.of(value)
