"""Hand-built graphs for the pass tests: traced from a function, as capture traces a model."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from icw_compile.cache.tensor import QuantizedKV
from icw_compile.passes import KVGraph

BATCH, HEADS, QUERY_HEADS, TOKENS, HEAD_DIM = 2, 2, 4, 8, 16


def kv(tokens: int = TOKENS) -> Tensor:
    return torch.randn(BATCH, HEADS, tokens, HEAD_DIM)


def query(length: int = 1) -> Tensor:
    return torch.randn(BATCH, QUERY_HEADS, length, HEAD_DIM)


def trace(function: Callable[..., Any], *inputs: Tensor, quantized: Sequence[int] = ()) -> KVGraph:
    """The graph of ``function``; the inputs at the positions in ``quantized`` stand for `QuantizedKV` tensors."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # constants of the function
    fakes = [mode.from_tensor(x) for x in inputs]
    with mode, torch.no_grad():
        module = make_fx(function, pre_dispatch=True)(*fakes)
    placeholders = module.graph.find_nodes(op="placeholder")
    parts = {}
    for position in quantized:
        q = QuantizedKV.quantize(inputs[position])
        parts[placeholders[position]] = q.whole.of_parts(mode.from_tensor(part) for part in q.buffers)
    return KVGraph(module, mode, parts)


def run(graph: KVGraph, *inputs: Tensor, more: Sequence[Tensor] = ()) -> list[Tensor]:
    """Run a rewritten graph on `QuantizedKV` and float inputs; quantized outputs come back dequantized.

    ``more`` are what it takes besides.
    """
    flat = [x.qdata if isinstance(x, QuantizedKV) else x for x in inputs]
    flat += [x.scale for x in inputs if isinstance(x, QuantizedKV)]
    flat += more
    with torch.no_grad():
        returned = graph.module(*flat)
    returned = returned if isinstance(returned, (tuple, list)) else (returned,)
    return [
        returned[o.position]
        if o.stored is None
        else QuantizedKV.of(o.stored.of_parts(returned[i] for i in o.stored.parts)).dequantize()
        for o in graph.outputs
    ]


def counts(graph: KVGraph) -> dict[str, int]:
    """How often each operation is called, by its short name."""
    found: dict[str, int] = {}
    for node in graph.graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            name = node.target._schema.name.split("::")[1]
            found[name] = found.get(name, 0) + 1
    return found


def text(graph: KVGraph) -> str:
    """The graph as short lines, one a node: for golden tests."""
    lines = []
    for node in graph.graph.nodes:
        if node.op == "output":
            lines.append(f"return {node.args[0]}")
        elif node.op == "placeholder":
            lines.append(f"{node.name}: {_type(node.meta['val'])}")
        elif node.op == "get_attr":
            lines.append(f"{node.name} = {node.target}")
        else:
            target = (
                node.target._schema.name.split("::")[1] if hasattr(node.target, "_schema") else node.target.__name__
            )
            args = ", ".join(map(_short, node.args))
            lines.append(f"{node.name} = {target}({args})")
    return "\n".join(lines) + "\n"


def _type(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


def _short(value: Any) -> str:
    return str(value).removeprefix("torch.")
