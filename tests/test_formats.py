"""Formats: what all of them have to do."""

import inspect

import pytest

from icw_compile.formats.base import Format, Wrapper
from icw_compile.formats.equalized import Equalized
from icw_compile.formats.kept import KeepsRows


def methods(of: type) -> set[str]:
    return {name for name, value in vars(of).items() if inspect.isfunction(value) and not name.startswith("_")}


def test_a_wrapper_passes_every_question_on() -> None:
    # It makes what it adds; `is_empty` asks `written`.
    assert methods(Format) - methods(Wrapper) == {"empty", "is_empty"}


@pytest.mark.parametrize("wrapper", [Equalized, KeepsRows])
@pytest.mark.parametrize("name", sorted(methods(Format)))
def test_what_a_wrapper_answers_itself_includes_what_it_wraps(wrapper: type, name: str) -> None:
    answer = vars(wrapper).get(name)
    if answer is not None:
        assert "super()" in (source := inspect.getsource(answer)) or "self.wrapped" in source, name
