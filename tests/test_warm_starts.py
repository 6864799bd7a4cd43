"""What one process compiles another one finds, and only what is the same."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from support import CLOSE_LOGITS, EAGER, relative_distance, run, start, tiny_model, tokens
from torch import Tensor
from transformers import StaticCache

from icw_compile.lab.bench.measure import in_own_process

OTHER_OPTIONS = {"icw.keys": "plain", "icw.values": "plain"}


@pytest.mark.slow
@pytest.mark.keeps_recent
def test_only_what_is_the_same_is_found(tmp_path: Path) -> None:
    """Started twice at once, once more, with other options, as another version, and with every file cut in half."""
    expected, differently = (expected_logits(options) for options in ({}, OTHER_OPTIONS))

    def found(expected: Tensor, options: dict[str, Any], version: str = "") -> int:
        """How many of its two graphs a process of its own finds."""
        logits, graphs = in_own_process(start, str(tmp_path), options, version)
        assert relative_distance(torch.tensor(logits), expected) < CLOSE_LOGITS
        return graphs

    with ThreadPoolExecutor() as pool:
        assert all(graphs <= 2 for graphs in pool.map(found, [expected] * 2, [{}] * 2))
    assert found(expected, {}) == 2
    assert found(differently, OTHER_OPTIONS) == 0
    assert found(expected, {}, "icw-compile 0.0.1 of last year") == 0
    files = [file for room in ("aotautograd", "fxgraph") for file in (tmp_path / room).rglob("*") if file.is_file()]
    assert len(files) >= 4
    for file in files:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert found(expected, {}) == 0


def expected_logits(options: dict[str, Any]) -> Tensor:
    """Of the rewritten graphs as they are."""
    model = tiny_model(num_hidden_layers=3)
    ours = torch.compile(model, backend="icw_int8kv", options={**options, **EAGER})
    return run(ours, StaticCache(model.config, max_cache_len=16), tokens(6), (5, 1)).flatten()
