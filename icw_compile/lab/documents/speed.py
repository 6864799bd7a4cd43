"""Regions of time and memory, from what ``icw-compile bench`` and ``icw-compile demo`` wrote."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from icw_compile.compat.inductor import CudaGraphs
from icw_compile.lab.bench.measure import Spread
from icw_compile.lab.bench.model import ContextResult, Measured
from icw_compile.lab.bench.operator import Case, OperatorResult
from icw_compile.lab.bench.output import context_notes, context_table, depth_table, operator_table, plot_contexts, times
from icw_compile.lab.bench.shapes import SHAPES
from icw_compile.lab.bench.startup import STARTED, DepthResult, Start
from icw_compile.lab.demo import Comparison, Parting
from icw_compile.lab.documents.page import Region, details, grid, markdown_table, restore, sentence

__all__ = ["PICTURE", "REGIONS", "draw_picture", "drawn_from"]

RESULTS = "icw_compile/lab/bench/results/"
DECODE = tuple(f"{RESULTS}tinyllama-decode-{which}.json" for which in ("512-2048", "8192", "32768"))
MEMORY, LONG_PROMPT = f"{RESULTS}tinyllama-memory.json", f"{RESULTS}tinyllama-4-layers-memory-16384.json"
PREFILL, DYNAMIC = f"{RESULTS}tinyllama-prefill-2048.json", f"{RESULTS}llama-3-8b-4-layers-dynamic.json"
LATENT = f"{RESULTS}minicpm3-8-layers.json"
OPTIONS, WEIGHTS = f"{RESULTS}tinyllama-options.json", f"{RESULTS}tinyllama-int8-weights.json"
MODEL_ON_GPU = f"{RESULTS}llama-3-8b-h200-batch-8-32768.json"
ON_GPU = f"{RESULTS}attention-h200.json", f"{RESULTS}attention-h200-batch-16.json"
ATTENTION, STARTUP = f"{RESULTS}attention-cpu.json", f"{RESULTS}startup.json"
DEMO = "icw_compile/lab/results/demo.json"
PICTURE = f"{RESULTS}tinyllama-decode.png"

Data = Mapping[str, Any]


def contexts(*files: Data) -> list[ContextResult]:
    """What files of ``icw-compile bench`` hold, one after the other."""

    def measured(each: Data) -> dict[str, Measured]:
        return {
            name: restore(Measured, data, cuda_graphs=restore(CudaGraphs, data.get("cuda_graphs", {})))
            for name, data in each["measured"].items()
        }

    return [restore(ContextResult, each, measured=measured(each)) for file in files for each in file["contexts"]]


def setup(file: Data) -> str:
    """What was run, and on what."""
    settings, device = file["settings"], file["device"]
    if settings["device"] == "cpu":
        device += f" ({', '.join(flag for flag in file['cpu_flags'] if flag not in ('avx2', 'avx512f'))})"
    layers = "all layers" if settings["layers"] is None else f"{settings['layers']} layers"
    shape = f"`{settings['model']}`"
    if settings["model"] in SHAPES:
        sizes = SHAPES[settings["model"]].sizes
        heads = sizes["num_attention_heads"]
        head_dim = sizes.get("head_dim", sizes["hidden_size"] // heads)
        on = f"{sizes['num_key_value_heads']}, head_dim {head_dim}"
        if "kv_lora_rank" in sizes:
            on = f"latents of {sizes['kv_lora_rank']} and {sizes['qk_rope_head_dim']} channels"
        shape = f"the shape of {shape} ({heads} heads on {on})"
    return f"{shape}, {layers}, {settings['dtype']}, batch {settings['batch']}, on {device}, {versions(file)}"


def versions(file: Data) -> str:
    return f"torch {file['torch'].split('+')[0]}, transformers {file['transformers']}"


def _ms(measured: Measured | None) -> str:
    return f"{_median_ms(measured):,.0f}" if measured and measured.decode_seconds else ""


def _mebibytes(count: int | None, digits: int = 0) -> str:
    assert count is not None
    return f"{count / 2**20:,.{digits}f}"


def _listed(words: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def short_table(*files: Data) -> str:
    """What a reader of the README wants to know."""
    rows = []
    for result in contexts(*files):
        fastest = result.fastest_stock
        assert fastest is not None
        rows.append((
            f"{result.context:,}",
            *(_mebibytes(result.measured[name].cache_bytes, 1) for name in ("stock-static", "int8-static")),
            *(_ms(result.measured[name]) for name in ("stock-static", fastest)),
            f"**{_ms(result.measured['int8-static'])}**",
            *(f"{result.decode_ratio('int8-static', name).median:.2f}x" for name in ("stock-static", fastest)),
        ))  # fmt: skip
    header = (
        "cached tokens", "cache, MiB", "int8 cache, MiB", "`torch.compile`, ms per token", "fastest float, ms",
        "**int8**, ms", "int8 over `torch.compile`", "int8 over the fastest float",
    )  # fmt: skip
    return f"{grid(header, rows, right=True)}\n\n{sentence(setup(files[0]))}; medians of steps ({_steps(*files)})."


def _steps(*files: Data) -> str:
    return ", ".join(
        f"{file['settings']['steps']} at {_listed([f'{each.context:,}' for each in contexts(file)])}" for file in files
    )


def decode_table(*files: Data) -> str:
    """Every contender at every context."""
    rows = []
    for result in contexts(*files):
        fastest = result.fastest_stock
        assert fastest is not None
        rows.append((
            f"{result.context:,}",
            *(_ms(result.measured.get(name)) for name in ("eager", "stock-static", "stock-static-gqa")),
            f"**{_ms(result.measured['int8-static'])}**",
            _ms(result.measured.get("int8-dynamic")),
            *(f"{result.decode_ratio('int8-static', name).median:.2f}x" for name in (fastest, "stock-static")),
        ))  # fmt: skip
    header = (
        "cached tokens", "eager, DynamicCache", "`torch.compile`, StaticCache",
        "the same, `TRANSFORMERS_SDPA_FORCE_GQA=1`", "**int8**, StaticCache", "int8, DynamicCache",
        "over the fastest float one", "over `torch.compile`",
    )  # fmt: skip
    said = f"Milliseconds per token, medians of steps ({_steps(*files)}); {setup(files[0])}"
    return f"{said}:\n\n{grid(header, rows, right=True)}"


def full_tables(*files: Data) -> str:
    """What the command printed, folded away."""
    parts = []
    for file in files:
        parts.append(f"`{file['command']}`, {file['time'][:10]}")
        for result in contexts(file):
            parts += [markdown_table(context_table(result)), *(f"- {note}" for note in context_notes(result))]
    return details("every contender, with quartiles", *parts)


def prefill(file: Data) -> str:
    (result,) = contexts(file)
    ratio = result.prefill_ratio("int8-static", "stock-static")
    took = Spread.of(result.measured["int8-static"].prefill_seconds).median
    return (
        f"A prompt of {result.context:,} tokens takes {took:.1f} s, {ratio.median:.3f}x of the stock compiled time "
        f"(quartiles {ratio.lower:.3f}-{ratio.upper:.3f}): {setup(file)}."
    )


def _steps_over(file: Data, ours: str, stock: str) -> str:
    """What a decode step takes at each context."""
    ratios = [
        f"{result.decode_ratio(ours, stock).median:.2f}x at {result.context:,} tokens" for result in contexts(file)
    ]
    return _listed(ratios)


def dynamic(file: Data) -> str:
    return (
        f"A decode step with an int8 `DynamicCache` takes {_steps_over(file, 'int8-dynamic', 'stock-dynamic')} of the "
        f"stock compiled one, which copies its cache at each step: {setup(file)}."
    )


def latent(file: Data) -> str:
    return (
        f"A decode step takes {_steps_over(file, 'int8-static', 'stock-static')} of the stock compiled one, which "
        f"makes the keys and values of all cached tokens: {setup(file)}."
    )


def decode_on_gpu(file: Data) -> str:
    (result,) = contexts(file)
    stock, ours = (_median_ms(result.measured[name]) for name in ("stock-static", "int8-static"))
    ratio = result.decode_ratio("int8-static", "stock-static")
    return (
        f"A decode step of {file['settings']['batch']} sequences of {result.context:,} tokens takes {ours:.1f} ms, "
        f"{ratio.median:.3f}x of the {stock:.1f} ms that the stock compiled step takes (quartiles "
        f"{ratio.lower:.3f}-{ratio.upper:.3f}), both replayed as CUDA graphs: {setup(file)}."
    )


def _median_ms(measured: Measured) -> float:
    return Spread.of(measured.decode_seconds).median * 1e3


def options(file: Data) -> str:
    """A row for each setting, over ours without options: bytes of the cache, and a step at each context."""
    results = contexts(file)
    plain = "int8-static"
    rows = []
    for name in results[0].measured:
        if not name.startswith(f"{plain} "):
            continue
        caches = [each.measured[name].cache_bytes or 0 for each in results]
        stored = [cache / (each.measured[plain].cache_bytes or 1) for cache, each in zip(caches, results, strict=True)]
        taken = [each.decode_ratio(name, plain) for each in results]
        rows.append((
            ", ".join(f"`{option}`" for option in name.removeprefix(f"{plain} ").split(",")),
            *(f"{share:.3f}x" for share in stored),
            *map(times, taken),
        ))  # fmt: skip
    header = ("", *(f"{what}, {each.context:,} tokens" for what in ("cache", "decode step") for each in results))
    return (
        f"Over the default, with quartiles: {setup(file)}.\n\n{grid(header, rows, right=True)}\n\n`{file['command']}`"
    )


def weights(file: Data) -> str:
    """Quantized weights: stock and ours, and ours with float weights."""
    rows = []
    for result in contexts(file):
        ratios = (result.decode_ratio("int8-static", name) for name in ("stock-static", "int8-static-float-weights"))
        rows.append((
            f"{result.context:,}",
            *(_ms(result.measured[name]) for name in ("stock-static", "int8-static-float-weights")),
            f"**{_ms(result.measured['int8-static'])}**",
            *(f"{ratio.median:.2f}x ({ratio.lower:.2f}-{ratio.upper:.2f})" for ratio in ratios),
        ))  # fmt: skip
    header = (
        "cached tokens", "`torch.compile`, ms per token", "int8 cache, float weights, ms", "**int8 cache**, ms",
        "over `torch.compile`", "over float weights",
    )  # fmt: skip
    return (
        f"Linear layers with torchao's {file['settings']['weights']} weights but where it says float, medians with "
        f"quartiles: {setup(file)}.\n\n{grid(header, rows, right=True)}\n\n`{file['command']}`"
    )


def weights_short(file: Data) -> str:
    """A sentence for the README."""
    ratios = [
        f"{result.decode_ratio('int8-static', 'stock-static').median:.2f}x at {result.context:,}"
        for result in contexts(file)
    ]
    return (
        f"With torchao's {file['settings']['weights']} weights besides, a step takes {_listed(ratios)} tokens of stock "
        "`torch.compile` with the same weights."
    )


def _cases(file: Data) -> list[OperatorResult]:
    return [restore(OperatorResult, case, case=restore(Case, case["case"])) for case in file["cases"]]


def attention(file: Data) -> str:
    """One sentence for each case, the range of a cache that is a quarter full, and the tables."""
    cases = _cases(file)
    lines = []
    for result in cases:
        times = {name: result.times_ours(name).median for name in result.seconds}
        lines.append(
            f"- {result.case}: {Spread.of(result.seconds['int8']).median * 1e3:.1f} ms. "
            f"`scaled_dot_product_attention(enable_gqa=True)` takes {times['sdpa, gqa']:.1f} times as long, "
            f"`flex_attention` {times['flex']:.1f} times, what transformers runs on a static cache "
            f"{times['stock static']:.1f} times; reading the bytes {times['bytes']:.2f} times."
        )
    quarters = [result.quarter.median for result in cases]
    lines.append(f"- A static cache one quarter full takes {min(quarters):.2f}-{max(quarters):.2f}x of a full one.")
    lines.append(f"\n`{file['command']}`, {file['dtype']}, on {file['device']}, {versions(file)}.")
    tables = [markdown_table(operator_table(result)) for result in cases]
    return "\n".join(lines) + "\n\n" + details("every way to compute it, with quartiles", *tables)


def attention_on_gpu(*files: Data) -> str:
    """A row for each case of each file, and the tables."""
    rows, tables = [], []
    for file in files:
        for result in _cases(file):
            took = Spread.of(result.seconds["int8"]).median
            rows.append((
                f"{result.case}, batch {result.batch}",
                f"**{took * 1e6:.1f}**",
                f"{result.int8_bytes / took / file['copy_bytes_per_second']:.0%}",
                *(f"{result.times_ours(name).median:.2f}x" for name in ("sdpa, gqa", "flex", "stock static")),
                f"{result.quarter.median:.2f}x",
            ))  # fmt: skip
            tables.append(markdown_table(operator_table(result)))
    header = (
        "", "**int8**, µs", "its bytes over those that copies move", "torch's attention on bfloat16, over int8",
        "`flex_attention`", "what transformers runs on a static cache", "a quarter full, over full",
    )  # fmt: skip
    commands = " and ".join(f"`{file['command']}`" for file in files)
    said = f"{commands}, {files[0]['dtype']}, on an {files[0]['device']}, {versions(files[0])}."
    return "\n\n".join([grid(header, rows, right=True), said, details("with quartiles", *tables)])


def bytes_per_token(file: Data) -> str:
    """Of a token of one head, without the shift that each channel of a whole cache has."""
    cases = {case["case"]["head_dim"]: case["float_bytes"] / case["int8_bytes"] for case in file["cases"]}
    said = [f"{1 / times:.3f}x at head_dim {head_dim}" for head_dim, times in sorted(cases.items())]
    longer = [f"{times:.3f} times the context at {head_dim}" for head_dim, times in sorted(cases.items())]
    return (
        f"A token takes `head_dim + 2` bytes for each head instead of the `2 * head_dim` of a 16-bit model: "
        f"{_listed(said)}. The same bytes hold {_listed(longer)}."
    )


def memory(file: Data) -> str:
    """How far runs rise above what the process held, and what the process held at most."""
    rows = []
    for result in contexts(file):
        stock, ours = (result.measured[name] for name in ("stock-static", "int8-static"))
        rows.append((
            f"{result.context:,}",
            "the prompt and decode" if result.prefilled else "decode",
            *(_mebibytes(each, 1) for each in (stock.cache_bytes, ours.cache_bytes)),
            *(_mebibytes(each, 1) for each in (stock.rise_bytes, ours.rise_bytes)),
            *(_mebibytes(each) for each in (stock.peak_bytes, ours.peak_bytes)),
        ))  # fmt: skip
    header = (
        "tokens", "what runs", "cache, MiB", "int8", "rise of the run, MiB", "int8", "most of the process, MiB", "int8",
    )  # fmt: skip
    return f"{sentence(setup(file))}:\n\n{grid(header, rows, right=True)}"


def saving(file: Data) -> str:
    (result,) = contexts(file)
    shares = [
        f"{result.saved_share(f'int8-{kind}', f'stock-{kind}'):.0%} with a `{kind.capitalize()}Cache`"
        for kind in ("static", "dynamic")
    ]
    return (
        f"A prompt of {result.context:,} tokens and {file['settings']['steps'] + 4} decode steps, "
        f"{file['settings']['layers']} layers: the rise is smaller by {_listed(shares)} of what the cache itself takes "
        "less by calculation. Stock makes copies of a dynamic cache."
    )


def _depths(file: Data) -> list[DepthResult]:
    depths = []
    for each in file["depths"]:
        starts = {
            what: {name: [restore(Start, one) for one in runs] for name, runs in each[what].items()}
            for what in ("cold", "warm")
        }
        depths.append(restore(DepthResult, each, **starts))
    return depths


def _over_stock(depth: DepthResult, name: str) -> str:
    """``0.50x cold and 1.10x warm``; empty if it was not measured."""
    cold, warm = depth.over_stock(depth.cold, name), depth.over_stock(depth.warm, name)
    return "" if cold is None or warm is None else f"{cold.median:.2f}x cold and {warm.median:.2f}x warm"


def startup(file: Data) -> str:
    """The ratios in a sentence for each depth, and the tables."""
    lines, tables = [], []
    for result in _depths(file):
        found = ((name, _over_stock(result, name)) for name in STARTED)
        said = "; ".join(f"`{name}` {ratios}" for name, ratios in found if ratios)
        lines.append(f"- {result.layers} layers: {said}, over stock with the same kind of cache.")
        tables.append(markdown_table(depth_table(result)))
    lines.append(f"\n`{file['command']}`, on {file['device']}, {versions(file)}.")
    return "\n".join(lines) + "\n\n" + details("seconds, with quartiles", *tables)


def startup_short(file: Data) -> str:
    """The deepest model in a sentence."""
    deepest = max(_depths(file), key=lambda depth: depth.layers)
    static, dynamic = (_over_stock(deepest, name) for name in STARTED)
    return (
        f"Over stock `torch.compile`, the time to the third token of a model of {deepest.layers} small layers is "
        f"{static} with a static cache, {dynamic} with a dynamic one: layers that are alike are compiled once."
    )


def demo(file: Data) -> str:
    made = restore(Comparison, file, partings=[restore(Parting, each) for each in file["partings"]])
    notes = "".join(f"- {note}\n" for note in made.notes())
    said = f"`{file['command']}`: {file['prompts']} prompts, {file['new_tokens']} tokens each, on {file['device']}"
    return f"{markdown_table(made.table())}\n\n{notes}\n{said}, {versions(file)}."


REGIONS = {
    "speed-short": Region(DECODE, short_table),
    "speed-decode": Region(DECODE, decode_table),
    "speed-decode-full": Region(DECODE, full_tables),
    "speed-prefill": Region((PREFILL,), prefill),
    "speed-prefill-full": Region((PREFILL,), full_tables),
    "speed-dynamic": Region((DYNAMIC,), dynamic),
    "speed-dynamic-full": Region((DYNAMIC,), full_tables),
    "speed-latent": Region((LATENT,), latent),
    "speed-latent-full": Region((LATENT,), full_tables),
    "speed-decode-gpu": Region((MODEL_ON_GPU,), decode_on_gpu),
    "speed-decode-gpu-full": Region((MODEL_ON_GPU,), full_tables),
    "speed-options": Region((OPTIONS,), options),
    "speed-weights": Region((WEIGHTS,), weights),
    "speed-weights-short": Region((WEIGHTS,), weights_short),
    "speed-attention": Region((ATTENTION,), attention),
    "speed-attention-gpu": Region(ON_GPU, attention_on_gpu),
    "speed-startup": Region((STARTUP,), startup),
    "speed-startup-short": Region((STARTUP,), startup_short),
    "memory-bytes": Region((ATTENTION,), bytes_per_token),
    "memory-rise": Region((MEMORY,), memory),
    "memory-saving": Region((LONG_PROMPT,), saving),
    "memory-full": Region((MEMORY, LONG_PROMPT), full_tables),
    "demo": Region((DEMO,), demo),
}


def drawn_from(root: Path) -> str:
    """What the picture says of itself: a digest of the result files that it shows."""
    digest = hashlib.sha256(b"".join((root / file).read_bytes() for file in DECODE))
    return f"icw-compile results {digest.hexdigest()}"


def draw_picture(root: Path) -> bool:
    """Draw the picture of the README again, if it shows other result files than there are; whether it was drawn."""
    said, file = drawn_from(root), root / PICTURE
    if file.exists() and said.encode() in file.read_bytes():
        return False
    data = [json.loads((root / each).read_text(encoding="utf-8")) for each in DECODE]
    settings = data[0]["settings"]
    title = f"{settings['model']}, {settings['dtype']}; {data[0]['device']}"
    plot_contexts(contexts(*data), title, file, {"Description": said})
    return True
