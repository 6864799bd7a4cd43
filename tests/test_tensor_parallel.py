"""More than one device: each rank stores the keys and values of its heads in int8."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support import run, tiny_model, tokens
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

import icw_compile
from icw_compile.lab.plan import estimated_exchange
from icw_compile.planner import BATCH, RANKS

EXAMPLE = Path(__file__).parent.parent / "examples" / "tensor_parallel.py"
#: Kind of cache -> the share of its bytes that a rank has: of few tokens, the positions of those that are kept in the
#: model's dtype count, which every rank has.
KINDS = {"dynamic": "0.502", "static": "0.505", "prepared": "0.505", "sliding": "0.502", "replicated": "1.000"}

WITHOUT = "torch has no build with torch.distributed here"
debug = pytest.importorskip("torch.distributed.tensor.debug", reason=WITHOUT, exc_type=ImportError)
fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg", reason=WITHOUT, exc_type=ImportError)


@pytest.mark.parametrize(
    "kinds", [("dynamic", "prepared", "replicated"), pytest.param(tuple(KINDS), marks=pytest.mark.slow)]
)
def test_example_on_two_ranks(kinds: tuple[str, ...]) -> None:
    """One head of keys and values for each rank, or for both; the example checks distance, bytes and graphs itself."""
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *ranks, str(EXAMPLE), *kinds]
    environment = os.environ | {"ICW_COMPILER": "eager", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = re.findall(r"rank (\d) of 2: (\w+) cache, int8 in every layer, (\S+) of the bytes", done.stdout)
    assert sorted(lines) == sorted((rank, *each) for rank in "01" for each in KINDS.items() if each[0] in kinds)
    assert "UnquantizedCacheWarning" not in done.stderr


@pytest.fixture
def first_of_two_ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As far as shapes go: what would come from the other rank is not there."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    dist.init_process_group("fake", store=fake.FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def split(folder: Path, kv_heads: int) -> PreTrainedModel:
    tiny_model(kv_heads=kv_heads).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto").eval()


@pytest.mark.usefixtures("first_of_two_ranks")
def test_fewer_heads_than_ranks(tmp_path: Path) -> None:
    """A plan that splits them gives each rank half of a head: transformers itself cannot do that, compiled or not."""
    model = split(tmp_path, kv_heads=1)
    compiled = [torch.compile(model, backend=name) for name in ("eager", "icw_int8kv")]
    for each in (model, *compiled):
        with pytest.raises(RuntimeError, match="invalid for input of size"):
            run(each, DynamicCache(config=model.config), tokens(4), (4,))
    with pytest.raises(ValueError, match="1 heads of keys and values cannot be split evenly over 2 ranks"):
        icw_compile.static_cache(model, 1, 8)


@pytest.mark.usefixtures("first_of_two_ranks")
def test_what_is_exchanged(tmp_path: Path) -> None:
    """The planner counts as often as the model does; the other sizes of a step do not matter to it."""
    model = split(tmp_path, kv_heads=2)
    with debug.CommDebugMode() as exchanged:
        run(model, DynamicCache(config=model.config), tokens(1, batch=3), (1,))
    times, sent = estimated_exchange(model, torch.float32)
    assert exchanged.get_total_counts() == times == 2 * 2 + 2
    hidden, vocabulary = model.config.hidden_size, model.config.vocab_size
    # A ring of two sends half of each sum twice, that of the embeddings included, and half of the logits once.
    assert sent.subs({BATCH: 3, RANKS: 2}) == 3 * 4 * (2 * (2 * 2 + 1) * hidden + vocabulary) // 2
