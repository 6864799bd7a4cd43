"""What people do with a model besides `generate` on one prompt, as they report it of other caches."""

import copy
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from support import CLOSE_LOGITS, EAGER, graphs, relative_distance, run, tiny_model, tokens
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.utils._pytree import tree_leaves
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoTokenizer,
    ContinuousBatchingConfig,
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    PreTrainedModel,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
    pipeline,
)
from transformers.masking_utils import eager_mask

from icw_compile import QuantizedKV, UnquantizedCacheWarning
from icw_compile.lab.assets import MODEL
from icw_compile.lab.reference import (
    dynamic_reference_cache,
    quantize_dequantize,
    reference_cache,
    store_quantized,
)


def pair(name: str = "llama", **overrides: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A compiled model, and the same one uncompiled."""
    model = tiny_model(name, **overrides)
    plain = copy.deepcopy(model)
    model.compile(backend="icw_int8kv", options=EAGER)
    return model, plain


def generate(model: PreTrainedModel, ids: Tensor, **settings: Any) -> Any:
    usual = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(ids, **{**usual, "disable_compile": True, **settings})


def distance(actual: Any, expected: Any) -> float:
    return relative_distance(torch.stack(actual.logits), torch.stack(expected.logits))


def is_int8(cache: Any) -> bool:
    held = [part for layer in cache.layers for part in (layer.keys, layer.values)]
    return bool(held) and all(isinstance(part, QuantizedKV) for part in held)


@contextmanager
def warned(count: int, text: str) -> Iterator[None]:
    """So many warnings of ours in this block, and the text in each."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    said = [str(each.message) for each in caught if each.category is UnquantizedCacheWarning]
    assert len(said) == count and all(text in each for each in said), said


def test_static_cache_of_an_encoder_and_a_decoder_used_again() -> None:
    """The second input is answered from its own encoder states."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    config = T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0)
    plain = T5ForConditionalGeneration(config).eval()
    model = copy.deepcopy(plain)
    model.compile(backend="icw_int8kv", options=EAGER)
    parts = [[StaticCache(config, max_cache_len=length) for length in (16, 8)] for _ in range(2)]
    for part in parts[1]:
        store_quantized(part)
    cache, reference = (EncoderDecoderCache(*each) for each in parts)
    for seed in (1, 7):
        ids = tokens(8, batch=2, seed=seed)
        actual, expected = generate(model, ids, past_key_values=cache), generate(plain, ids, past_key_values=reference)
        assert distance(actual, expected) <= CLOSE_LOGITS
        assert all(map(is_int8, parts[0]))
        cache.reset(), reference.reset()


def einsum_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any
) -> Any:
    key, value = (each.repeat_interleave(query.shape[1] // key.shape[1], 1) for each in (key, value))
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * scaling
    weights = (scores if mask is None else scores + mask[..., : key.shape[-2]]).softmax(-1)
    return torch.einsum("bhqk,bhkd->bqhd", weights, value).contiguous(), None


AttentionInterface.register("einsum", einsum_attention)
AttentionMaskInterface.register("einsum", eager_mask)


def test_attention_of_ones_own() -> None:
    """int8, read through a dequantized copy, and said."""
    model, plain = pair(attention="einsum")
    ids = tokens(9, batch=2)
    with warned(1, "einsum"):
        actual = generate(model, ids)
    assert distance(actual, generate(plain, ids, past_key_values=dynamic_reference_cache(plain))) <= CLOSE_LOGITS
    assert is_int8(actual.past_key_values)


@pytest.mark.parametrize("chunk", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_prompt_in_small_pieces(chunk: int) -> None:
    model, plain = pair("qwen2")
    ids, settings = tokens(8, batch=2), {"prefill_chunk_size": chunk}
    actual = generate(model, ids, **settings)
    assert (
        distance(actual, generate(plain, ids, past_key_values=dynamic_reference_cache(plain), **settings))
        <= CLOSE_LOGITS
    )
    assert is_int8(actual.past_key_values)


def test_guidance() -> None:
    """A second cache, of the unconditional prompt, begins with a single token."""
    model, plain = pair()
    ids = tokens(9)
    actual, expected = (generate(each, ids, guidance_scale=1.5) for each in (model, plain))
    assert is_int8(actual.past_key_values)
    assert 0 < distance(actual, expected) <= 2e-2, "the reference is a float cache"


@pytest.mark.parametrize("settings", [{"use_cache": False}, {}], ids=["no cache", "as it comes"])
def test_generate_and_train_in_turn(settings: dict[str, Any]) -> None:
    model, plain = pair()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    ids, counts = tokens(10, batch=2), []
    with warned(0 if settings else 1, "use_cache=False"):
        for _ in range(3):
            plain.load_state_dict(model.state_dict())
            rollout = generate(model.eval(), ids)
            expected = generate(plain.eval(), ids, past_key_values=dynamic_reference_cache(plain))
            assert is_int8(rollout.past_key_values)
            assert torch.equal(rollout.sequences, expected.sequences) and distance(rollout, expected) <= CLOSE_LOGITS
            for each in (model, plain):
                each.zero_grad()
                each.train()(rollout.sequences, labels=rollout.sequences, **settings).loss.backward()
            for actual, wanted in zip(model.parameters(), plain.parameters(), strict=True):
                assert actual.grad is not None and relative_distance(actual.grad, wanted.grad) <= 1e-5
            optimizer.step()
            counts.append(len(graphs()))
    assert counts[0] == counts[-1], "no graph more in later rounds"


def test_gradient_checkpointing() -> None:
    model, plain = pair()
    ids = tokens(10, batch=2)
    for each in (model, plain):
        each.train().gradient_checkpointing_enable()
        each(ids, labels=ids).loss.backward()
    for actual, wanted in zip(model.parameters(), plain.parameters(), strict=True):
        assert actual.grad is not None and relative_distance(actual.grad, wanted.grad) <= 1e-5


@pytest.mark.slow
def test_continuous_batching() -> None:
    model, plain = pair()
    prompts = [list(range(3, 3 + length)) for length in (5, 9)]
    settings = {
        "generation_config": GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0),
        # Else it takes most of the machine's memory.
        "continuous_batching_config": ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32),
    }
    expected = plain.generate_batch(prompts, **settings)
    with warned(1, "paged cache"):
        for _ in range(2):
            actual = model.generate_batch(prompts, **settings)
            answers = [[result.generated_tokens for result in each.values()] for each in (actual, expected)]
            assert answers[0] == answers[1] and all(len(answer) == 4 for answer in answers[0])


def test_threads() -> None:
    """One compiled model, several callers: each has its own cache and its own answer."""
    model, plain = pair()
    for length in (5, 7):
        generate(model, tokens(length))
    found: dict[int, Any] = {}

    def call(seed: int) -> None:
        found[seed] = generate(model, tokens(6 + seed, seed=seed))

    callers = [threading.Thread(target=call, args=(seed,)) for seed in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for seed in range(4):
        expected = generate(plain, tokens(6 + seed, seed=seed), past_key_values=dynamic_reference_cache(plain))
        assert (
            torch.equal(found[seed].sequences, expected.sequences) and distance(found[seed], expected) <= CLOSE_LOGITS
        )
        assert is_int8(found[seed].past_key_values)


def ragged(query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, position: Tensor) -> Tensor:
    """Sequences of different lengths in one buffer: each row of the batch is written where it ends."""
    rows = torch.arange(query.shape[0])
    keys[rows, :, position] = key
    values[rows, :, position] = value
    mask = (torch.arange(keys.shape[2])[None] <= position[:, None])[:, None, None]
    return sdpa(query, keys, values, attn_mask=mask)


@pytest.mark.parametrize("equalize", [False, True])
def test_ragged_slots(equalize: bool) -> None:
    """Only new rows are quantized; with shifted channels the whole cache is written at each step, which is said."""
    compiled = torch.compile(ragged, backend="icw_int8kv", options=EAGER)
    stored = [QuantizedKV.zeros((4, 2, 64, 32), torch.float32, equalize=equalize) for _ in range(2)]
    floats = [torch.zeros(4, 2, 64, 32) for _ in range(2)]
    position = torch.tensor([3, 9, 1, 30])
    generator = torch.Generator().manual_seed(0)
    with warned(int(equalize), "aten.index_put_"), torch.no_grad():
        for step in range(12):
            query = torch.randn(4, 2, 1, 32, generator=generator)
            new = torch.randn(2, 4, 2, 32, generator=generator)
            actual = compiled(query, *new, *stored, position + step)
            expected = ragged(query, *quantize_dequantize(new), *floats, position + step)
            assert relative_distance(actual, expected) <= 1e-5
    assert torch.equal(stored[0].dequantize(), floats[0]), "what was written first is as it was"


def test_hooks_of_ones_own() -> None:
    """They run at each call, end the graph where they are, and every layer is int8 all the same."""
    model, plain = pair(num_hidden_layers=3)
    seen = []

    @torch.compiler.disable
    def note(module: Any, args: Any, output: Tensor) -> None:
        seen.append(output.shape[1])

    for layer in model.model.layers:
        layer.mlp.register_forward_hook(note)
        layer.self_attn.k_proj.register_forward_hook(note)
    ids = tokens(9, batch=2)
    actual = generate(model, ids, max_new_tokens=4)
    expected = generate(plain, ids, max_new_tokens=4, past_key_values=dynamic_reference_cache(plain))
    assert torch.equal(actual.sequences, expected.sequences) and distance(actual, expected) <= 1e-4
    assert is_int8(actual.past_key_values)
    assert sorted(seen) == [1] * 18 + [9] * 6


@pytest.mark.slow
def test_freezing() -> None:
    """As ``TORCHINDUCTOR_FREEZING=1`` sets it for a whole process."""
    plain = tiny_model(dtype=torch.bfloat16, num_hidden_layers=1)
    model, ids, chunks = copy.deepcopy(plain), tokens(12), (9, 1, 2)
    cache = StaticCache(model.config, max_cache_len=16)
    with torch._inductor.config.patch(freezing=True):
        actual = run(torch.compile(model, backend="icw_int8kv"), cache, ids, chunks)
    assert relative_distance(actual, run(plain, reference_cache(plain, 16), ids, chunks)) <= 2e-2
    assert is_int8(cache)


def test_export() -> None:
    """Right, or an error; never an empty array, or one of something else."""
    model, _ = pair()
    keys = generate(model, tokens(8)).past_key_values.layers[0].keys
    values = keys.dequantize()
    assert type(values) is Tensor and values.abs().max() > 0
    for right in (
        load(save({"keys": values}))["keys"],
        torch.from_numpy(values.numpy()),
        torch.tensor(keys.tolist()),
        tree_leaves(keys)[0].dequantize(),
        keys.cpu().contiguous().clone().dequantize(),
    ):
        assert torch.equal(right, values)
    for refused in (
        lambda: save({"keys": keys}),
        lambda: keys.numpy(),
        lambda: keys.numpy(force=True),
        lambda: np.asarray(keys),
        lambda: torch.frombuffer(keys.untyped_storage(), dtype=keys.dtype),
        lambda: torch.from_dlpack(keys),
        lambda: np.from_dlpack(keys),
    ):
        with pytest.raises((RuntimeError, TypeError, ValueError, BufferError)):
            refused()


def test_pipeline() -> None:
    """It calls ``generate`` of the model that it was given, or that it has: compiled in place, before or after."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    plain = tiny_model(num_hidden_layers=1, vocab_size=len(tokenizer))
    asked = {"max_new_tokens": 4, "do_sample": False, "disable_compile": True}
    expected = plain.generate(
        **tokenizer("And he said", return_tensors="pt", return_token_type_ids=False),
        past_key_values=dynamic_reference_cache(plain), max_new_tokens=4, do_sample=False,
    )  # fmt: skip
    model = copy.deepcopy(plain)
    answers = pipeline("text-generation", model=model, tokenizer=tokenizer)
    answers.model.compile(backend="icw_int8kv", options=EAGER)
    (found,) = answers("And he said", return_tensors=True, **asked)
    assert torch.equal(torch.as_tensor(found["generated_token_ids"]), expected[0])
    assert graphs() and all(len(graph.sites) == 2 and not graph.skipped for graph in graphs())


def test_sequences_leave_the_batch() -> None:
    model, plain = pair()
    ids = tokens(16, batch=4)
    cache, reference = DynamicCache(config=model.config), dynamic_reference_cache(plain)
    for each, held in ((model, cache), (plain, reference)):
        run(each, held, ids, (16,))
        held.batch_select_indices(torch.tensor([0, 2]))
        run(each, held, ids[:2], (1,))
        held.crop(-5)
        held.batch_repeat_interleave(3)
        held.reorder_cache(torch.tensor([5, 0, 3, 3, 1, 2]))
    again = ids[:1, :3].repeat(6, 1)
    assert relative_distance(run(model, cache, again, (3,)), run(plain, reference, again, (3,))) <= CLOSE_LOGITS
    assert is_int8(cache) and cache.layers[0].keys.shape[2] == 15
