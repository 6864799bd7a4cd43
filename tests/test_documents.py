"""README and ``docs``: every figure is what the result files give, and every link leads somewhere."""

import json
import re
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from icw_compile.lab.bench.startup import DepthResult, Start
from icw_compile.lab.demo import Comparison, Parting
from icw_compile.lab.documents import PAGES, REGIONS, models, quality, render_page, speed
from icw_compile.lab.documents.page import Region, details, markdown_table, render
from icw_compile.lab.sweep import Run, Swept, table
from icw_compile.options import Options

ROOT = Path(__file__).parents[1]
WRITTEN = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", *sorted(f"docs/{f.name}" for f in (ROOT / "docs").iterdir()))
RESULTS = sorted(str(file.relative_to(ROOT)) for file in ROOT.glob("icw_compile/lab/**/results/README.md"))
#: What is measured has one of these behind it; what is written in code, as a tolerance or an option, does not count.
FIGURE = re.compile(
    r"\d(?:\.\d+)?e-\d|\d\.\d+x|\d ?%|\d (?:ms|seconds|MiB|GiB|tokens per second)\b|\d times (?:as|the|faster|longer)\b"
)


@cache
def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def prose(page: str, regions: bool = True) -> str:
    """Without code, and without what stands in regions unless asked for."""
    text = read(page)
    if not regions:
        text = re.sub(r"<!-- result: .*?<!-- end -->", "", text, flags=re.DOTALL)
    return re.sub(r"`[^`\n]*`", "code", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def anchors(page: str) -> set[str]:
    """As GitHub makes them of headings."""
    text = re.sub(r"^```.*?^```", "", read(page), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_figure_is_what_the_result_files_give(page: str) -> None:
    assert render_page(ROOT, page) == read(page), "stale, or changed by hand: run `make docs`"


@pytest.mark.parametrize("page", WRITTEN)
def test_no_figure_outside_of_a_region(page: str) -> None:
    """What others measured stands in a paragraph or an item with its source."""
    parts = re.split(r"\n\s*\n|\n(?=- )", prose(page, regions=False))
    assert not [part for part in parts if FIGURE.search(part) and "https://" not in part]


def test_the_picture_shows_the_result_files() -> None:
    assert speed.drawn_from(ROOT).encode() in (ROOT / speed.PICTURE).read_bytes(), "stale: run `make docs`"
    assert not speed.draw_picture(ROOT)


def test_pages() -> None:
    assert {page for page in WRITTEN if "<!-- result:" in read(page)} == set(PAGES)
    assert len(read("README.md").splitlines()) <= 200
    shown = set(re.findall(r"<!-- result: ([\w-]+) -->", "".join(map(read, PAGES))))
    assert set(REGIONS) == shown, "nobody sees them"
    assert all(f"icw.{each.name}" in read("README.md") for each in fields(Options))


@pytest.mark.parametrize("page", [*WRITTEN, *RESULTS])
def test_links(page: str) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert target.exists() and target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(str(target.relative_to(ROOT))), link


def test_regions(tmp_path: Path) -> None:
    regions = {"sum": Region(("a.json", "b.json"), lambda a, b: f"{a + b}\n")}
    page = "One.\n<!-- result: sum -->\nold\n<!-- end -->\nTwo.\n"
    (tmp_path / "a.json").write_text("1")
    with pytest.raises(FileNotFoundError):
        render(tmp_path, page, regions)
    (tmp_path / "b.json").write_text("2")
    made = render(tmp_path, page, regions)
    assert made == render(tmp_path, made, regions) == page.replace("old", "3")  # once more changes nothing
    with pytest.raises(ValueError, match="'other' is not known; there are: sum"):
        render(tmp_path, page.replace("sum", "other"), regions)


@pytest.mark.parametrize(
    "text", ["<!-- result: sum -->\n3\n", "<!-- result: sum -->\n3\n<!-- result: sum -->\n<!-- end -->"]
)
def test_a_region_without_an_end(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text("3")
    with pytest.raises(ValueError, match="has no end"):
        render(tmp_path, text, {"sum": Region(("a.json",), str)})


def swept() -> list[Swept]:
    """Made up."""
    good = Run("int8", kv_layers=2, int8_layers=2, graphs=2, sites=[4, 4], distance=1e-5)
    part = Run(
        "partly int8",
        "1 of 2 layers, a|b [/c.py:3 in forward]",
        kv_layers=2,
        int8_layers=1,
        graphs=2,
        sites=[2],
        distance=1e-5,
    )
    return [
        Swept("llama", "text", "LlamaForCausalLM", "sdpa", {"dynamic": good, "static": good}),
        Swept("other", "text", "OtherForCausalLM", "sdpa", {"dynamic": good, "static": part}),
        Swept("third", "speech", "ThirdForSpeech", "sdpa", {"dynamic": Run("not built", "it cannot be")}),
    ]


def test_sweep_file() -> None:
    data = json.loads(json.dumps([each.to_dict() for each in swept()]))
    assert models.swept(data, "text") == swept()[:2]
    assert models.short(data).startswith("Of the 2 types of causal language models that transformers knows, 1 store")
    made = models.types(data, task="text")
    assert "2 model types" in made and "| 1 | llama |" in made and "| 1 | other |" in made and "third" not in made
    assert "a\\|b" in made


def test_table_of_a_command() -> None:
    made = markdown_table(table(swept()))
    assert made.splitlines()[0] == "int8 key/value caches by model type:"
    assert made.splitlines()[3] == "|" + " --- |" * 8
    assert "| text | llama | sdpa | int8 | int8 | 2 of 2 | 1e-05 |  |" in made and "a\\|b" in made
    assert details("more", made).endswith("\n\n</details>")


def test_startup_file() -> None:
    parts = dict.fromkeys(("capture_seconds", "passes_seconds", "kernel_seconds", "compile_seconds"), 1.0)
    starts = {"stock-static": [Start([2.0, 1.0, 0.0], {})] * 2, "int8-static": [Start([3.0, 2.0, 1.0], parts)] * 2}
    growing = {"stock-dynamic": [Start([4.0], {})], "int8-dynamic": [Start([3.0], parts)]}
    about = {"command": "icw-compile bench", "device": "a CPU", "torch": "2.13.0+cpu", "transformers": "5.23.0"}
    data: dict[str, Any] = {**about, "depths": [asdict(DepthResult(4, starts, starts))]}
    made = speed.startup(json.loads(json.dumps(data)))
    assert made.startswith(
        "- 4 layers: `int8-static` 2.00x cold and 2.00x warm, over stock with the same kind of cache."
    )
    assert "torch 2.13.0, transformers 5.23.0" in made and "| int8-static |" in made
    data["depths"].append(asdict(DepthResult(8, {**starts, **growing}, {**starts, **growing})))
    made = speed.startup_short(json.loads(json.dumps(data)))
    assert "8 small layers is 2.00x cold and 2.00x warm with a static cache, 0.75x cold and 0.75x warm with a" in made


def test_demo_file() -> None:
    about = {"command": "icw-compile demo", "device": "a CPU", "torch": "2.13.0+cpu", "transformers": "5.23.0"}
    parting = Parting(2, 9, (" of", ","), (0.182, 0.181))
    compared = Comparison(74, 200, 110, 2000, 1050, 10.0, 12.0, 180, 192, 185, 178, 1.0, [parting])
    data = {**about, "prompts": 3, "new_tokens": 64, **asdict(compared)}
    made = speed.demo(json.loads(json.dumps(data)))
    assert "| cache bytes, 74 tokens | 200 | 110 | 0.550x |" in made
    assert "| cache bytes, 4,096 tokens | 2,000 | 1,050 | 0.525x |" in made and "3 prompts, 64 tokens each" in made
    assert "180 of 192" in made and "| 185 of 192 | 178 of 192 |" in made
    assert "- Text 2 parts after 9 tokens: ' of' or ','" in made and "one 18.20% likely, the other 18.10%." in made


def evaluated(name: str) -> dict[str, Any]:
    """One row of a committed file, under another name."""
    data = json.loads(read(quality.LLAMA[0]))
    case = data["cases"][0]
    rows = {"float": case["rows"]["float"], name: case["rows"][quality.OURS]}
    return {**data, "cases": [{**case, "rows": rows}]}


def test_files_of_single_rows() -> None:
    single = evaluated(quality.OURS)
    assert quality.single(single, single).startswith("One token at a time, 16,384 tokens:")


def test_the_wheel_has_every_package() -> None:
    """``pyproject.toml`` lists them: a folder that is forgotten there is missing from what people install."""
    listed = re.findall(r'^    "(icw_compile[\w.]*)",$', read("pyproject.toml"), re.MULTILINE)
    folders = (file.parent.relative_to(ROOT) for file in (ROOT / "icw_compile").rglob("__init__.py"))
    assert sorted(listed) == sorted({".".join(folder.parts) for folder in folders} | {"icw_compile.passes"})
