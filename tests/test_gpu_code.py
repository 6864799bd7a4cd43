"""Inductor's code for a GPU, made on a machine without one, and, where there is one, what it computes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import graphs, relative_distance, run, tiny_model, tokens
from transformers import DynamicCache, StaticCache

from icw_compile import QuantizedKV
from icw_compile.lab.reference import dynamic_reference_cache

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: see below")
@pytest.mark.parametrize(
    ("kind", "attention", "bits"),
    [
        pytest.param("dynamic", "triton", "8", marks=pytest.mark.slow),
        ("dynamic", "triton", "4"),  # which keeps rows
        pytest.param("window", "triton", "8", marks=pytest.mark.slow),  # a full one, static
        pytest.param("window", "triton", "4", marks=pytest.mark.slow),
        pytest.param("dynamic", "inductor", "8", marks=pytest.mark.slow),
        pytest.param("static", "inductor", "8", marks=pytest.mark.slow),
        pytest.param("static", "triton", "8", marks=pytest.mark.slow),
        pytest.param("static", "inductor", "4", marks=pytest.mark.slow),
    ],
)
def test_compiles_for_a_gpu(
    kind: str, attention: str, bits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompt and decode, with lengths that are symbols, through Inductor's Triton code to machine code."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    script = Path(__file__).with_name("gpu_code.py")
    process = subprocess.run(
        [sys.executable, script, kind, attention, bits], capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr[-3000:]
    prompt, decode = json.loads(process.stdout.splitlines()[-1])
    assert prompt["kernels"] and decode["kernels"] and decode["stored"]
    assert (prompt["turns"], decode["turns"]) == (False, kind == "window")
    layers = 1 if bits == "8" else 2
    assert (prompt["attention"], decode["attention"]) == (0, layers * (attention == "triton"))
    # The Triton kernel reads kept rows itself.
    assert (prompt["merges"], decode["merges"]) == (0, 4 * layers * (attention == "inductor" and bits == "4"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("attention", ["inductor", "auto"])
@pytest.mark.parametrize("kind", ["dynamic", "static", "window"])
def test_decode_on_a_gpu(kind: str, attention: str) -> None:
    model = tiny_model("mistral" if kind == "window" else "llama", dtype=torch.bfloat16).cuda()
    chunks = (20, *(1,) * 8)
    ids = tokens(sum(chunks), batch=2).cuda()
    cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=64)
    step = torch.compile(model, backend="icw_int8kv", fullgraph=True, options={"icw.attention": attention})
    actual = run(step, cache, ids, chunks)
    assert relative_distance(actual, run(model, dynamic_reference_cache(model), ids, chunks)) <= 2e-2
    assert len(graphs()) == 2 and isinstance(cache.layers[0].keys, QuantizedKV)
