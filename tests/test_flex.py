"""``attn_implementation="flex_attention"``: its mask and its scores in plain operations, read from int8."""

from collections.abc import Callable

import pytest
import torch
from support import CLOSE_LOGITS, EAGER, graphs, relative_distance, tiny_model, tokens
from torch import Tensor
from torch.fx import symbolic_trace
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import DynamicCache, StaticCache

from icw_compile import QuantizedKV, UnquantizedCacheWarning
from icw_compile.frontend.flex import is_elementwise, spell_out
from icw_compile.lab.reference import dynamic_reference_cache, reference_cache

CHUNKS = (9, *(1,) * 9)  # past the window of 16 where there is one


@pytest.mark.filterwarnings("ignore::UserWarning")  # of flex_attention, that it is not compiled
@pytest.mark.parametrize(("name", "kind"), [("llama", "static"), ("gemma2", "dynamic")])
def test_model(name: str, kind: str) -> None:
    """Padded, since the mask of a static cache without padding is not that of the tokens in transformers itself."""
    model = tiny_model(name, attention="flex_attention")
    ids, mask = tokens(sum(CHUNKS), batch=2), torch.ones(2, sum(CHUNKS), dtype=torch.long)
    mask[0, :3] = 0

    def logits(call: Callable[..., Tensor], cache: object) -> Tensor:
        ends = torch.tensor(CHUNKS).cumsum(0).tolist()
        with torch.no_grad():
            return torch.cat(
                [
                    call(ids[:, end - n : end], past_key_values=cache, attention_mask=mask[:, :end]).logits[:, -1:]
                    for n, end in zip(CHUNKS, ends, strict=True)
                ],
                dim=1,
            )

    cache = StaticCache(model.config, max_cache_len=40) if kind == "static" else DynamicCache(config=model.config)
    ours = logits(torch.compile(model, backend="icw_int8kv", options=EAGER), cache)
    spelled = tiny_model(name, attention="eager")
    reference = reference_cache(model, 40) if kind == "static" else dynamic_reference_cache(model)
    assert relative_distance(ours, logits(spelled, reference)) <= CLOSE_LOGITS
    assert all(isinstance(x, QuantizedKV) for layer in cache.layers for x in (layer.keys, layer.values))
    whole = [graph for graph in graphs() if len(graph.sites) == 4]
    assert whole and not any(graph.skipped for graph in graphs())
    form = "sdpa" if name == "llama" else "eager, softcap + repeat_kv"
    assert {read for graph in whole for site in graph.sites for read in site.reads} == {form}


def capped(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return torch.tanh(score / 2.0) * 2.0 + (kv - q) * (h + 1) * 0.1


def unchanged(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return score


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("score_mod", [capped, unchanged])
@pytest.mark.parametrize("log_sum", [False, True])
def test_spelled_out(score_mod: Callable[..., Tensor], log_sum: bool) -> None:
    query, key, value = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 24)

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (kv <= q + 2) & ((b != 1) | (q != 3))  # one row has no position

    expected, log_sums = flex_attention(
        query,
        key,
        value,
        score_mod,
        create_block_mask(mask_mod, 2, None, 5, 9, device="cpu"),
        scale=0.3,
        enable_gqa=True,
        return_lse=True,
    )
    block_mask = (5, 9, symbolic_trace(mask_mod))
    output, found, _ = spell_out(query, key, value, symbolic_trace(score_mod), block_mask, 0.3, {}, log_sum=log_sum)
    assert relative_distance(output, expected) < 1e-5
    assert (output[1, :, 3] == 0).all()
    if log_sum:
        rows = log_sums.isfinite()
        assert relative_distance(found[rows], log_sums[rows]) < 1e-5 and torch.equal(found.isfinite(), rows)
    else:
        assert found is None


def test_what_is_not_elementwise_is_not_broadcast() -> None:
    def traced(function: Callable[..., Tensor], *examples: Tensor) -> torch.fx.GraphModule:
        module = symbolic_trace(function)
        values = iter(examples)
        environment: dict[torch.fx.Node, Tensor] = {}
        for node in module.graph.nodes:
            if node.op == "placeholder":
                environment[node] = next(values)
            elif node.op == "call_function":
                environment[node] = node.target(*torch.fx.map_arg(node.args, environment.__getitem__))
                node.meta["example_value"] = environment[node]
        return module

    scalar, table = torch.tensor(1), torch.randn(3, 3)
    assert is_elementwise(traced(lambda q, kv: kv <= q + 1, scalar, scalar))
    assert is_elementwise(traced(lambda q, kv, table: table[q, kv] > 0, scalar, scalar, table))
    assert not is_elementwise(traced(lambda q, kv, table: table[q][kv] > 0, scalar, scalar, table))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_more_than_arithmetic_stays_as_it_is() -> None:
    """A mask that looks up a row is no scalar function: the operator is kept, and reads what the cache decodes to."""
    table = torch.rand(12, 12) > 0.3
    table[:, 0] = True

    def step(query: Tensor, keys: Tensor, values: Tensor, new: Tensor, position: Tensor) -> Tensor:
        keys.index_copy_(2, position, new)
        values.index_copy_(2, position, new)
        mask = create_block_mask(lambda b, h, q, kv: table[q][kv], None, None, 1, 12, device="cpu")
        return flex_attention(query, keys, values, block_mask=mask)

    query, keys, values, new = (torch.randn(2, 2, n, 16) for n in (1, 12, 12, 1))
    position = torch.tensor([4])
    ours = [QuantizedKV.quantize(each) for each in (keys, values)]
    floats = [each.dequantize() for each in ours]
    with torch.no_grad():
        expected = step(query, *floats, new, position)
        compiled = torch.compile(step, backend="icw_int8kv", fullgraph=True, options=EAGER)
        with pytest.warns(UnquantizedCacheWarning, match="flex_attention"):
            actual = compiled(query, *ours, new, position)
    assert relative_distance(actual, expected) <= 1e-2
    (graph,) = graphs()
    assert len(graph.sites) == 2 and all("dequantized" in read for site in graph.sites for read in site.reads)
