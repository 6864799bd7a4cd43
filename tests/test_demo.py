"""``icw-compile demo``, on a model small enough to compile quickly."""

import json
from pathlib import Path

import torch
from support import tiny_model
from transformers import AutoTokenizer
from typer.testing import CliRunner

from icw_compile.lab.assets import MODEL
from icw_compile.lab.cli import app


def test_demo_with_a_model_of_the_users_own(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tiny_model(num_hidden_layers=1, vocab_size=len(tokenizer), head_dim=64).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    arguments = ["--prompt", "And he said", "--prompt", "Then", "--max-new-tokens", "4", "--rounds", "1"]
    arguments += ["--json", str(tmp_path / "demo.json")]
    result = CliRunner().invoke(app, ["demo", "--model", str(tmp_path), *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert sum("stock, compiled  And he said" in line for line in lines) == 1
    assert sum("int8, icw_int8kv  Then" in line for line in lines) == 1
    cache_bytes = next(line for line in lines if "cache bytes" in line)
    assert "7 tokens" in cache_bytes and "0.587x" in cache_bytes  # the shift of each channel counts beside so few
    assert "generated tokens that agree" in result.output and "of 8" in result.output
    assert "... with the model that is not compiled" in result.output and "not compiled  And he" not in result.output
    assert "graph 1: 2 of 2 key/value sites in int8, llama" in result.output
    data = json.loads((tmp_path / "demo.json").read_text())
    assert (data["prompts"], data["new_tokens"], data["generated"], data["torch"]) == (2, 4, 8, torch.__version__)
    for parting in data["partings"]:  # of a model that was not trained, so that anything is as likely
        assert 0 <= parting["after"] < 4 and all(0 < each < 1 for each in parting["probabilities"])
        assert f"Text {parting['text']} parts after {parting['after']} tokens:" in " ".join(result.output.split())
    assert data["same"] == 8 or data["partings"]
    assert round(data["int8_bytes"] / data["stock_bytes"], 3) == 0.587


def test_help_names_every_option() -> None:
    output = CliRunner().invoke(app, ["demo", "--help"]).output
    assert all(option in output for option in ("--model", "--prompt", "--max-new-tokens", "--dtype", "--device"))
