from collections.abc import Iterator

import pytest
import torch

import icw_compile


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    """No test sees what another one compiled."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    icw_compile.reset_report()
    yield
