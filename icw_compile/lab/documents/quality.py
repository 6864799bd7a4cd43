"""Regions of quality, from what ``icw-compile eval`` wrote."""

from collections.abc import Iterable, Mapping
from typing import Any

from icw_compile.lab.documents.page import Region, details, grid, markdown_table, restore, sentence
from icw_compile.lab.evaluation.advise import Advice, Try, alone_table, tries_table
from icw_compile.lab.evaluation.codes import CODES
from icw_compile.lab.evaluation.command import AS_IT_IS, Case, position_table, quality_table, recall_table
from icw_compile.lab.evaluation.contenders import FLOAT, FLOAT_COMPILED, HQQ, HQQ_4, QUANTO_4
from icw_compile.lab.evaluation.quality import Bucket, Quality

__all__ = ["REGIONS"]

RESULTS = "icw_compile/lab/evaluation/results/"
# A row is that of the first file that has it.
LLAMA = tuple(f"{RESULTS}kjv-llama-2m-bfloat16{part}.json" for part in ("-ours", "", "-values"))
QWEN2 = tuple(f"{RESULTS}kjv-qwen2-2m-bfloat16{part}.json" for part in ("-ours", ""))
# In "bits" and "others" 4 bits keep none of the last tokens besides.
BITS = tuple(f"{RESULTS}kjv-{name}-2m-bfloat16-bits.json" for name in ("llama", "qwen2"))
OTHERS = tuple(f"{RESULTS}kjv-{name}-2m-bfloat16-others.json" for name in ("llama", "qwen2"))
FOUR = tuple(f"{RESULTS}kjv-{name}-2m-bfloat16-four.json" for name in ("llama", "qwen2"))
ADVICE = tuple(f"{RESULTS}kjv-{name}-2m-bfloat16-advice.json" for name in ("llama", "qwen2"))
SINGLE = tuple(f"{RESULTS}kjv-llama-2m-{dtype}-single.json" for dtype in ("bfloat16", "float32"))

OURS, PLAIN = "icw_int8kv", "icw_int8kv icw.keys=plain icw.values=plain"
ALONE = "icw_int8kv icw.recent_tokens=0"
VALUES_IN_4, IN_4 = "icw_int8kv icw.value_bits=4", "icw_int8kv icw.bits=4"
FP8 = "fp8 per tensor"
#: Contender -> what a column is called.
COLUMNS = {
    OURS: "**int8**",
    ALONE: "int8, none in float",
    PLAIN: "int8, plain",
    HQQ: "HQQ, 8 bit",
    FP8: "fp8 per tensor",
    FLOAT_COMPILED: "float, compiled",
}
QUANTIZED = (OURS, ALONE, PLAIN, HQQ, FP8)

Data = Mapping[str, Any]


def merged(*files: Data) -> list[Case]:
    """The cases of one model, of which each file may have some, and some rows of each."""
    cases: dict[str, Case] = {}
    for file in files:
        for data in file["cases"]:
            rows = {
                name: restore(
                    Quality,
                    row,
                    total=restore(Bucket, row["total"]),
                    buckets=[restore(Bucket, bucket) for bucket in row["buckets"]],
                )
                for name, row in data["rows"].items()
            }
            case = cases.setdefault(data["name"], restore(Case, data, rows={}))
            case.rows.update({name: row for name, row in rows.items() if name not in case.rows})
            case.recall.update(data["recall"])
    order = (FLOAT, *COLUMNS)
    for case in cases.values():
        case.rows = {name: case.rows[name] for name in sorted(case.rows, key=lambda name: (*order, name).index(name))}
    return list(cases.values())


def _cell(quality: Quality) -> str:
    return f"{quality.total.perplexity_ratio:.4f}, {_small(quality.total.kl_mean)}"


def _small(number: float) -> str:
    """``1.2e-4``."""
    mantissa, exponent = f"{number:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _scored(file: Data) -> str:
    settings = file["settings"]
    return (
        f"{settings['dtype']}, windows of {settings['context']:,} tokens of which the last {settings['stride']:,} are "
        f"scored, {settings['tokens']:,} scored tokens"
    )


