"""``icw-compile bench``: what it runs and reports, never how fast that is."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import relative_distance, tiny_model, worker
from transformers.utils import is_hqq_available
from typer.testing import CliRunner

import icw_compile.lab.bench.model as bench_model
from icw_compile import QuantizedKV
from icw_compile.compat.inductor import CudaGraphs
from icw_compile.compat.transformers import leaves_heads_grouped
from icw_compile.lab.bench.measure import Spread, WorkerError, in_own_process, peak_bytes, ratio, reset_peak, take_turns
from icw_compile.lab.bench.model import (
    CONTENDERS,
    ContextResult,
    Measured,
    Settings,
    choose_contenders,
    contender,
    measure_context,
)
from icw_compile.lab.bench.operator import OPERATOR_CONTENDERS, Case, run_case
from icw_compile.lab.bench.output import context_notes, depth_table, plot_contexts, plot_depths
from icw_compile.lab.bench.shapes import SHAPES, build_model, load_config, quantize_weights, weights_bytes
from icw_compile.lab.bench.startup import DepthResult, Start, contenders_to_start
from icw_compile.lab.cli import app
from icw_compile.lab.documents.speed import contexts

CPU = torch.device("cpu")


def settings(model: str = "tinyllama-1.1b", **changes: Any) -> Settings:
    defaults: dict[str, Any] = {
        "layers": None, "batch": 1, "device": "cpu", "dtype": "bfloat16", "mode": "default", "contenders": ("eager",),
        "steps": 2, "prefill_rounds": 1, "max_prefill": 64, "time": True, "memory": True,
    }  # fmt: skip
    return Settings(model, **{**defaults, **changes})


#: name -> parameters in millions, as their model cards say.
PARAMETERS = {
    "tinyllama-1.1b": 1100,
    "llama-3-8b": 8030,
    "mistral-7b": 7248,
    "gemma-2-2b": 2614,
    "phi-3-mini": 3821,
    "qwen2-1.5b": 1544,
    "llama-3.1-70b": 70554,
    "minicpm3-4b": 4074,
}


@pytest.mark.parametrize("name", SHAPES)
def test_named_shapes(name: str) -> None:
    model = build_model(name, load_config(name), torch.bfloat16, "cpu", meta=True)
    assert round(model.num_parameters() / 1e6) == PARAMETERS[name]
    cut = load_config(name, layers=2).get_text_config(decoder=True)
    assert cut.num_hidden_layers == len(getattr(cut, "layer_types", None) or "ab") == 2


def test_a_model_cannot_grow() -> None:
    with pytest.raises(ValueError, match="has 22 layers; it cannot be cut to 23"):
        load_config("tinyllama-1.1b", layers=23)


def test_spread_and_ratio() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == (2.0, 1.5, 2.5)
    assert Spread.of([4.0]) == (4.0, 4.0, 4.0)
    assert ratio([2.0, 30.0, 4.0], [1.0, 10.0, 8.0]).median == 2.0  # pairs, not medians: 2, 3, 0.5


def test_contenders_take_turns() -> None:
    order: list[str] = []
    clocks = {name: lambda name=name: float(len(order.append(name) or order)) for name in "abc"}
    assert take_turns(clocks, 2) == {"a": [1.0, 6.0], "b": [2.0, 4.0], "c": [3.0, 5.0]}
    assert "".join(order) == "abcbca"


def test_workers() -> None:
    heard: list[int | str] = []
    with pytest.raises(WorkerError, match="ValueError: no such thing"):
        in_own_process(worker, "raise", say=heard.append)
    assert heard == ["working"]
    with pytest.raises(WorkerError, match="the process ended with exit code 9"):
        in_own_process(worker, "die")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
def test_peak_memory_can_be_measured_twice() -> None:
    peaks = []
    for mebibytes in (96, 48):  # the allocator gives no memory that it holds already for more than 32
        reset_peak(CPU)
        before = peak_bytes(CPU)
        torch.ones(mebibytes << 20, dtype=torch.uint8)
        peaks.append((peak_bytes(CPU) - before) >> 20)
    assert 92 <= peaks[0] <= 102 and 44 <= peaks[1] <= 52


def test_what_does_not_fit_is_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_model, "available_bytes", lambda device: 3 << 30)
    chosen = settings(contenders=("eager", "int8-static"), max_prefill=512)
    assert measure_context(settings("llama-3-8b"), 512, lambda said: None).refused.startswith("needs about 15.0 GiB")
    result = measure_context(chosen, 131_072, lambda said: None)
    assert "(weights 2.0, a float cache 2.8), and 3.0 GiB are available" in result.refused and not result.measured
    assert result.float_cache_bytes / result.int8_cache_bytes == pytest.approx(128 / 66, rel=1e-4)
    assert context_notes(result) == [f"131,072 tokens: not run: {result.refused}"]
    # One by one, instead of together, needs less.
    assert bench_model.plan(settings(time=False), 8192).needed_bytes < bench_model.plan(chosen, 8192).needed_bytes


def test_contenders_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = set() if is_hqq_available() else {"hqq"}
    with bench_model._force_gqa(True):
        missing |= set() if leaves_heads_grouped() else {"stock-static-gqa"}
    assert set(choose_contenders(())) == set(CONTENDERS) - missing - {"int8-static-float-weights"}
    with pytest.raises(ValueError, match="unknown contenders: fast; there are: eager, stock-static"):
        choose_contenders(("eager", "fast"))
    rows = choose_contenders(("stock-static", "int8-static", "int8-dynamic"), options=("", "icw.bits=4"))
    assert rows == ("stock-static", "int8-static", "int8-static icw.bits=4", "int8-dynamic", "int8-dynamic icw.bits=4")
    assert contender(rows[-1]).options == {"icw.bits": 4} and contender(rows[-1]).cache == "dynamic"
    with pytest.raises(ValueError, match=r"'icw.bits' is 5; it takes one of: 8, 4"):
        choose_contenders(("int8-static",), options=("icw.bits=5",))
    # Older releases of transformers take no notice, and it would be `stock-static` once more.
    monkeypatch.setattr(bench_model, "leaves_heads_grouped", lambda: False)
    assert "stock-static-gqa" not in choose_contenders(())
    with pytest.raises(ValueError, match="does not read TRANSFORMERS_SDPA_FORCE_GQA, which stock-static-gqa needs"):
        choose_contenders(("stock-static", "stock-static-gqa"))


@pytest.mark.parametrize("name", [name for name in CONTENDERS if name != "hqq" or is_hqq_available()])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_filled_caches(name: str, family: str) -> None:
    if (name, family) == ("hqq", "gemma2"):
        pytest.skip("QuantizedCache has no sliding layers")
    model = tiny_model(family, attention="eager", num_hidden_layers=2)
    chosen = settings(contenders=(name,))
    session = bench_model.Session(CONTENDERS[name], model, chosen)
    session.fill(40)
    assert session.cache.get_seq_length() == 40
    chosen_one = CONTENDERS[name]
    if chosen_one.cache != "hqq":
        held = [getattr(layer, kind) for layer in session.cache.layers for kind in ("keys", "values")]
        assert all(isinstance(tensor, QuantizedKV) == chosen_one.is_int8 for tensor in held)
        assert all(tensor.dequantize().std() > 0.5 if chosen_one.is_int8 else tensor.std() > 0.5 for tensor in held)
        assert held[-1].shape[2] == (40 if chosen_one.cache == "dynamic" else chosen.cache_len(40))
    assert session.cache_bytes() > 0


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_filled_caches_have_the_options(kind: str) -> None:
    """As the compiled model would have made them: it goes on with them."""
    model = tiny_model("llama", num_hidden_layers=2)
    asked = "icw.value_bits=4,icw.sink_tokens=2,icw.compiler=eager"
    session = bench_model.Session(contender(f"int8-{kind} {asked}"), model, settings())
    session.fill(40)
    for layer in session.cache.layers:
        assert ["int8" in str(each.value.format) for each in (layer.keys, layer.values)] == [True, False]
        assert all(each.value.kept for each in (layer.keys, layer.values))
    session.decode()
    assert session.cache.get_seq_length() == 41 and session.cache_bytes() > 0
    with pytest.raises(ValueError, match="only a prompt that runs through the model tells layers apart"):
        bench_model.Session(contender(f"int8-{kind} icw.skip_layers=0"), model, settings()).fill(40)


def test_only_the_contender_that_asks_forces_gqa(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRANSFORMERS_SDPA_FORCE_GQA", raising=False)
    for force in (False, True):
        with bench_model._force_gqa(force):
            assert os.environ["TRANSFORMERS_SDPA_FORCE_GQA"] == str(int(force))
    assert "TRANSFORMERS_SDPA_FORCE_GQA" not in os.environ


def result() -> ContextResult:
    """Made up."""
    measured = {
        "eager": Measured(1000, [2.0, 2.0], [0.4, 0.8], 3000, 9000),
        "stock-static": Measured(1000, [1.0, 3.0], [0.7, 0.7], 4000, 9000),
        "int8-static": Measured(500, [1.0, 3.0], [0.2, 0.3], 3540, 9000),
        "hqq": Measured(failed="no hqq"),
    }
    return ContextResult(128, True, 1000, 500, measured=measured)


def test_results() -> None:
    made = result()
    assert made.fastest_stock == "eager"
    assert made.saved_share("int8-static", "stock-static") == pytest.approx(0.92)
    assert made.saved_share("int8-static", "hqq") is None
    data = json.loads(json.dumps(made.to_dict()))
    assert data["ratios"]["int8-static / eager"]["decode"][0] == pytest.approx(0.4375)
    assert data["ratios"]["int8-static / stock-static"]["prefill"] == [1.0, 1.0, 1.0]
    assert data["measured"]["eager"]["decode_median_quartiles"][0] == pytest.approx(0.6)
    notes = context_notes(made)
    assert "2.000 times the context in the same bytes" in notes[0]
    assert notes[1].startswith("int8-static over stock-static: prefill 1.000x") and "92% of that saving" in notes[1]
    made.measured["int8-static icw.bits=4"] = Measured(250, [0.5, 1.5], [0.1, 0.15], 3300, 9000)
    assert made.to_dict()["ratios"]["int8-static icw.bits=4 / int8-static"]["decode"][0] == pytest.approx(0.5)
    assert "int8-static / int8-static icw.bits=4" not in made.to_dict()["ratios"]
    assert context_notes(made)[-1].startswith("int8-static icw.bits=4 over int8-static: prefill 0.500x")
    made.measured["int8-static"].cuda_graphs = CudaGraphs(2, 30)
    (again,) = contexts({"contexts": [json.loads(json.dumps(made.to_dict()))]})
    assert "int8-static: CUDA graphs recorded 2, replayed 30 times" in context_notes(again)


def test_plot(tmp_path: Path) -> None:
    plot_contexts([result()], "made up", tmp_path / "plot.svg")
    drawn = (tmp_path / "plot.svg").read_text()
    assert drawn.startswith("<?xml") and "svg" in drawn


def test_command(tmp_path: Path) -> None:
    """Both workers, with a contender that compiles nothing."""
    folder, file = tmp_path / "model", tmp_path / "results.json"
    tiny_model(num_hidden_layers=1).save_pretrained(folder)
    arguments = ["bench", "--model", str(folder), "--contexts", "32", "--steps", "2", "--prefill-rounds", "3"]
    arguments += ["--contenders", "eager", "--dtype", "float32", "--json", str(file)]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "32 tokens (prompt run through the model)" in done.output and "fastest float" in done.output
    data = json.loads(file.read_text())
    assert data["torch"] == torch.__version__ and data["settings"]["steps"] == 2
    measured = data["contexts"][0]["measured"]["eager"]
    assert len(measured["prefill_seconds"]) == 3 and len(measured["decode_seconds"]) == 2
    assert measured["peak_bytes"] > measured["rise_bytes"] > 0 and not measured["failed"]
    assert measured["cache_bytes"] == 2 * 2 * 38 * 256  # 2 sites, 2 heads, 32 + 4 + 2 rows of 64 float32


@pytest.mark.slow
def test_contenders_beside_each_other(tmp_path: Path) -> None:
    """On a filled cache; one that fails is said, and keeps no other from running."""
    tiny_model("gemma2", attention="eager").save_pretrained(tmp_path)
    names = ("hqq", "int8-static") if is_hqq_available() else ("int8-static",)
    chosen = settings(str(tmp_path), contenders=names, max_prefill=0, dtype="float32")
    measured, other_load = bench_model.time_context(chosen, 40, lambda said: None)
    assert 0 <= other_load <= 1
    assert len(measured["int8-static"].decode_seconds) == 2 and not measured["int8-static"].prefill_seconds
    # A layer that slides over 16 rows and one of 40 + 4 + 2; 2 sites, 2 heads, 64 bytes and a float32 scale, and the
    # shift of each channel.
    assert measured["int8-static"].cache_bytes == 2 * 2 * ((16 + 46) * 68 + 2 * 64)
    if "hqq" in names:
        assert "only supported for models with only full attention" in measured["hqq"].failed


ON_CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))


@pytest.mark.parametrize("device", ["cpu", ON_CUDA])
def test_operator(device: str) -> None:
    case = Case(4, 2, 64, 512)
    found = run_case(case, batch=2, dtype=torch.bfloat16, device=torch.device(device), rounds=2)
    assert set(found.seconds) | set(found.failed) == set(OPERATOR_CONTENDERS)
    assert {"int8", "int8, masked", "int8, quarter", "sdpa, gqa", "stock static", "bytes"} <= set(found.seconds)
    assert all(len(taken) == 2 for taken in found.seconds.values())
    assert found.float_bytes == 2 * 2 * 2 * 512 * 128 and found.int8_bytes == 2 * 2 * 2 * 512 * 66


def test_operator_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("icw_compile.lab.bench.CASES", (Case(2, 2, 64, 256),))
    file = tmp_path / "results.json"
    done = CliRunner().invoke(
        app, ["bench", "--op", "attention", "--steps", "2", "--json", str(file)], catch_exceptions=False
    )
    assert done.exit_code == 0
    assert "2 heads on 2, D=64, 256 tokens" in done.output and "a quarter full over full" in done.output
    assert json.loads(file.read_text())["cases"][0]["over_int8"]["int8"] == [1.0, 1.0, 1.0]


@pytest.mark.slow
def test_startup_command(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    arguments = ["--depths", "1", "--contenders", "int8-static", "--prefill-rounds", "1", "--json", str(file)]
    done = CliRunner().invoke(app, ["bench", "--startup", *arguments], catch_exceptions=False)
    assert done.exit_code == 0
    assert "1 layers: seconds to the third token" in done.output and "int8-static" in done.output
    (depth,) = json.loads(file.read_text())["depths"]
    assert depth["layers"] == 1 and not depth["failed"]
    for starts in (depth["cold"], depth["warm"]):
        (start,) = starts["int8-static"]
        assert len(start["seconds"]) == 3 and start["parts"]["compile_seconds"] > 0 < start["parts"]["capture_seconds"]


def test_what_is_made_of_starts(tmp_path: Path) -> None:
    parts = dict.fromkeys(("capture_seconds", "passes_seconds", "kernel_seconds", "compile_seconds"), 1.0)
    ours, stock = [Start([3.0, 2.0, 1.0], parts)] * 2, [Start([2.0, 1.0, 0.0], {})] * 2
    starts = {"stock-static": stock, "int8-static": ours}
    result = DepthResult(4, starts, starts, {"int8-dynamic": "it ended"})
    assert result.over_stock(result.cold, "int8-static") == (2.0, 2.0, 2.0)
    assert result.over_stock(result.cold, "stock-static") is None
    assert result.over_stock({"int8-static": ours}, "int8-static") is None
    assert depth_table(result).row_count == 3
    plot_depths([result, replace(result, layers=8)], "made up", tmp_path / "plot.svg")
    assert "int8-static" in (tmp_path / "plot.svg").read_text()
    assert contenders_to_start(()) == ("stock-static", "int8-static", "stock-dynamic", "int8-dynamic")
    with pytest.raises(ValueError, match="nothing to start in eager"):
        contenders_to_start(("eager", "int8-static"))


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantized_weights(weights: Any) -> None:
    pytest.importorskip("torchao", reason="torchao has no build for this platform")
    config = load_config("tinyllama-1.1b", layers=1)
    config.hidden_size, config.intermediate_size, config.vocab_size, config.head_dim = 128, 256, 64, 64
    config.num_attention_heads, config.num_key_value_heads = 2, 1
    model = build_model("tinyllama-1.1b", config, torch.float32, "cpu")
    ids = torch.arange(1, 9)[None]
    whole, expected = weights_bytes(model, "float"), model(ids).logits
    assert whole == sum(parameter.nbytes for parameter in model.parameters())
    linear = sum(part.weight.nbytes for part in model.modules() if isinstance(part, torch.nn.Linear))
    assert weights_bytes(model, weights) == whole - linear + linear // 4
    quantize_weights(model, weights)
    assert all(type(p.weight.data) is not torch.Tensor for p in model.modules() if isinstance(p, torch.nn.Linear))
    assert 1e-4 < relative_distance(model(ids).logits, expected) < (0.02 if weights == "int8" else 0.3)


def test_contenders_for_quantized_weights() -> None:
    assert "int8-static-float-weights" in choose_contenders((), "int8")
    assert "int8-static-float-weights" not in choose_contenders(())
    with pytest.raises(ValueError, match="int8-static-float-weights is for --weights int8 or int4"):
        choose_contenders(["int8-static-float-weights"])
    assert settings(weights="int8").weights_of(CONTENDERS["int8-static"]) == "int8"
    assert settings(weights="int8").weights_of(CONTENDERS["int8-static-float-weights"]) == "float"
