"""``icw-compile eval``: the scores, the hard cases, and the numerical study that equalisation rests on."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support import relative_distance, run, tiny_model, tokens
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from icw_compile.lab.assets import HELDOUT_TEXT, MODEL, train
from icw_compile.lab.cli import app
from icw_compile.lab.evaluation.advise import Advice, _try_out, candidates
from icw_compile.lab.evaluation.codes import CODES as CODES_OF_4_BITS
from icw_compile.lab.evaluation.command import Prepared
from icw_compile.lab.evaluation.contenders import (
    FLOAT,
    FLOAT_COMPILED,
    HQQ_4,
    QUANTO_4,
    Contender,
    contenders,
    fp8_cache,
)
from icw_compile.lab.evaluation.hard import CASES, PAIRS, equivalence, harden
from icw_compile.lab.evaluation.quality import Windows, measure
from icw_compile.lab.evaluation.recall import Recall
from icw_compile.lab.reference import reference_cache
from icw_compile.lab.terminal import parse_options
from icw_compile.planner import plan

SETTING = {"icw.compiler": "eager", "icw.attention": "inductor"}


def cut(chunk: int = 8, batch: int = 2, **lengths: int) -> Windows:
    settings = {"tokens": 96, "context": 64, "stride": 32, "batch": batch, "chunk": chunk, **lengths}
    return Windows.cut(tokens(400)[0], 1, **settings)


def qualities(rows: list[Contender], windows: Windows) -> list[dict[str, Any]]:
    return [quality.to_dict() for quality in measure(rows, windows, torch.device("cpu"), lambda said: None)]


def test_windows_score_each_token_once() -> None:
    text = torch.arange(400)
    windows = Windows.cut(text, 1000, tokens=96, context=64, stride=32, batch=2, chunk=8)
    assert windows.ids.shape == (3, 65) and windows.ids[:, 0].eq(1000).all()
    targets = windows.ids[:, -windows.stride :].flatten().tolist()
    assert targets == list(range(32, 128))


@pytest.mark.parametrize("wrong", [{"stride": 64}, {"stride": 12}, {"tokens": 4000}])
def test_windows_that_do_not_fit(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        cut(**wrong)


def assert_same_scores(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Two ways of reading the same stored keys and values, which differ in the order of float32 sums alone.

    The scores are float32 as well: a log-probability of size 4 to 8 is rounded by up to 2**-22, and the divergence of a
    token is the difference of two, so that it is 2**-21 off where all of it adds up. That alone is 1 % of a mean of
    1.7e-6, and another one on each CPU.

    Besides, a number that lies between two steps of int8 may be rounded to either. A state is off by about 1e-6 of its
    size, at most 127 * 1e-6 steps, so that about one number in 4,000 is rounded the other way, and then differs by a
    whole step, where quantization errs by sqrt(1/12) of one: the logits move by sqrt(12 / 4,000) = 5 % of what
    quantization moves them. The divergence is the square of that move: 10 % at most. What changes in the first order,
    the mean loss, is bounded by the same 5 % of sqrt(2 * KL).
    """
    move = 0.05 * (2 * max(one["kl_mean"], other["kl_mean"])) ** 0.5 + 1e-6
    assert one["kl_mean"] == pytest.approx(other["kl_mean"], rel=0.1, abs=2.0**-21)
    assert one["logit_distance"] == pytest.approx(other["logit_distance"], rel=0.1, abs=1e-4)
    for name in ("perplexity", "perplexity_ratio"):
        assert math.log(one[name]) == pytest.approx(math.log(other[name]), rel=0, abs=move), name
    assert one["top1_agreement"] == pytest.approx(other["top1_agreement"], rel=0, abs=2.5 / one["tokens"]), "near ties"


def test_chunks_and_batches_change_no_score() -> None:
    """Several tokens a step, several windows a batch: each score still reads the same stored keys and values."""
    model = tiny_model()
    rows = contenders(model, [SETTING], others=False)
    rows.append(Contender("reference", model, lambda length: reference_cache(model, length)))
    together, alone = qualities(rows, cut()), qualities(rows, cut(chunk=1, batch=1))
    assert together[1]["total"]["kl_mean"] > 1e-7, "ours is quantized"
    for one, other in zip(together, alone, strict=True):
        assert_same_scores(one["total"], other["total"])
    assert_same_scores(together[1]["total"], together[2]["total"])


