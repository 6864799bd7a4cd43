"""``icw-compile explain``: what the backend does to a model, as text files, drawings and a page that shows both.

The page is one file that asks for nothing outside of itself: its drawings and texts are in it.
"""

import difflib
import html
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, Cache, DynamicCache, PreTrainedConfig, PreTrainedModel, StaticCache

from icw_compile.explain import ExplainedGraph, explain
from icw_compile.frontend.families import FAMILIES
from icw_compile.lab.assets import MODELS
from icw_compile.lab.bench.shapes import load_config
from icw_compile.lab.terminal import answers, parse_options
from icw_compile.lab.tiny import model_types, tiny_config

__all__ = ["Call", "Settings", "explain_calls", "run_explain", "write_graphs"]


@dataclass(frozen=True)
class Settings:
    """What to explain; see ``icw-compile explain --help``."""

    model: str
    layers: int
    cache: Literal["dynamic", "static"]
    prompt: int
    options: str
    dtype: str
    device: str


@dataclass(frozen=True)
class Call:
    """One call of a model, and its graphs: more than one if there were graph breaks."""

    name: str
    graphs: tuple[ExplainedGraph, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything but texts and drawings."""
        return {
            "name": self.name,
            "graphs": [
                {
                    "passes": [{"name": p.name, "matches": p.matches, "seconds": p.seconds} for p in graph.passes],
                    "sites": [site.to_dict() for site in graph.sites],
                    "skipped": [skipped.to_dict() for skipped in graph.skipped],
                }
                for graph in self.graphs
            ],
        }


def run_explain(settings: Settings, *, graphs: Path | None, json_file: Path | None) -> list[Call]:
    """Explain a prompt and a decode step, print what was found, and write the files that are asked for.

    Raises:
        ValueError: an unknown option, or more layers than the model has.
    """
    console = answers(140)
    with Console(stderr=True).status(f"{settings.model}: capturing and rewriting"):
        calls = explain_calls(settings)
    title = f"{settings.model}, {settings.layers} layers, {settings.dtype}, {settings.cache} cache"
    console.print(title, highlight=False, markup=False)
    for call in calls:
        for text in _summary(call):
            console.print(text, highlight=False, markup=False, soft_wrap=True)
    data = {"settings": asdict(settings), "calls": [call.to_dict() for call in calls], "files": []}
    if graphs is not None:
        files = write_graphs(calls, graphs, title)
        data["files"] = [str(file) for file in files]
        console.print(
            f"{len(files)} files; open {graphs / 'index.html'}", highlight=False, markup=False, soft_wrap=True
        )
    if json_file is not None:
        json_file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return calls


def explain_calls(settings: Settings) -> list[Call]:
    """A prompt that makes the cache, and a decode step that reads and writes it.

    Of the model only the configuration counts: its weights are random, since graphs do not depend on them.

    Raises:
        ValueError: an unknown option, or more layers than the model has.
    """
    options = parse_options(settings.options)
    model = _build(_config(settings.model, settings.layers), settings)
    prompt = torch.arange(3, 3 + settings.prompt, device=model.device).view(1, -1) % model.config.vocab_size
    cache: Cache = DynamicCache(config=model.config)
    if settings.cache == "static":
        cache = StaticCache(model.config, max_cache_len=settings.prompt + 64)
    calls = [Call("prompt", explain(model, input_ids=prompt, past_key_values=cache, options=options).graphs)]
    compiled = torch.compile(model, backend="icw_int8kv", options={**options, "icw.compiler": "eager"})
    with torch.no_grad():
        compiled(input_ids=prompt, past_key_values=cache)
    step = explain(model, input_ids=prompt[:, :1], past_key_values=cache, options=options)
    return [*calls, Call("decode", step.graphs)]


def _config(name: str, layers: int) -> PreTrainedConfig:
    """The configuration of a shipped model, a shape, a hub id or a folder, or a tiny one of a model type."""
    if name in model_types():
        return tiny_config(name, num_hidden_layers=layers)
    return load_config(str(MODELS.get(name, name)), layers)


def _build(config: PreTrainedConfig, settings: Settings) -> PreTrainedModel:
    family = FAMILIES.get(config.model_type)
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        config, dtype=getattr(torch, settings.dtype), attn_implementation=family.attentions[0] if family else None
    )
    return model.to(settings.device).eval()


def _summary(call: Call) -> Iterator[str]:
    for i, graph in enumerate(call.graphs):
        yield f"\n{_title(call, i)}: " + ", ".join(f"{step.name} {step.matches}" for step in graph.passes)
        for site in graph.sites:
            how = f"{site.lowering} ({site.declined})" if site.declined else site.lowering
            said = [f"{site.cache}, {site.dtype} {list(site.shape)}", f"written by {', '.join(site.writes)}"]
            said += [f"read by {', '.join(site.reads)}", how] if site.reads else ["what attends to it is not the cache"]
            yield f"  {site.name}: {'; '.join(said)}"
        for skipped in graph.skipped:
            yield f"  not int8: {skipped.layer} {skipped.what}: {skipped.reason}"


def _title(call: Call, index: int) -> str:
    return call.name if len(call.graphs) == 1 else f"{call.name}, graph {index} of {len(call.graphs)}"


def write_graphs(calls: Sequence[Call], folder: Path, title: str) -> list[Path]:
    """Write every graph before and after each pass, the drawings, and ``index.html``, which shows them.

    Args:
        calls: what to show.
        folder: where to, made if it is not there. Files of another run stay, unless they have the same names.
        title: of the page.

    Returns:
        what was written, relative to ``folder``, the page first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, str] = {}
    body: list[str] = []
    for call in calls:
        for i, graph in enumerate(call.graphs):
            body.append(_section(call, i, graph, files))
    versions = ", ".join(f"{name} {version(name)}" for name in ("icw-compile", "torch", "transformers"))
    page = _PAGE.format(title=html.escape(title), versions=html.escape(versions), body="\n".join(body))
    files = {"index.html": page, **files}
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [Path(name) for name in files]


