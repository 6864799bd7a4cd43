"""The command line, ``icw-compile``."""

from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)


@app.callback()
def main() -> None:
    """An int8 key/value cache for Hugging Face causal language models, as a torch.compile backend."""


@app.command()
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
) -> None:
    """Continue prompts with the stock compiled cache and with the int8 one, and compare."""
    from icw_compile.demo import run_demo  # torch and transformers take seconds to import

    run_demo(model, prompt, max_new_tokens=max_new_tokens, dtype=dtype, device=device, rounds=rounds)


@app.command()
def sweep(
    types: Annotated[str | None, typer.Option(help="Model types, separated by commas. Left out: all.")] = None,
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
    from icw_compile.sweep import run_sweep  # torch and transformers take seconds to import

    chosen = types.split(",") if types else None
    raise typer.Exit(run_sweep(chosen, attention=attention, jobs=jobs, json_file=json, as_markdown=markdown))