def summary(*files: Data) -> str:
    """A row for each case, a column for each contender."""
    rows = [(case.name, *(_cell(case.rows[name]) for name in COLUMNS)) for case in merged(*files)]
    header = (f"`{files[0]['settings']['model']}`", *COLUMNS.values())
    return f"{sentence(_scored(files[0]))}:\n\n{grid(header, rows)}"


def full(*files: Data) -> str:
    """What the command prints, folded away."""
    cases = merged(*files)
    tables = [markdown_table(quality_table(cases)), markdown_table(position_table(cases))]
    return details("every contender, with 99 % quantiles, bytes and positions", *tables)


def notes(*files: Data) -> str:
    """What the tables of a model say in short."""
    cases = merged(*files)
    model, rows = files[0]["settings"]["model"], next(case.rows for case in cases if case.name == AS_IT_IS)
    changed = {name: f"{1 - rows[name].total.top1_agreement:.2%}" for name in (*QUANTIZED, FLOAT_COMPILED)}
    closest = [min(QUANTIZED, key=lambda name, case=case: case.rows[name].total.kl_mean) for case in cases]  # type: ignore[misc]
    largest = max(case.rows[OURS].total.kl_mean / case.rows[FLOAT_COMPILED].total.kl_mean for case in cases)
    apart = max(case.equivalence or 0.0 for case in cases)
    within = max(abs(case.rows[OURS].total.perplexity_ratio - 1) for case in cases)
    return (
        f"`{model}`: over all {len(cases)} rows the perplexity of int8 is within {within:.2%} of the float cache's. "
        f"The hard models are the model itself: their logits are at a relative distance of {apart:g}, in float32. As "
        f"it is, another likeliest token than that of the float cache comes at {changed[OURS]} of the positions with "
        f"int8, {changed[ALONE]} where none are in float, {changed[HQQ]} with HQQ, {changed[FP8]} with fp8, and "
        f"{changed[FLOAT_COMPILED]} with the float cache of the compiled model. Int8 has the smallest KL divergence of "
        f"the quantized caches in {closest.count(OURS)} of {len(cases)} rows, and at most {largest:.2f} times that of "
        "the compiled model with its float cache."
    )


def _as_they_are(files: Iterable[Data]) -> dict[str, dict[str, Quality]]:
    """The rows of each model as it is, of later files in place of those of earlier ones."""
    models: dict[str, dict[str, Quality]] = {}
    for file in files:
        (case,) = (case for case in merged(file) if case.name == AS_IT_IS)
        models.setdefault(file["settings"]["model"], {}).update(case.rows)
    return models


def short(*files: Data) -> str:
    """A line for each model as it is, for the README."""
    said = []
    for model, rows in _as_they_are(files).items():
        ours, alone = rows[OURS].total, rows[FLOAT_COMPILED].total
        said.append(
            f"- `{model}`: perplexity {ours.reference_perplexity:.3f} -> {ours.perplexity:.3f}, mean KL divergence "
            f"{_small(ours.kl_mean)} (compiled with its float cache: {_small(alone.kl_mean)}), the same likeliest "
            f"token at {ours.top1_agreement:.2%} of the positions ({alone.top1_agreement:.2%})"
        )
    return "\n".join([*said, "", f"({_scored(files[0])}.)"])


def recall(*files: Data) -> str:
    """Whether int8 answers as the float cache does, and the table of the model as it is."""
    cases = merged(*files)
    pairs = [(rows[OURS], rows[FLOAT]) for case in cases for rows in case.recall.values()]
    same = sum(ours == theirs for ours, theirs in pairs)
    lengths = " and ".join(f"{int(length):,}" for length in cases[0].recall)
    return (
        f"`{files[0]['settings']['model']}`, texts of {lengths} tokens: the int8 cache answers the same share of "
        f"questions as the float one, at every depth, in {same} of {len(pairs)} tables ({len(cases)} models: as it is, "
        f"and made hard). As it is:\n\n{markdown_table(recall_table(cases[:1]))}"
    )


def _one_line(files: Iterable[Data], contender: str) -> str:
    rows = []
    for file in files:
        quality = next(case for case in merged(file) if case.name == AS_IT_IS).rows[contender].total
        rows.append((
            f"`{file['settings']['model']}`", file["settings"]["dtype"], f"{quality.reference_perplexity:.3f}",
            f"{quality.perplexity:.3f}", _small(quality.kl_mean), _small(quality.kl_p99),
            f"{quality.top1_agreement:.2%}",
        ))  # fmt: skip
    header = (
        "", "dtype", "perplexity, float cache", "int8", "mean KL", "99 % of the tokens below", "same likeliest token",
    )  # fmt: skip
    return grid(header, rows, right=True)


