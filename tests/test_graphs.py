"""``icw-compile explain``: files, drawings, and a page that asks for nothing outside of itself."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from icw_compile.lab.cli import app
from icw_compile.passes import PASSES

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NAMES = [each.name for each in PASSES]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("explain")
    arguments = ["explain", "--model", "mistral", "--cache", "static", "--layers", "1", "--dtype", "float32"]
    arguments += ["--option", "icw.keys=plain", "--graphs", str(folder / "graphs"), "--json", str(folder / "made.json")]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0] == "mistral, 1 layers, float32, static cache"
    passes = r"decode: canonicalize \d+, latent 0, storage 2, propagate \d+, reads 1, lower 1"
    assert any(re.match(passes, line) for line in lines)
    assert lines[-1].endswith("index.html")
    return folder


class Page(HTMLParser):
    """Tags that are open, what is asked for, what is linked to."""

    EMPTY = ("meta", "path", "rect")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.asked: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        if tag not in self.EMPTY:
            self.open.append(tag)
        for name, value in attrs:
            if name == "href" and tag == "a":
                self.links.append(value)
            elif name in ("src", "href", "srcset", "data", "xlink:href", "action", "background"):
                self.asked.append(value)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_files_before_and_after_each_pass(made: Path) -> None:
    folder = made / "graphs"
    files = {path.name for path in folder.iterdir()}
    data = json.loads((made / "made.json").read_text())
    assert set(data["files"]) == files
    for call in ("prompt", "decode"):
        before = (folder / f"{call}-0-captured.txt").read_text()
        assert "torch.ops.aten" in before
        for number, name in enumerate(NAMES, 1):
            assert (folder / f"{call}-{number}-{name}-before.txt").read_text() == before
            before = (folder / f"{call}-{number}-{name}-after.txt").read_text()
            assert (folder / f"{call}-{number}-{name}-0.svg").read_text().startswith("<svg")
    assert "ops.icw_int8kv" in before and "ops.aten.scaled_dot_product_attention" not in before
    assert len(files) == 1 + 2 * (2 + 3 * len(NAMES))
    graphs = [graph for call in data["calls"] for graph in call["graphs"]]
    assert [[step["name"] for step in graph["passes"]] for graph in graphs] == [NAMES] * 2
    formats = {site["role"]: site["format"] for site in graphs[1]["sites"]}
    expected = {"key": "int8 float32, keeps 0+32", "value": "int8 float32, equalized, keeps 0+32"}
    assert formats == expected, "the option is the backend's"


def test_the_page_asks_for_nothing(made: Path) -> None:
    text = (made / "graphs" / "index.html").read_text()
    page = Page()
    page.feed(text)
    page.close()
    assert not page.open and not page.asked
    assert page.tags.count("h2") == 2 and page.tags.count("svg") >= 2 * 4
    assert set(page.links) == {path.name for path in (made / "graphs").iterdir()} - {"index.html"}
    assert set(re.findall(r"https?://[^\s\"<]+", text)) == {"http://www.w3.org/2000/svg"}, (
        "the name space, never fetched"
    )
    assert "@import" not in text and "url(" not in text and "<script" not in text


def chromium(page: Path) -> tuple[str, list[str], list[str]]:
    """The page as a headless Chromium sees it, what its console says, and what the page asks a network for."""
    assert CHROMIUM is not None
    log, profile = page.with_suffix(".net.json"), page.parent / "profile"
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"]
    command += [f"--user-data-dir={profile}", f"--log-net-log={log}", "--enable-logging=stderr", "--dump-dom"]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    started = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
    # What Chromium asks for by itself has no page as its origin.
    asked = {each["url"] for each in started if each.get("initiator", "not an origin") != "not an origin"}
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line], sorted(asked)


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
def test_in_a_browser(made: Path, tmp_path: Path) -> None:
    shutil.copy(made / "graphs" / "index.html", tmp_path)
    seen, console, asked = chromium(tmp_path / "index.html")
    assert seen.count("<svg") == (tmp_path / "index.html").read_text().count("<svg") and not console and not asked
    # It would have been noticed:
    (tmp_path / "other.html").write_text('<img src="https://nowhere.invalid/a.png"><script>nothing()</script>')
    _, console, asked = chromium(tmp_path / "other.html")
    assert asked == ["https://nowhere.invalid/a.png"] and "nothing is not defined" in console[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--layers", "99"], "it cannot be cut to 99"),
        (["--option", "icw.nothing=1"], "Unknown option"),
    ],
)
def test_what_cannot_be_explained(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["explain", *arguments])
    assert result.exit_code == 2 and said in " ".join(result.output.replace("│", " ").split())
