"""More than one device: each rank stores the keys and values of its heads in int8."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).parent.parent / "examples" / "tensor_parallel.py"
KINDS = ("dynamic", "static", "prepared", "sliding")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no build with torch.distributed here")
def test_example_on_two_ranks() -> None:
    """One head of keys and values for each rank; the example checks distance, bytes and graphs itself."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(EXAMPLE)]
    environment = os.environ | {"ICW_COMPILER": "eager", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = re.findall(r"rank (\d) of 2: (\w+) cache, int8 in every layer, (\S+) of the bytes", done.stdout)
    assert sorted(lines) == sorted((rank, kind, "0.500") for rank in "01" for kind in KINDS)
    assert "UnquantizedCacheWarning" not in done.stderr
