"""The command line, ``icw-compile``."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)


@contextmanager
def _refused_politely() -> Iterator[None]:
    """A `ValueError` says what is wrong with an argument: the command ends with its text, and no traceback."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


@app.callback()
def main() -> None:
    """An int8 key/value cache for Hugging Face causal language models, as a torch.compile backend."""


@app.command(epilog='Example: icw-compile demo --prompt "And it came to pass" --max-new-tokens 32')
def demo(
    model: Annotated[
        str | None,
        typer.Option(help="A hub id or a folder. Left out: the small model that ships with the package."),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text to continue; give it several times for a batch.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate for each prompt.")] = 64,
    dtype: Annotated[Literal["bfloat16", "float16", "float32"], typer.Option(help="The model's dtype.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="Where to run, such as cpu or cuda.")] = "cpu",
    rounds: Annotated[int, typer.Option(min=1, help="Timed generations of each kind, in turn.")] = 3,
    json: Annotated[Path | None, typer.Option(help="Write the results to this file.")] = None,
) -> None:
    """Continue prompts with the stock compiled cache and with the int8 one, and compare."""
    from icw_compile.lab.demo import run_demo  # torch and transformers take seconds to import

    run_demo(model, prompt, max_new_tokens=max_new_tokens, dtype=dtype, device=device, rounds=rounds, json_file=json)


@app.command(name="eval", epilog="Example: icw-compile eval --tokens 512 --context 256 --stride 128")
def evaluate(
    model: Annotated[
        str | None,
        typer.Option(
            help="A hub id, a folder, or kjv-llama-2m or kjv-qwen2-2m, the small models that ship with the package. "
            "Left out: kjv-llama-2m."
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="A text to score. Left out: one that the shipped model has not seen.", exists=True),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Score at least so many tokens.")] = 16384,
    context: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 2048,
    stride: Annotated[
        int, typer.Option(min=1, help="Tokens of each window that are decoded and scored; those before are prefilled.")
    ] = 1536,
    batch: Annotated[int, typer.Option(min=1, help="Windows decoded together.")] = 16,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens of each that a decode step takes.")] = 16,
    first: Annotated[
        int | None, typer.Option(min=1, help="Tokens that the first call takes of what is prefilled. Left out: all.")
    ] = None,
    prompt_chunk: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens that each of the calls after it takes of that. Left out: the rest."),
    ] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Cut the model to its first layers.")] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            help="A row: options of the backend, such as icw.attention=inductor, several with commas, '' for none. "
            "Give it several times to compare settings. Left out: no options."
        ),
    ] = None,
    code: Annotated[
        list[str] | None,
        typer.Option(
            help="Also another way to store rows in 4 bits, in plain torch, such as 'the rule of q4_0'; several times, "
            "or all."
        ),
    ] = None,
    hard: Annotated[
        list[str] | None,
        typer.Option(
            help="Also the same model made hard for a quantized cache, such as keys-mid-30x; several times, or all."
        ),
    ] = None,
    recall: Annotated[
        str | None,
        typer.Option(
            help="Also the recall of facts strewn in texts of these lengths in tokens, separated by commas. It means "
            "something for models that can do it, such as kjv-qwen2-2m."
        ),
    ] = None,
    others: Annotated[
        bool,
        typer.Option(
            help="Also the float cache of the compiled model, transformers' QuantizedCache (slow) in 8 bits and, if a "
            "row of ours has 4, in 4, and fp8."
        ),
    ] = True,
    advise: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Instead: where 4 bits hurt, layer by layer, and the options of the smallest cache within this mean "
            "KL divergence, such as 1e-3.",
        ),
    ] = None,
    dtype: Annotated[Literal["bfloat16", "float16", "float32"], typer.Option(help="The model's dtype.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="Where to run, such as cpu or cuda.")] = "cpu",
    json: Annotated[Path | None, typer.Option(help="Write the results to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the divergence by position into this file.")] = None,
) -> None:
    """Measure the quality of the int8 cache, and of others, against the float cache of the same model.

    Windows of text are prefilled and then decoded teacher-forced, so that every score reads the cache. Beside ours:
    the float cache of the compiled model (what rounding in another order makes of 16-bit numbers), transformers' 8-bit
    QuantizedCache (its last 128 tokens are in float), and float8 with one scale per tensor.
    """
    # torch and transformers take seconds to import
    from icw_compile.lab.evaluation import Settings, run_advise, run_eval

    lengths = tuple(int(length) for length in recall.split(",")) if recall else ()
    settings = Settings(
        model, text, tokens, context, stride, batch, chunk, layers, tuple(option or ()), tuple(hard or ()), lengths,
        others, dtype, device, tuple(code or ()), first, prompt_chunk,
    )  # fmt: skip
    with _refused_politely():
        if advise is None:
            run_eval(settings, json_file=json, plot=plot)
        elif plot is not None:
            raise ValueError("--advise draws nothing: no --plot")
        else:
            raise typer.Exit(int(run_advise(settings, advise, json_file=json).chosen is None))


@app.command(epilog="Example: icw-compile bench --layers 1 --contexts 512 --no-memory")
def bench(
    op: Annotated[Literal["attention"] | None, typer.Option(help="Measure one operator instead of a model.")] = None,
    startup: Annotated[
        bool,
        typer.Option(
            "--startup",
            help="Measure how long a small Llama takes to its third token, cold and warm, instead of a model.",
        ),
    ] = False,
    depths: Annotated[str, typer.Option(help="Numbers of layers for --startup, separated by commas.")] = "4,22,32",
    model: Annotated[
        str,
        typer.Option(
            help="A hub id, a folder, or a shape with random weights: tinyllama-1.1b, llama-3-8b, "
            "mistral-7b, gemma-2-2b, phi-3-mini, qwen2-1.5b, llama-3.1-70b."
        ),
    ] = "tinyllama-1.1b",
    layers: Annotated[int | None, typer.Option(min=1, help="Cut the model to its first layers.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 1,
    contexts: Annotated[str, typer.Option(help="Prompt lengths in tokens, separated by commas.")] = "512,2048,8192",
    device: Annotated[str, typer.Option(help="Where to run, such as cpu or cuda.")] = "cpu",
    dtype: Annotated[Literal["bfloat16", "float16", "float32"], typer.Option(help="The model's dtype.")] = "bfloat16",
    mode: Annotated[str, typer.Option(help="torch.compile's mode, such as reduce-overhead.")] = "default",
    contenders: Annotated[
        str | None,
        typer.Option(
            help="Some of eager, stock-static, stock-static-gqa, stock-dynamic, int8-static, int8-dynamic, "
            "int8-static-float-weights, hqq, separated by commas. Left out: all, hqq if it is installed."
        ),
    ] = None,
    weights: Annotated[
        Literal["float", "int8", "int4"],
        typer.Option(help="How torchao stores the weights of linear layers, of all contenders but one."),
    ] = "float",
    option: Annotated[
        list[str] | None,
        typer.Option(
            help="Run ours with these options of the backend, such as icw.bits=4, several with commas, '' for none. "
            "Give it several times to compare settings. Left out: no options."
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=2, help="Decode steps to time, or calls of an operator.")] = 16,
    prefill_rounds: Annotated[int, typer.Option(min=1, help="Prompts to time, or starts.")] = 3,
    max_prefill: Annotated[
        int,
        typer.Option(help="Longest prompt to run through the model; longer ones fill the cache with random numbers."),
    ] = 8192,
    prefill_chunk: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a prompt that a call takes at most. Left out: all of it.")
    ] = None,
    time: Annotated[bool, typer.Option(help="Measure time: all contenders in one process, in turn.")] = True,
    memory: Annotated[bool, typer.Option(help="Measure memory: each contender in a process of its own.")] = True,
    json: Annotated[Path | None, typer.Option(help="Write the results to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw time and memory against context into this file.")] = None,
) -> None:
    """Measure time and memory of the int8 cache beside eager, stock torch.compile and transformers' QuantizedCache.

    Exits with 1 if something failed or did not fit in memory.
    """
    # torch takes seconds to import
    from icw_compile.lab.bench import Settings, run_model_bench, run_operator_bench, run_startup_bench

    with _refused_politely():
        if op is not None:
            raise typer.Exit(run_operator_bench(batch=batch, device=device, dtype=dtype, rounds=steps, json_file=json))
        settings = Settings(
            model, layers, batch, device, dtype, mode, tuple(contenders.split(",")) if contenders else (), steps,
            prefill_rounds, max_prefill, time, memory, weights, prefill_chunk,
        )  # fmt: skip
        if startup:
            layer_counts = [int(depth) for depth in depths.split(",")]
            raise typer.Exit(run_startup_bench(settings, layer_counts, json_file=json, plot=plot))
        lengths = [int(length) for length in contexts.split(",")]
        raise typer.Exit(run_model_bench(settings, lengths, options=option or (), json_file=json, plot=plot))


@app.command(epilog="Example: icw-compile explain --model gemma2 --graphs graphs")
def explain(
    model: Annotated[
        str,
        typer.Option(
            help="A hub id, a folder, a shape such as llama-3-8b, a shipped model such as kjv-qwen2-2m, or a model "
            "type such as gemma2, of which a tiny one is made. Only its configuration is read."
        ),
    ] = "kjv-llama-2m",
    graphs: Annotated[
        Path | None,
        typer.Option(help="Write every graph before and after each pass, drawings, and a page index.html into it."),
    ] = None,
    layers: Annotated[int, typer.Option(min=1, help="Cut the model to its first layers.")] = 2,
    cache: Annotated[Literal["dynamic", "static"], typer.Option(help="The cache: one that grows, or a static one.")] = (
        "dynamic"
    ),
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the first call.")] = 32,
    option: Annotated[
        str, typer.Option(help="Options of the backend, such as icw.keys=plain, several with commas.")
    ] = "",
    dtype: Annotated[Literal["bfloat16", "float16", "float32"], typer.Option(help="The model's dtype.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="Where to run, such as cpu or cuda.")] = "cpu",
    json: Annotated[Path | None, typer.Option(help="Write the results to this file.")] = None,
) -> None:
    """Show what the backend does to a prompt and to a decode step of a model; nothing is compiled.

    The weights are random ones: graphs do not depend on them.
    """
    from icw_compile.lab.graphs import Settings, run_explain  # torch and transformers take seconds to import

    settings = Settings(model, layers, cache, prompt, option, dtype, device)
    with _refused_politely():
        run_explain(settings, graphs=graphs, json_file=json)


@app.command(epilog="Example: icw-compile plan --model llama-3-8b --memory 24GiB --batch 4")
def plan(
    model: Annotated[
        str,
        typer.Option(
            help="A hub id, a folder, or a shape: tinyllama-1.1b, llama-3-8b, mistral-7b, gemma-2-2b, phi-3-mini, "
            "qwen2-1.5b, llama-3.1-70b. Only its configuration is read."
        ),
    ] = "tinyllama-1.1b",
    memory: Annotated[
        str | None, typer.Option(help="Memory of one device, such as 24GiB: how long a context fits into it?")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of each sequence: what do they take, and how many sequences fit?")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 1,
    ranks: Annotated[int, typer.Option(min=1, help="Devices that tensor parallelism splits the model over.")] = 1,
    weights: Annotated[
        Literal["float", "int8", "int4"], typer.Option(help="How the weights are stored; float is --dtype.")
    ] = "float",
    cache: Annotated[Literal["dynamic", "static"], typer.Option(help="The cache: one that grows, or a static one.")] = (
        "dynamic"
    ),
    prompt: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens of the first call, where the others come one by one. Left out: all come in one call, which "
            "takes the most room in a growing cache.",
        ),
    ] = None,
    chunk: Annotated[
        int, typer.Option(min=1, help="Tokens that a call takes at most, for the activations (prefill_chunk_size).")
    ] = 2048,
    option: Annotated[
        str, typer.Option(help="Options of the backend, such as icw.recent_tokens=128, several with commas.")
    ] = "",
    dtype: Annotated[Literal["bfloat16", "float16", "float32"], typer.Option(help="The model's dtype.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="Where it is to run, such as cpu or cuda.")] = "cpu",
    json: Annotated[Path | None, typer.Option(help="Write the results to this file.")] = None,
) -> None:
    """Say what the cache of a model takes, in float and as stored, and how much of it fits into a memory.

    The cache is counted to the byte; weights and activations are estimates. Nothing is downloaded but a configuration.
    """
    from icw_compile.lab.plan import Settings, run_plan  # torch and transformers take seconds to import

    settings = Settings(model, memory, batch, tokens, ranks, weights, cache, prompt, chunk, option, dtype, device)
    with _refused_politely():
        run_plan(settings, json_file=json)


@app.command(epilog="Example: icw-compile check --stages environment,kernel --json check.jsonl")
def check(
    device: Annotated[str, typer.Option(help="Where to run, such as cpu or cuda.")] = "cpu",
    stages: Annotated[
        str | None,
        typer.Option(
            help="Some of environment, kernel, model, and on a GPU ceiling, decode, graphs, step, prefill, generate, "
            "separated by commas. Left out: all that the device allows."
        ),
    ] = None,
    compiler: Annotated[
        Literal["inductor", "eager"], typer.Option(help="What compiles the models; eager starts faster.")
    ] = "inductor",
    json: Annotated[Path | None, typer.Option(help="Write the rows to this file, a JSON object a line.")] = None,
) -> None:
    """Check that the backend is right on this machine, and on a GPU how fast it is; in stages of a few minutes.

    The first stages ask whether answers are right; where one fails, those that would measure something wrong are not
    run. Exits with 1 if a stage failed or was not run.
    """
    from icw_compile.lab.check import run_check  # torch and transformers take seconds to import

    names = stages.split(",") if stages else []
    with _refused_politely():
        code = run_check(names, device=device, compiler=compiler, json_file=json)
    raise typer.Exit(code)


@app.command(epilog="Example: icw-compile sweep --types llama,gemma2 --json sweep.json")
def sweep(
    types: Annotated[str | None, typer.Option(help="Model types, separated by commas. Left out: all.")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Some of text, image, encoder-decoder, speech, by commas. Left out: all.")
    ] = None,
    attention: Annotated[
        str | None, typer.Option(help="attn_implementation, such as eager. Left out: each model's default.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes at a time.")] = 2,
    json: Annotated[Path | None, typer.Option(help="Write the results to this file.")] = None,
    markdown: Annotated[bool, typer.Option(help="Print the table as Markdown.")] = False,
) -> None:
    """Try the backend on a tiny model of every architecture that transformers has, and compare with a reference.

    Exits with 1 if an answer is wrong, or if something fails that stock torch.compile can do.
    """
    from icw_compile.lab.sweep import run_sweep  # torch and transformers take seconds to import

    chosen, of = (given.split(",") if given else None for given in (types, tasks))
    code = run_sweep(chosen, tasks=of, attention=attention, jobs=jobs, json_file=json, as_markdown=markdown)
    raise typer.Exit(code)
