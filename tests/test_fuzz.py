"""Random functions of quantized caches, and random models, against float tensors that store what int8 would.

``make test`` runs the same few examples each time. For more of them, and other ones each time::

    ICW_FUZZ_EXAMPLES=2000 pytest tests/test_fuzz.py -m slow -s

A failure prints the smallest function that fails, with its inputs. What is printed at the end gives the same examples
again: ``ICW_FUZZ_SEED``. ``ICW_FUZZ_WITHOUT`` leaves kinds of lines out (`fuzz_programs.WITHOUT`).
"""

import os
import random
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from fuzz_models import Case, cases
from fuzz_programs import Program, programs
from hypothesis import HealthCheck, Phase, event, given, seed, settings
from support import EAGER
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed

import icw_compile
from icw_compile import QuantizedKV

#: Of float32 sums in another order.
CLOSE = 2e-5

FEW = settings(
    max_examples=40,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.generate,),  # it shrinks by itself: see `Program.smallest`
)
#: Functions to compile; 20 times as many are run as they are, and a tenth as many models: about ten minutes.
EXAMPLES = int(os.environ.get("ICW_FUZZ_EXAMPLES", "300"))
MANY = settings(FEW, derandomize=False)
#: Of those that are others each time.
SEED = int(os.environ.get("ICW_FUZZ_SEED", random.randrange(2**32)))


class Wrong(Exception):
    """Another answer than the oracle's."""


def refusal(error: BaseException) -> str | None:
    """The text of one of our own clear errors, or ``None``."""
    cause = getattr(error, "inner_exception", error)
    text = str(cause)
    return text if isinstance(cause, NotImplementedError) and "icw_int8kv" in text else None


def distance(actual: Tensor, expected: Tensor, least: float = 0.0) -> float:
    """Relative to the norm of what is expected, or of as many numbers of the size ``least``."""
    if actual.shape != expected.shape:
        return float("inf")
    difference = (actual.double() - expected.double()).norm()
    size = expected.double().norm().clamp(min=max(1e-6, least * expected.numel() ** 0.5))
    found = (difference / size).item()
    return found if found == found else float("inf")


def one_rounding(expected: Tensor, shift: Tensor, bits: int = 8) -> Tensor:
    """How far one more rounding may move each element: a step of its row."""
    factor, steps = torch.exp2(shift), 127.0 if bits == 8 else 11.0
    plain = expected.abs().amax(-1, keepdim=True) / steps
    return plain.expand_as(expected).maximum((expected / factor).abs().amax(-1, keepdim=True) / steps * factor)


def as_floats(x: Tensor) -> Tensor:
    return x.dequantize() if isinstance(x, QuantizedKV) else x


def check(program: Program, call: Callable[..., Any]) -> str:
    """``"right"``, or ``"refused"`` with one of our clear errors."""
    arguments = program.arguments()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", icw_compile.UnquantizedCacheWarning)
        try:
            returned = call(*arguments.values())
        except (NotImplementedError, BackendCompilerFailed) as error:
            if refusal(error) is None:
                raise
            return "refused"
    if not program.has_caches and any(isinstance(x, QuantizedKV) for x in returned):
        raise Wrong("a function of no cache gives one")
    # What is read of rows may cancel, and then one more rounding is much of it, though not of the rows.
    close, least = (0.15, 0.1 * program.largest) if program.within_one_rounding else (CLOSE, 0.0)
    floats = program.without_rounding().env if program.bits == 4 else None
    for name, actual in zip(program.outputs, returned, strict=True):
        expected = program.env[name]
        if floats is not None:  # some answers hang on less than a step
            close = max(0.5, 4.0 * distance(floats[name], expected, least))
        if name in program.shadows and name not in program.cut and program.within_one_rounding:
            compare_rows(program, name, as_floats(actual))
        elif (found := distance(as_floats(actual), expected, least)) > close:
            raise Wrong(f"output {name} is {found:.3g} off\n{as_floats(actual)}\nexpected\n{expected}")
    for name in program.caches:
        compare_rows(program, name, as_floats(arguments[name]))
    for name, value in program.inputs.items():
        if not torch.equal(arguments[name], program.env[name]):
            raise Wrong(f"input {name} holds another value:\n{arguments[name]}\nexpected\n{program.env[name]}\n{value}")
    return "right"


