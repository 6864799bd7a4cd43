import os
from collections.abc import Iterator

import pytest
import torch

# Without a GPU, Triton's kernels run in its interpreter. That is decided where Triton is imported, as by icw_compile.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import icw_compile


def pytest_configure(config: pytest.Config) -> None:
    # Not in pyproject.toml, whose filters are resolved, and import the package, before this file is.
    config.addinivalue_line("filterwarnings", "error::icw_compile.UnquantizedCacheWarning")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    """No test sees what another one compiled."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    icw_compile.reset_report()
    yield
