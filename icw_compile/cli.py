"""The command line, ``icw-compile``."""

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
