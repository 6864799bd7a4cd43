"""The prompt pass: masks that are looked at, so that attention reads no more than they show."""

from collections.abc import Callable

import pytest
import torch
from support import CLOSE_LOGITS, compiled, graphs, relative_distance, run, tiny_model, tokens
from torch import Tensor
from transformers import DynamicCache, StaticCache

import icw_compile
from icw_compile.kernels import cpu, prompt
from icw_compile.kernels.inductor import attention
from icw_compile.kernels.interface import FEW_TOKENS
from icw_compile.lab.reference import reference_cache

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason="no C++ compiler")

_ops = torch.ops.icw_int8kv
QUERIES, TOKENS = 300, 340


def causal(offset: int) -> Tensor:
    return torch.arange(TOKENS) <= torch.arange(QUERIES).unsqueeze(-1) + offset


MASKS: dict[str, tuple[Callable[[], Tensor], list[int]]] = {
    "a first prompt": (lambda: causal(0)[None, None], [300, 1]),
    "of a batch": (lambda: causal(0).expand(2, 1, -1, -1), [300, 1]),
    "on a filled cache": (lambda: causal(20)[None, None], [320, 1]),
    "to the end": (lambda: causal(40)[None, None], [340, 1]),
    "padded on the left": (lambda: torch.stack([causal(0), causal(0) & (torch.arange(TOKENS) > 6)])[:, None], [300, 0]),
    "one more": (lambda: (causal(0) | (torch.arange(TOKENS) == 280))[None, None], [300, 0]),
    "one less": (lambda: (causal(0) & ~torch.eye(QUERIES, TOKENS, dtype=torch.bool).roll(-5, 1))[None, None], [300, 0]),
    "one less on a filled cache": (lambda: (causal(20) & (torch.arange(TOKENS) != 3))[None, None], [320, 0]),
    "a window": (lambda: (causal(0) & ~causal(-50))[None, None], [300, 0]),
    "for each head": (lambda: torch.stack([causal(each) for each in range(4)])[None], [303, 0]),
    "nothing": (lambda: torch.zeros(1, 1, QUERIES, TOKENS, dtype=torch.bool), [1, 0]),
}


#: Relative norm: in bfloat16 weights are rounded too.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3}


@pytest.mark.parametrize("many", [1, prompt._MANY])
@pytest.mark.parametrize("is_ours", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", [*MASKS, "no mask"])
def test_equals_attention_with_the_mask(
    name: str, dtype: torch.dtype, is_ours: bool, many: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By our kernel, where it is made for this processor, and by torch's; and of channels that do not lie together."""
    monkeypatch.setattr(prompt, "_MANY", many)
    if not is_ours:
        monkeypatch.setattr(prompt, "_is_ours", lambda *each: False)
    generator = torch.Generator().manual_seed(0)
    rows = QUERIES if name == "no mask" else TOKENS
    query = torch.randn(2, QUERIES, 4, 16, generator=generator).to(dtype).transpose(1, 2)
    key, value = (torch.randn(2, 2, rows, 16, generator=generator).to(dtype) for _ in range(2))
    if name == "no mask":
        mask, found, seen = None, None, causal(0)[:, :rows][None, None]
    else:
        make, extent = MASKS[name]
        seen = mask = make()
        found = _ops.mask_extent(mask)
        assert found.tolist() == extent
    expected = attention(query.float(), key.float(), value.float(), seen, False, 0.3, None)
    scattered = [each.transpose(2, 3).contiguous().transpose(2, 3) for each in (query, key, value)]
    for i in range(8):
        each = [x if i >> at & 1 == 0 else scattered[at] for at, x in enumerate((query, key, value))]
        actual = _ops.prompt_attention(*each, mask, found, 0.3)
        assert (actual - expected).norm() <= TOLERANCE[dtype] * expected.norm()
        assert actual.stride() == query.stride()


def test_registration() -> None:
    query, key = torch.randn(1, 4, 20, 16), torch.randn(1, 2, 24, 16)
    mask = torch.ones(1, 1, 20, 24, dtype=torch.bool).tril()
    torch.library.opcheck(_ops.mask_extent.default, (mask,))
    torch.library.opcheck(_ops.prompt_attention.default, (query, key, key, mask, _ops.mask_extent(mask), 0.25))
    torch.library.opcheck(_ops.prompt_attention.default, (query, key[:, :, :20], key[:, :, :20], None, None, 0.25))


@pytest.mark.parametrize("heads", [1, 4], ids=["shared", "of their own"])
def test_a_prompt_on_a_static_cache(heads: int) -> None:
    model, ids = tiny_model(kv_heads=heads), tokens(60, batch=2)
    chunks = (24, 20, FEW_TOKENS)
    step = compiled(model, **{"icw.attention": "auto"})
    actual = run(step, StaticCache(model.config, max_cache_len=80), ids, chunks)
    assert relative_distance(actual, run(model, reference_cache(model, 80), ids, chunks)) <= CLOSE_LOGITS
    assert [graph.passes["prompt"] for graph in graphs()] == [2, 2, 0]
    mask = torch.ones_like(ids[:, :24])
    mask[0, :9] = 0
    with torch.no_grad():
        actual = step(ids[:, :24], past_key_values=StaticCache(model.config, max_cache_len=80), attention_mask=mask)
        expected = model(ids[:, :24], past_key_values=DynamicCache(config=model.config), attention_mask=mask)
    assert relative_distance(actual.logits[mask.bool()], expected.logits[mask.bool()]) <= 1e-5


@pytest.mark.parametrize(("attention", "extents"), [("auto", 1), ("inductor", 0)])
def test_the_mask_is_looked_at_once_for_all_layers(attention: str, extents: int) -> None:
    model, ids = tiny_model(), tokens(24)
    explained = icw_compile.explain(
        model,
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=StaticCache(model.config, max_cache_len=40),
        options={"icw.compiler": "eager", "icw.attention": attention},
    )
    (graph,) = explained.graphs
    assert graph.rewritten.count("icw_int8kv.mask_extent.default") == extents
    assert graph.rewritten.count("icw_int8kv.prompt_attention.default") == 2 * extents
