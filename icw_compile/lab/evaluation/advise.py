"""``icw-compile eval --advise``: where 4 bits hurt, layer by layer, and the cheapest options within a budget.

Keys and values of each layer are stored in 4 bits alone, in plain torch, everything else in float; what that changes is
taken to add up, to a share that every setting which is measured corrects. Settings that are within the budget by that
are measured as the backend runs them, from the cheapest on, until one is within it.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table
from transformers import PreTrainedModel

from icw_compile.compat.dynamo import recompile_limit
from icw_compile.formats import RECENT_TOKENS
from icw_compile.lab.bench.measure import environment
from icw_compile.lab.evaluation.command import Prepared, Settings, prepare
from icw_compile.lab.evaluation.contenders import Contender, contenders
from icw_compile.lab.evaluation.quality import measure
from icw_compile.lab.reference import reference_cache
from icw_compile.lab.terminal import Say, answers, progress, teller
from icw_compile.planner import plan

__all__ = ["Advice", "Candidate", "Try", "alone_table", "candidates", "run_advise", "tries_table"]

#: Option -> the parts of a layer that it stores in 4 bits.
PARTS = {"icw.bits": ("keys", "values"), "icw.value_bits": ("values",), "icw.key_bits": ("keys",)}
#: What is expected to be so far over the budget is measured as well.
MARGIN = 1.1
#: How many contenders are measured at a time: each has a cache of its own.
TOGETHER = 8


class Candidate(NamedTuple):
    """Options of the backend, bytes of a static cache over the float one, and the divergence that 4 bits add to 8."""

    options: dict[str, Any]
    bytes_ratio: float
    harm: float


@dataclass(frozen=True)
class Try:
    """One setting.

    Attributes:
        options: of the backend.
        bytes_ratio: of a static cache of a window, over the float one.
        expected: mean KL divergence from the float cache, in nats, by adding up.
        measured: the same, as measured.
    """

    options: dict[str, Any]
    bytes_ratio: float
    expected: float
    measured: float


@dataclass(frozen=True)
class Advice:
    """What was found.

    Attributes:
        budget: mean KL divergence, in nats.
        alone: part -> that divergence with this part of each layer in 4 bits, layer by layer.
        tries: what was measured: 8 bits, all in 4 bits, then from the cheapest on.
    """

    budget: float
    alone: Mapping[str, Sequence[float]]
    tries: Sequence[Try]

    @property
    def chosen(self) -> Try | None:
        """The cheapest one within the budget; ``None``: not even 8 bits are."""
        within = [each for each in self.tries if each.measured <= self.budget]
        return min(within, key=lambda each: each.bytes_ratio, default=None)


def run_advise(settings: Settings, budget: float, *, json_file: Path | None) -> Advice:
    """Measure, print, and write what is asked for.

    Raises:
        ValueError: settings that do not fit one another, the text or the model.
    """
    if settings.options or settings.hard or settings.recall or settings.codes:
        raise ValueError("--advise chooses options for the model as it is: no --option, --hard, --recall or --code")
    console = answers(150)
    ready = prepare(settings, console)
    with progress() as bar:

        def measured(what: str, rows: Sequence[Contender]) -> list[float]:
            task = bar.add_task(what, total=ready.windows.steps)
            found = _divergences(ready, rows, teller(bar, task, what))
            bar.remove_task(task)
            return found

        alone = _each_alone(ready.model, measured)
        console.print(alone_table(alone))
        tries = _try_out(ready, alone, budget, measured)
    advice = Advice(budget, alone, tries)
    console.print(tries_table(advice))
    if (chosen := advice.chosen) is None:
        console.print(f"No setting is within {budget:g}, not even 8 bits.")
    else:
        console.print(f"options={json.dumps(chosen.options)}", markup=False, highlight=False)
    if json_file is not None:
        about = environment(ready.model.device)
        data = {**about, "settings": asdict(settings), **asdict(advice), "chosen": chosen and asdict(chosen)}
        json_file.write_text(json.dumps(data, indent=1, default=str) + "\n")
    return advice


Measure = Callable[[str, Sequence[Contender]], list[float]]


def _divergences(ready: Prepared, rows: Sequence[Contender], say: Say) -> list[float]:
    reference = contenders(ready.model, [], others=False)
    with recompile_limit(64, fail=True):
        found = measure([*reference, *rows], ready.windows, ready.model.device, say)
    return [each.total.kl_mean for each in found[len(reference) :]]


def _each_alone(model: PreTrainedModel, measured: Measure) -> dict[str, list[float]]:
    layers = model.config.get_text_config(decoder=True).num_hidden_layers

    def row(part: str, layer: int) -> Contender:
        stored = {layer: (part,)}
        return Contender(
            f"{part} of layer {layer}",
            model,
            lambda length: reference_cache(
                model, length, stored, key_bits=4, value_bits=4, recent_tokens=RECENT_TOKENS[4]
            ),
        )

    rows = [row(part, layer) for part in ("keys", "values") for layer in range(layers)]
    found: list[float] = []
    for start in range(0, len(rows), TOGETHER):
        group = rows[start : start + TOGETHER]
        found += measured(f"{group[0].name} to {group[-1].name}, alone in 4 bits", group)
    return {"keys": found[:layers], "values": found[layers:]}


def candidates(model: PreTrainedModel, alone: Mapping[str, Sequence[float]], context: int) -> list[Candidate]:
    """What the options can say, from the cheapest on: some parts in 4 bits, but in the layers where that hurts most.

    Nothing that takes as many bytes as 8 bits: at a short context the tokens that 4 bits keep besides do.
    """
    in_eight_bits, found = plan(model, cache="static").evaluate(tokens=context).bytes, []
    for option, parts in PARTS.items():
        harm = [sum(of) for of in zip(*(alone[part] for part in parts), strict=True)]
        worst = sorted(range(len(harm)), key=lambda layer: -harm[layer])
        for count in range(len(harm)):
            options: dict[str, Any] = {option: 4}
            if count:
                options["icw.eight_bit_layers"] = sorted(worst[:count])
            bytes_ = plan(model, options, cache="static").evaluate(tokens=context)
            added = sum(harm[layer] for layer in worst[count:])
            if bytes_.bytes < in_eight_bits:
                found.append(Candidate(options, bytes_.bytes / bytes_.float_bytes, added))
    return sorted(found, key=lambda each: (each.bytes_ratio, each.harm))


def _try_out(ready: Prepared, alone: Mapping[str, Sequence[float]], budget: float, measured: Measure) -> list[Try]:
    """8 bits, 4 bits, and settings between them from the cheapest on, up to the first one within the budget."""

    def run(options: dict[str, Any]) -> float:
        torch.compiler.reset()
        _, row = contenders(ready.model, [options], others=False)
        return measured(json.dumps(options) if options else "8 bits", [row])[0]

    bytes_ = plan(ready.model, cache="static").evaluate(tokens=ready.windows.context)
    in_eight_bits = run({})
    tries = [Try({}, bytes_.bytes / bytes_.float_bytes, in_eight_bits, in_eight_bits)]
    if in_eight_bits > budget:
        return tries
    share = 1.0
    for options, bytes_ratio, harm in candidates(ready.model, alone, ready.windows.context):
        expected = in_eight_bits + share * harm
        if len(tries) > 1 and expected > MARGIN * budget:
            continue
        tries.append(Try(options, bytes_ratio, expected, run(options)))
        if tries[-1].measured <= budget:
            break
        share = max(tries[-1].measured - in_eight_bits, 0.0) / harm if harm else share
    return tries


def alone_table(alone: Mapping[str, Sequence[float]]) -> Table:
    table = Table("layer", *alone, title="mean KL divergence with one part of one layer in 4 bits")
    for layer, found in enumerate(zip(*alone.values(), strict=True)):
        table.add_row(f"{layer}", *(f"{each:.2e}" for each in found))
    return table


def tries_table(advice: Advice) -> Table:
    table = Table(
        "options",
        "bytes",
        "KL expected",
        "KL measured",
        title=f"settings, for a mean KL divergence of {advice.budget:g}",
    )
    for each in advice.tries:
        said = json.dumps(each.options) if each.options else "none (8 bits)"
        style = "bold" if each is advice.chosen else None
        table.add_row(said, f"{each.bytes_ratio:.3f}x", f"{each.expected:.2e}", f"{each.measured:.2e}", style=style)
    return table