def test_scores() -> None:
    """Perplexity, divergence, agreement and distance, computed plainly from whole logits of the reference."""
    model = tiny_model()
    windows = cut()
    rows = [contenders(model, [])[0], Contender("ours", model, lambda length: reference_cache(model, length))]
    stock, ours = (q["total"] for q in qualities(rows, windows))
    assert stock["kl_mean"] == 0 and stock["top1_agreement"] == 1 and stock["perplexity_ratio"] == 1

    ids, prompt = windows.ids, windows.context - windows.stride
    chunks = (prompt, *[windows.chunk] * (windows.stride // windows.chunk))
    a, b = (run(model, row.make_cache(64), ids[:, :-1], chunks)[:, prompt:].double() for row in rows)
    p, q = a.log_softmax(-1), b.log_softmax(-1)
    losses = [-x.gather(-1, ids[:, prompt + 1 :, None]).mean() for x in (p, q)]
    assert ours["tokens"] == 96
    assert ours["reference_perplexity"] == pytest.approx(losses[0].exp().item(), rel=1e-5)
    plainly = {
        "tokens": 96,
        "perplexity": losses[1].exp().item(),
        "perplexity_ratio": (losses[1] - losses[0]).exp().item(),
        "kl_mean": (p.exp() * (p - q)).sum(-1).mean().item(),
        "top1_agreement": (a.argmax(-1) == b.argmax(-1)).double().mean().item(),
        "logit_distance": (a - b).abs().max().item(),
    }
    assert_same_scores(ours, plainly)


@pytest.fixture
def eager_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.compile`` without a backend runs the graph as it is: Inductor takes a minute, and is not tested."""
    compile_with = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda *args, backend="eager", **kw: compile_with(*args, backend=backend, **kw)
    )


@pytest.mark.usefixtures("eager_by_default")
def test_the_compiled_float_cache_is_a_row() -> None:
    """It computes in float although ours compiled the same module before, and ours stays int8 after it."""
    model, windows = tiny_model(), cut()
    rows = {row.name: row for row in contenders(model, [SETTING])}
    names = list(rows)
    assert names[:1] == [FLOAT] and names[2:3] == [FLOAT_COMPILED] and names[-1] == "fp8 per tensor"
    stock, ours, compiled = (rows[name] for name in names[:3])
    one, other = qualities([stock, ours, compiled], windows), qualities([stock, compiled, ours], windows)
    for quality in (one[2], other[1]):
        assert quality["total"]["kl_mean"] < 1e-8 and quality["total"]["logit_distance"] < 1e-4
    assert one[1]["total"]["kl_mean"] > 1e-7 and one[1] == other[2]


@pytest.mark.slow
def test_others_of_four_bits_stand_beside_ours_of_four() -> None:
    pytest.importorskip("hqq", reason="hqq has no build for this platform")
    pytest.importorskip("optimum.quanto", reason="optimum-quanto has no build for this platform")
    model = tiny_model()
    assert {HQQ_4, QUANTO_4}.isdisjoint(row.name for row in contenders(model, [SETTING]))
    rows = {row.name: row for row in contenders(model, [{"icw.value_bits": 4}])}
    with torch.no_grad():
        floats = model(tokens(141)).logits[:, -1]
        for name in (HQQ_4, QUANTO_4):
            cache = rows[name].make_cache(141)
            for piece in tokens(141).split((140, 1), dim=1):  # more than it keeps in float
                logits = model(piece, past_key_values=cache).logits[:, -1]
            assert {layer.nbits for layer in cache.layers} == {4}
            assert 1e-4 < relative_distance(logits, floats) < 0.5


def test_fp8_cache_has_one_scale_per_tensor() -> None:
    model = tiny_model()
    cache = fp8_cache(model, 16)
    with torch.no_grad():
        model(tokens(8), past_key_values=cache)
        keys = cache.layers[0].keys.clone()
        model(tokens(1, seed=2), past_key_values=cache)
    layer = cache.layers[0]
    assert [scale.numel() for scale in layer.scales] == [1, 1]
    held = layer.keys / layer.scales[0]
    torch.testing.assert_close(held.to(torch.float8_e4m3fn).float(), held)
    torch.testing.assert_close(layer.keys[:, :, :8], keys[:, :, :8], rtol=0, atol=0)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_hard_models_are_equivalent(name: str, case: str) -> None:
    model, ids = tiny_model(name), tokens(48, batch=2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    hardened = harden(model, case, ids)
    assert equivalence(hardened, ids) <= 1e-5
    assert all(value.equal(before[key]) for key, value in model.state_dict().items()), "the model is left as it is"
    if case.startswith(("keys-low", "keys-mid", "values")):
        assert hardened.origin is model


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("keys")])
def test_channels_of_zero_stay_as_they_are(case: str) -> None:
    """A head that a model does not use in full, as `set_induction_heads` leaves some."""
    model, ids = tiny_model("qwen2"), tokens(48, batch=2)
    head_dim = model.model.layers[0].self_attn.head_dim
    for projection in (model.model.layers[0].self_attn.k_proj, model.model.layers[0].self_attn.q_proj):
        projection.weight.data[2:head_dim], projection.bias.data[2:head_dim] = 0.0, 0.0
    hardened = harden(model, case, ids)
    assert equivalence(hardened, ids) <= 1e-5
    assert hardened.model.model.layers[0].self_attn.k_proj.weight.isfinite().all()


def stored(model: Any, ids: Tensor, name: str) -> Tensor:
    """Keys or values of the first layer, ``[kv_heads, tokens, head_dim]``."""
    cache = contenders(model, [])[0].make_cache(ids.shape[1])
    with torch.no_grad():
        model(ids, past_key_values=cache)
    return getattr(cache.layers[0], name)[0]


@pytest.mark.parametrize("case", [case for case in CASES if case != "sink"])
def test_outlier_channels_stand_above_the_median(case: str) -> None:
    model, ids = tiny_model(), tokens(64)
    hard = harden(model, case, ids).model
    amplitudes = stored(hard, ids, "values" if case.startswith("values") else "keys").square().mean(1).sqrt()
    ratio = float(case.rpartition("-")[2].removesuffix("x"))
    largest = amplitudes.sort(-1, descending=True).values / amplitudes.median(-1, keepdim=True).values
    # The name's ratio is of the weights, up to the next power of two; this is what tokens make of it.
    assert (largest[:, : 2 * PAIRS] > 0.7 * ratio).all() and (largest[:, 0] < 4 * ratio).all()
    assert (largest[:, 2 * PAIRS :] < 4).all()


def test_sink_dwarfs_the_rest() -> None:
    model, ids = tiny_model(), tokens(64)
    ids[:, 0] = 1
    norms = stored(harden(model, "sink", ids).model, ids, "keys").norm(dim=-1)
    assert (norms[:, 0] > 4 * norms[:, 1:].max(-1).values).all()


def test_models_that_cannot_be_made_hard() -> None:
    for name in ("qwen3", "phi3"):
        with pytest.raises(ValueError, match=f"No hard case can be made of a {name} model"):
            harden(tiny_model(name), "keys-mid-30x", tokens(8))
    with pytest.raises(ValueError, match="keys-mid-30x"):
        harden(tiny_model(), "keys-mid-31x", tokens(8))


def test_recall_exam() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    text = torch.tensor(tokenizer(HELDOUT_TEXT.read_text()[:4000], add_special_tokens=False).input_ids)
    exam = Recall(tokenizer).exam(text, 256, depths=4)
    assert len(exam.sequence) == 256 and sorted(exam.depths) == [0, 1, 2, 3]
    said, asked = tokenizer.decode(exam.sequence), tokenizer.decode(exam.questions)
    facts = [line for line in said.split("\n") if line.startswith("# ")]
    assert sorted(facts) == sorted(line for line in asked.split("\n") if line)
    for depth, (start, end) in zip(exam.depths, exam.spans):
        assert facts[depth].endswith(tokenizer.decode(exam.questions[start:end]))
    with pytest.raises(ValueError, match="longer sequence"):
        Recall(tokenizer).exam(text, 16, depths=4)


def test_recall_practice() -> None:
    """Rows of the asked length, in which what follows a key that was there before is what followed it then."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    text = torch.tensor(tokenizer(HELDOUT_TEXT.read_text()[:4000], add_special_tokens=False).input_ids)
    rows = Recall(tokenizer).practice(text, 257)
    repeated = filled = 0
    for _ in range(20):
        row = next(rows)
        assert row.shape == (257,) and row[0] == tokenizer.bos_token_id
        lines = tokenizer.decode(row, skip_special_tokens=True).split("\n")[:-1]  # the last one may be cut
        facts: dict[str, str] = {}
        for line in lines:
            if line.startswith("# "):
                _, key, value = line.split(" ")
                repeated += key in facts
                assert facts.setdefault(key, value) == value
        filled += any(line and not line.startswith("#") for line in lines)
    assert repeated > 200 and filled > 10
    with pytest.raises(ValueError, match="No practice"):
        next(Recall(tokenizer).practice(text, 16))


def test_induction_heads() -> None:
    """Before any training: the previous token, the token itself, and what followed the key when it was there before."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = train.build_model(tokenizer, "qwen2", MODEL).eval()
    train.set_induction_heads(model, seed=0)
    ids = tokenizer("\n# altar mouth\n\n# angel name\n\n# ark night\n\n# beast nation\n\n# angel", return_tensors="pt")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(ids.input_ids, output_attentions=True).attentions
    tokens = tokenizer.convert_ids_to_tokens(ids.input_ids[0])
    assert attentions[0][0, 0, -1].argmax() == len(tokens) - 2 and attentions[0][0, 1, -1].argmax() == len(tokens) - 1
    assert attentions[2][0, 2, -1].argmax() == tokens.index(tokenizer.tokenize(" name")[0])

    with torch.no_grad():
        before = model(ids.input_ids).logits
        assert model.model.layers[2].self_attn.k_proj.weight.abs().amax(1).eq(0).sum() == 32
        train.fill_unread_keys(model, AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32))
        assert model.model.layers[2].self_attn.k_proj.weight.abs().amax(1).all()
        torch.testing.assert_close(model(ids.input_ids).logits, before)


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_training(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps from the shipped model, some rows of them recall practice."""
    verses = HELDOUT_TEXT.read_text().replace("\n", " ").split(". ")
    lines = [
        f"{book}{i // 30 + 1}:{i % 30 + 1} {verse}." for book in ("Ge", "1Sm") for i, verse in enumerate(verses[:150])
    ]
    (tmp_path / "verses.txt").write_text("\n".join(lines))
    monkeypatch.setattr(train, "SHORT_CONTEXT", 64)
    monkeypatch.setattr(train, "LONG_CONTEXT", 128)
    out = tmp_path / "model"
    train.main(
        tmp_path / "verses.txt", model_type, MODEL, 0.5, out, tmp_path / "heldout.txt", steps=2, tokens_per_step=256,
        compiled=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.model_type == model_type and model.dtype == torch.bfloat16
    moved = (model.lm_head.weight.float() - AutoModelForCausalLM.from_pretrained(MODEL).lm_head.weight.float()).abs()
    assert 0 < moved.max() < 0.1
    assert (tmp_path / "heldout.txt").read_text().startswith(verses[0])


def test_options_are_parsed() -> None:
    assert parse_options("icw.attention=inductor,icw.strict=true,x=3") == {
        "icw.attention": "inductor", "icw.strict": True, "x": 3,
    }  # fmt: skip
    assert parse_options("") == {}
    with pytest.raises(ValueError, match="name=value"):
        parse_options("icw.strict")


@pytest.mark.usefixtures("eager_by_default")
def test_command(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    written, plot = tmp_path / "eval.json", tmp_path / "eval.png"
    arguments: list[object] = ["eval", "--layers", 1, "--tokens", 64, "--context", 96, "--stride", 32]
    arguments += [
        "--hard",
        "keys-mid-100x",
        "--recall",
        96,
        "--option",
        ",".join(f"{k}={v}" for k, v in SETTING.items()),
        "--option",
        ",".join(f"{k}={v}" for k, v in {**SETTING, "icw.keys": "plain", "icw.values": "plain"}.items()),
        "--json",
        written,
        "--plot",
        plot,
    ]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0 and "the model cannot do the task" in result.output
    as_it_is, hard = json.loads(written.read_text())["cases"]
    equalized, plain = (name for name in as_it_is["rows"] if name.startswith("icw_int8kv"))
    assert as_it_is["rows"][equalized]["total"]["kl_mean"] < 1e-3
    assert hard["rows"][equalized]["total"]["kl_mean"] < 1e-3 < hard["rows"][plain]["total"]["kl_mean"]
    assert 0.5 < as_it_is["rows"][plain]["cache_bytes"] / as_it_is["rows"]["float"]["cache_bytes"] < 0.52
    assert hard["equivalence"] <= 1e-5 and plot.stat().st_size > 0
    assert hard["rows"]["float"]["total"]["perplexity"] == as_it_is["rows"]["float"]["total"]["perplexity"], "same bits"


@pytest.mark.parametrize("name", CODES_OF_4_BITS)
def test_codes_of_four_bits(name: str) -> None:
    """What each reads back has a few levels, is near, and a group of zeros stays one; only a zero point spends more."""
    code = CODES_OF_4_BITS[name]
    x = torch.randn(2, 50, 64, generator=torch.Generator().manual_seed(0))
    x[0, :5] = 0.0
    read = code.read_back(x)
    assert read.shape == x.shape and not read[0, :5].any()
    assert 0.03 < relative_distance(read, x) < 0.12
    if "rotated" not in name:
        assert all(len(row.unique()) <= 16 for row in read[..., :32].flatten(0, 1))
    assert code.bits_per_number <= 5.0


def test_candidates() -> None:
    """The cheapest first; a layer that is hurt most is the first to stay at 8 bits."""
    model = tiny_model(num_hidden_layers=2)
    found = candidates(model, {"keys": [0.5, 0.1], "values": [0.01, 0.02]}, 65536)
    assert [(each.options, pytest.approx(each.harm)) for each in found] == [
        ({"icw.bits": 4}, 0.63),
        ({"icw.value_bits": 4}, 0.03),
        ({"icw.bits": 4, "icw.eight_bit_layers": [0]}, 0.12),
        ({"icw.key_bits": 4}, 0.6),
        ({"icw.value_bits": 4, "icw.eight_bit_layers": [1]}, 0.01),
        ({"icw.key_bits": 4, "icw.eight_bit_layers": [0]}, 0.1),
    ]
    ratios = [each.bytes_ratio for each in found]
    in_eight_bits = plan(model, cache="static").evaluate(tokens=65536)
    assert ratios == sorted(ratios) and ratios[0] < 0.6 * in_eight_bits.bytes / in_eight_bits.float_bytes
    assert not candidates(model, {"keys": [0.5, 0.1], "values": [0.01, 0.02]}, 100), "the last 128 tokens are float"


FOUR, VALUES = '{"icw.bits": 4}', '{"icw.value_bits": 4}'
BUT_ONE = '{"icw.value_bits": 4, "icw.eight_bit_layers": [1]}'


@pytest.mark.parametrize(
    ("budget", "tried", "chosen"),
    [
        (0.001, ["{}"], None),
        (1.0, ["{}", FOUR], FOUR),
        # 4 bits do two thirds of what adding up says: so others are expected to do.
        (0.035, ["{}", FOUR, VALUES], VALUES),
        # What is expected to be within the budget is not, as measured: the next one.
        (0.033, ["{}", FOUR, VALUES, BUT_ONE], BUT_ONE),
        (0.016, ["{}", FOUR], "{}"),
    ],
)
def test_the_cheapest_within_the_budget(budget: float, tried: list[str], chosen: str | None) -> None:
    model = tiny_model(num_hidden_layers=2)
    windows = Windows.cut(torch.arange(9000) % 90, None, tokens=16, context=8192, stride=16, batch=1, chunk=16)
    ready = Prepared(model, None, windows.ids, windows)
    measures = {"8 bits": 0.015, FOUR: 0.015 + 0.42, VALUES: 0.034, BUT_ONE: 0.02}
    said = []

    def measured(what: str, rows: Sequence[Contender]) -> list[float]:
        said.append(json.dumps(dict(rows[0].options or {})))
        return [measures[what]]

    alone = {"keys": [0.5, 0.1], "values": [0.01, 0.02]}
    advice = Advice(budget, alone, _try_out(ready, alone, budget, measured))
    assert said == tried
    assert (json.dumps(advice.chosen.options) if advice.chosen else None) == chosen


@pytest.mark.slow
def test_advise(tmp_path: Path) -> None:
    file = tmp_path / "advice.json"
    arguments = "--model kjv-llama-2m --tokens 128 --context 1024 --stride 64 --batch 2 --advise 5e-3 --json"
    result = CliRunner().invoke(app, ["eval", *arguments.split(), str(file)], catch_exceptions=False)
    data = json.loads(file.read_text())
    assert result.exit_code == 0 and f"options={json.dumps(data['chosen']['options'])}" in result.stdout
    assert data["chosen"]["measured"] <= 5e-3 and data["chosen"]["bytes_ratio"] < data["tries"][0]["bytes_ratio"]
    assert all(0 < each < 0.1 for part in ("keys", "values") for each in data["alone"][part])


def test_advise_takes_the_model_as_it_is() -> None:
    result = CliRunner().invoke(app, ["eval", "--advise", "1e-3", "--hard", "all"])
    assert result.exit_code == 2 and "--advise chooses options" in result.output