def compare_rows(program: Program, name: str, actual: Tensor) -> None:
    expected = program.env[name]
    if program.within_one_rounding and expected.dim() > 1 and actual.shape == expected.shape:
        rounding = one_rounding(expected, program.shadows[name], program.bits) if expected.numel() else expected
        bound = 2.02 * rounding
        if not ((actual - expected).abs() <= bound + program.moved(name) + 1e-6).all():
            raise Wrong(f"{name} holds rows that no rounding explains:\n{actual}\nexpected\n{expected}")
    elif (found := distance(actual, expected)) > CLOSE:
        raise Wrong(f"{name} holds other rows, {found:.3g} off:\n{actual}\nexpected\n{expected}")


class Outcomes:
    """How the examples of one test ended, and how long they took."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.started = time.perf_counter()

    def add(self, outcome: str) -> None:
        self.counts[outcome] += 1
        event(outcome)

    def check(self, most_refused: float) -> None:
        """Say so, and fail if more than this share was refused: by us with a clear error, or without us."""
        total = sum(self.counts.values())
        seconds = time.perf_counter() - self.started
        said = ", ".join(f"{count} {outcome}" for outcome, count in sorted(self.counts.items()))
        print(f"\n{total} examples in {seconds:.0f} s: {said}")
        refused = sum(count for outcome, count in self.counts.items() if outcome.startswith("refused"))
        assert refused <= most_refused * total, f"too few were compared: {said}"


def through_the_backend(program: Program) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(
        program.function(), backend="icw_int8kv", fullgraph=True, dynamic=program.dynamic, options=EAGER
    )


def as_it_is(program: Program) -> Callable[..., Any]:
    return program.function()


def check_twice(program: Program, call: Callable[..., Any]) -> str:
    """Once more with new caches, and with caches of another format: for one compiled function as for two."""
    outcome = check(program, call)
    if outcome == "right":
        check(program, call)
        if (other := program.in_other_formats()) is not None:
            check(other, call)
    return outcome


def fails(program: Program, way: Callable[[Program], Callable[..., Any]]) -> Exception | None:
    try:
        check_twice(program, way(program))
    except Exception as error:
        return error
    return None


def seed_of(how: settings) -> Callable[[Any], Any]:
    """What gives a test its examples, where they are others each time; and says so."""
    if how.derandomize:
        return lambda test: test
    print(f"\nICW_FUZZ_SEED={SEED}")
    return seed(SEED)


def fuzz(how: settings, way: Callable[[Program], Callable[..., Any]]) -> None:
    outcomes = Outcomes()

    @seed_of(how)
    @how
    @given(programs())
    def every(program: Program) -> None:
        if way is as_it_is and program.writes_cut_rows:
            return  # a view that cuts rows is documented to be a copy
        try:
            outcome = check_twice(program, way(program))
        except Exception as error:
            if way is through_the_backend and stock_refuses(program):
                outcomes.add("refused by torch.compile itself")
                return
            kind = type(error)
            smallest = program.smallest(lambda other: type(fails(other, way)) is kind)
            raise AssertionError(f"{smallest}\n{fails(smallest, way)}") from error
        outcomes.add(f"{outcome}, one more rounding allowed" if program.within_one_rounding else outcome)

    every()
    outcomes.check(0.2)


def stock_refuses(program: Program) -> bool:
    """Whether torch.compile does not take the function either, on floats."""
    torch._dynamo.reset()
    floats = [as_floats(x) for x in program.arguments().values()]
    try:
        with torch.no_grad():
            torch.compile(program.function(), backend="aot_eager", fullgraph=True, dynamic=program.dynamic)(*floats)
    except Exception:
        return True
    return False


def test_random_functions() -> None:
    fuzz(settings(FEW, max_examples=60), through_the_backend)


def test_random_functions_that_are_not_compiled() -> None:
    fuzz(settings(FEW, max_examples=300), as_it_is)


@pytest.mark.slow
def test_many_random_functions() -> None:
    fuzz(settings(MANY, max_examples=EXAMPLES), through_the_backend)


@pytest.mark.slow
def test_many_random_functions_that_are_not_compiled() -> None:
    fuzz(settings(MANY, max_examples=20 * EXAMPLES), as_it_is)


# Models.

#: Of logits: a number that lies between two steps of int8 may be rounded to either.
CLOSE_LOGITS = 3e-3
CLOSE_ROWS = 1e-2


def check_model(case: Case) -> str:
    """``"right"``, ``"refused"``, or that transformers or torch.compile do not take it themselves."""
    try:
        model = case.model()
        expected = case.expected(model)
        case.run(model, model, stock := replace(case, cache=case.cache.replace("made", "static")).new_cache(model))
        del stock
    except Exception:
        return "refused without us"
    torch._dynamo.reset()
    call = torch.compile(model, backend="icw_int8kv", fullgraph=True, dynamic=case.dynamic, options=case.options())
    with warnings.catch_warnings(), torch._dynamo.config.patch(recompile_limit=64):
        warnings.simplefilter("ignore", icw_compile.UnquantizedCacheWarning)
        try:
            actual = case.run(model, call, case.new_cache(model))
        except (NotImplementedError, BackendCompilerFailed) as error:
            if refusal(error) is None:
                raise
            return "refused"
    steps = sum(isinstance(step, int) for step in case.steps)
    for i, (one, other) in enumerate(zip(actual, expected, strict=True)):
        what = f"logits of call {i}" if i < steps else f"layer {(i - steps) // 2} {('keys', 'values')[(i - steps) % 2]}"
        # A step of 4 bits is 16 times as large.
        closeness = 16.0 if min(case.bits.values()) == 4 else 1.0
        if (found := distance(one, other)) > closeness * (CLOSE_LOGITS if i < steps else CLOSE_ROWS):
            raise Wrong(f"{what}: {found:.3g} off, of shape {tuple(one.shape)} and {tuple(other.shape)}")
    return "right"


def model_fails(case: Case) -> Exception | None:
    try:
        check_model(case)
    except Exception as error:
        return error
    return None


def fuzz_models(how: settings, most_refused: float) -> None:
    outcomes = Outcomes()

    @seed_of(how)
    @how
    @given(cases())
    def every(case: Case) -> None:
        try:
            outcome = check_model(case)
        except Exception as error:
            kind = type(error)
            smallest = case.smallest(lambda other: type(model_fails(other)) is kind)
            raise AssertionError(f"{smallest}\n{model_fails(smallest)}") from error
        outcomes.add(outcome)

    every()
    outcomes.check(most_refused)  # mostly by transformers itself


def test_random_models() -> None:
    fuzz_models(settings(FEW, max_examples=3), 0.5)


#: What was wrong once.
FOUND = (
    Case(outliers=True, recent=4, steps=(24, 1)),
    Case(outliers=True, sinks=2, recent=1, cache="made", kv_heads=2, groups=2, steps=(9, 1, 1)),
)


@pytest.mark.parametrize("case", FOUND, ids=str)
def test_models_that_were_wrong(case: Case) -> None:
    assert check_model(case) == "right"


@pytest.mark.slow
def test_many_random_models() -> None:
    fuzz_models(settings(MANY, max_examples=max(EXAMPLES // 10, 1)), 0.25)