def _section(call: Call, index: int, graph: ExplainedGraph, files: dict[str, str]) -> str:
    """The part of the page for one graph; what it links to goes into ``files``."""
    stem = call.name if len(call.graphs) == 1 else f"{call.name}-{index}"
    title = _title(call, index)
    parts = [f"<h2>{html.escape(title)}</h2>", _sites(graph)]
    steps = [("captured", "", graph.captured)]
    steps += [(step.name, step.before or "", step.after or "") for step in graph.passes]
    for number, (name, before, after) in enumerate(steps):
        prefix = f"{stem}-{number}-{name}"
        texts = (
            {f"{prefix}.txt": after} if number == 0 else {f"{prefix}-before.txt": before, f"{prefix}-after.txt": after}
        )
        drawings = graph.drawings[number] if graph.drawings else ()
        pictures = {f"{prefix}-{i}.svg": drawing.svg(f"{title}, {name}") for i, drawing in enumerate(drawings)}
        files.update(texts | pictures)
        matches = "" if number == 0 else f": {graph.passes[number - 1].matches} matches"
        links = " ".join(f'<a href="{html.escape(file)}">{html.escape(file)}</a>' for file in texts | pictures)
        parts.append(f"<h3>{html.escape(name)}{matches}</h3>\n<p class=files>{links}</p>")
        if number == 0 or before != after:
            parts += [f"<figure>{picture}</figure>" for picture in pictures.values()]
        else:
            parts.append("<p>Nothing changed.</p>")
        if number and before != after:
            parts.append(f"<details><summary>what changed</summary><pre>{_difference(before, after)}</pre></details>")
        if number in (0, len(steps) - 1):
            parts.append(f"<details><summary>the whole graph</summary><pre>{html.escape(after)}</pre></details>")
    return "\n".join(parts)


def _sites(graph: ExplainedGraph) -> str:
    header = ("site", "cache", "stored as", "shape", "written by", "read by", "computed by", "bytes a token")
    rows = [
        (
            site.name, site.cache, site.format, f"{list(site.shape)}", ", ".join(site.writes), ", ".join(site.reads),
            f"{site.lowering} {site.declined}", f"{site.float_bytes_per_token} → {site.bytes_per_token}",
        )
        for site in graph.sites
    ]  # fmt: skip
    said = [f"<p class=skipped>not int8: {html.escape(f'{s.layer} {s.what}: {s.reason}')}</p>" for s in graph.skipped]
    if not rows:
        return "\n".join(["<p>No key or value of this graph is int8.</p>", *said])
    cells = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    table = [f"<tr>{row}</tr>" for row in ("".join(f"<th>{each}</th>" for each in header), *cells)]
    return "\n".join(["<table>", *table, "</table>", *said])


def _difference(before: str, after: str) -> str:
    """The lines that a pass took away and put in, with two around them."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), n=2, lineterm="")
    kinds = {"+": "<ins>{}</ins>", "-": "<del>{}</del>", "@": "<b>{}</b>"}
    return "\n".join(kinds.get(line[:1], "{}").format(html.escape(line)) for line in list(lines)[2:])


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 90rem; padding: 0 1rem; }}
h2 {{ margin-top: 3rem; border-bottom: 2px solid #ddd; }}
table {{ border-collapse: collapse; font-size: 13px; }}
th, td {{ border: 1px solid #ddd; padding: .25rem .5rem; text-align: left; }}
figure {{ margin: 1rem 0; overflow-x: auto; border: 1px solid #eee; }}
pre {{ overflow-x: auto; font-size: 12px; background: #fafafa; border: 1px solid #eee; padding: .5rem; }}
ins {{ background: #e3f6e3; text-decoration: none; }}
del {{ background: #fbe5e5; text-decoration: none; }}
.files {{ font-size: 12px; }}
.skipped {{ color: #a40; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>What <code>backend="icw_int8kv"</code> does to the graphs of a prompt, which makes the cache, and of a decode step,
which reads and writes it: as captured, and after each pass. Drawings show what concerns the cache, one for each kind of
layer; hover over a box for its line of the graph. {versions}.</p>
{body}
</body>
</html>
"""