def four_bits(*files: Data) -> str:
    """A row for each way to store 4 bits, a column for each case of each model."""
    columns = [(file["settings"]["model"], case) for file in files for case in merged(file)]
    names = {OURS: "8 bits", VALUES_IN_4: "**keys in 8, values in 4**", IN_4: "**4 bits**"}
    names |= {f"4 bits: {name}": f"{name} ({code.bits_per_number:g})" for name, code in CODES.items()}
    rows = [(shown, *(_cell(case.rows[name]) for _, case in columns)) for name, shown in names.items()]
    header = ("", *(f"`{model}`, {case.name}" for model, case in columns))
    return f"{sentence(_scored(files[0]))}:\n\n{grid(header, rows)}"


def others_of_four_bits(*files: Data) -> str:
    """A row for each cache of 4 bits, a column for each model as it is: of ours in `FOUR`, first, then of `OTHERS`."""
    models, others = _as_they_are(files[: len(FOUR)]), _as_they_are(files[len(FOUR) :])
    names = {VALUES_IN_4: "**keys in 8, values in 4**", IN_4: "**4 bits**"}
    of_others = {
        HQQ_4: "HQQ, 4 bits",
        QUANTO_4: "quanto, 4 bits",
        VALUES_IN_4: "keys in 8, values in 4, none in float: `icw.recent_tokens=0`",
        IN_4: "4 bits, none in float: `icw.recent_tokens=0`",
        FLOAT_COMPILED: "float, compiled",
    }
    rows = [(shown, *(_cell(models[model][name]) for model in models)) for name, shown in names.items()]
    rows += [(shown, *(_cell(others[model][name]) for model in models)) for name, shown in of_others.items()]
    return f"{sentence(_scored(files[0]))}:\n\n{grid(('', *(f'`{model}`' for model in models)), rows)}"


def hard_cases_of_four_bits(*files: Data) -> str:
    """A row for each case, a column for each setting and model, and what is recalled of the model that can."""
    columns = [
        (f"`{file['settings']['model']}`, {shown}", name, {case.name: case for case in merged(file)})
        for file in files
        for name, shown in ((VALUES_IN_4, "keys in 8, values in 4"), (IN_4, "4 bits"))
    ]
    names = [case.name for case in merged(files[0])]
    rows = [(name, *(_cell(cases[name].rows[of]) for _, of, cases in columns)) for name in names]
    recalled = [case for file in files for case in merged(file)[:1] if case.recall]
    return f"{grid(('', *(title for title, *_ in columns)), rows)}\n\n{markdown_table(recall_table(recalled))}"


def advice(*files: Data) -> str:
    """What ``--advise`` prints of each model."""
    parts = []
    for file in files:
        made = restore(Advice, file, tries=[restore(Try, each) for each in file["tries"]])
        parts += [
            f"`{file['settings']['model']}`:",
            markdown_table(alone_table(made.alone)),
            markdown_table(tries_table(made)),
        ]
    return "\n\n".join(parts)


def single(*files: Data) -> str:
    return f"One token at a time, {files[0]['settings']['tokens']:,} tokens:\n\n{_one_line(files, OURS)}"


REGIONS = {
    "quality-short": Region((LLAMA[1], LLAMA[0], QWEN2[1], QWEN2[0]), short),
    "quality-llama": Region(LLAMA, summary),
    "quality-llama-notes": Region(LLAMA, notes),
    "quality-llama-full": Region(LLAMA, full),
    "quality-qwen2": Region(QWEN2, summary),
    "quality-qwen2-notes": Region(QWEN2, notes),
    "quality-qwen2-full": Region(QWEN2, full),
    "quality-recall": Region(QWEN2[1:], recall),
    "quality-bits": Region(BITS, four_bits),
    "quality-bits-others": Region(FOUR + OTHERS, others_of_four_bits),
    "quality-bits-hard": Region(FOUR, hard_cases_of_four_bits),
    "quality-advice": Region(ADVICE, advice),
    "quality-single": Region(SINGLE, single),
}
