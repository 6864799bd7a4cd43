"""Train `kjv-llama-2m` and `kjv-qwen2-2m`, the small causal language models behind the demo and the quality tests.

Text
    The King James Version of the Bible, as packaged by Debian in `bible-kjv-text` (version 4.38). The
    package's copyright file states that "the copyright for the King James Version text of the Bible is
    expired"; the text is in the public domain (in the United Kingdom, printing it is still governed by
    letters patent of the Crown). The `bible` program that prints it is GPL-2+; nothing of the program is
    used here. Get the text, one verse a line ("Ge1:1 In the beginning ..."), with

        apt-get install bible-kjv
        bible -f gen1:1-rev22:21 > kjv.txt

Training
    The shipped Llama comes from this command and the default options:

        python train.py --text kjv.txt

    It writes the model and tokenizer to `kjv-llama-2m/`, and the held-out text, which neither of them has
    seen, to `heldout.txt`, both beside this file. It took 9 minutes on two cores, shared with other work, of
    an x86-64 server CPU with AMX bfloat16 (PyTorch 2.13, transformers 5.23), with
    OMP_WAIT_POLICY=passive in the environment, which more than halves the time when cores are shared.

    360 steps are five passes over the text. In a run of 1300 steps, the held-out loss rose from the fifth
    pass on. So the held-out text had a say in this number and in the warmup, but none in the weights.

    The shipped Qwen2 model goes on from it, with rows of the recall task of `icw-compile eval` beside those of text:

        python train.py --text kjv.txt --model-type qwen2 --start kjv-llama-2m --recall-share 0.5 \\
            --steps 600 --tokens-per-step 4096 --peak-learning-rate 1e-3

    To recall takes heads that find the key's earlier place and copy what followed. Practice alone made none in some
    hundreds of steps, from fresh weights or trained ones: with two facts a row, the answer stayed a coin's toss. So
    they are set before training, which then keeps and sharpens them (`set_induction_heads`). That needs the biases of
    Qwen2; of a Llama, recall practice makes nothing yet.
"""

import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from icw_compile.lab.evaluation.contenders import contenders
from icw_compile.lab.evaluation.quality import recall_accuracy
from icw_compile.lab.evaluation.recall import Recall

ASSETS = Path(__file__).parent
BOS, EOS = "<|bos|>", "<|eos|>"
VOCAB_SIZE = 1536

# The first 24 chapters of 1 Samuel are prose with next to no verses that reappear elsewhere (0.2 % of their
# ten-word sequences do), unlike Kings and Chronicles or the Gospels, which repeat one another.
HELDOUT_BOOK, HELDOUT_CHAPTERS = "1Sm", 24

CODE = 64  # channels of the residual stream in which an induction head finds, and names, a token
KEY_BIAS = 2.0  # standard deviation; what the input makes of the keys of the shipped Llama has 0.9 to 1.6
TOKENS_PER_MICROBATCH = 4096  # small enough for activations to stay in cache; gradients are accumulated
SHORT_CONTEXT, LONG_CONTEXT = 512, 2048
LONG_FRACTION = 0.15  # the last steps use the long context, so that every position up to it is trained
EXAM_LENGTHS = (256, 1024)

console = Console()


def read_documents(path: Path) -> tuple[list[str], str]:
    """Return the training text, one document a book, and the held-out text.

    Verses run together into one paragraph a chapter, without their numbers, so the model sees flowing prose.
    """
    chapters: dict[tuple[str, int], list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        verse = re.fullmatch(r"(\d?[A-Za-z]+)(\d+):\d+ (.+)", line)
        if verse is None:
            raise typer.BadParameter(f"not a verse: {line!r}", param_hint="--text")
        chapters.setdefault((verse[1], int(verse[2])), []).append(verse[3].strip())

    books: dict[str, list[str]] = {}
    heldout: list[str] = []
    for (book, chapter), verses in chapters.items():
        is_heldout = book == HELDOUT_BOOK and chapter <= HELDOUT_CHAPTERS
        (heldout if is_heldout else books.setdefault(book, [])).append(" ".join(verses))
    return ["\n\n".join(book) for book in books.values()], "\n\n".join(heldout) + "\n"


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE; the whole byte alphabet is in it, so any text survives encoding."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, model_type: str, start: Path | None = None) -> PreTrainedModel:
    """Return a model, ``"llama"`` or ``"qwen2"``, with fresh weights or those of ``start``; 4.7 MB in bfloat16.

    The biases of Qwen2's keys are drawn wide, because training hardly moves a bias, and in Qwen2 they are larger than
    what the input makes of the keys.
    """
    config = AutoConfig.for_model(
        model_type,
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=384,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = AutoModelForCausalLM.from_config(config)
    started: dict[str, Tensor] = {}
    if start is not None:
        started = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32).state_dict()
        lacking = model.load_state_dict(started, strict=False)
        if lacking.unexpected_keys or not all(name.endswith("_proj.bias") for name in lacking.missing_keys):
            raise typer.BadParameter(f"not a model of this shape: {lacking}", param_hint="--start")
    for name, parameter in model.named_parameters():
        if name.endswith("k_proj.bias") and name not in started:
            torch.nn.init.normal_(parameter, std=KEY_BIAS)
    return model


@torch.no_grad()
def set_induction_heads(model: PreTrainedModel, seed: int) -> None:
    """Overwrite one KV head of the first layer and one of the third with an induction circuit (Olsson et al., 2022).

    Two query heads of the first layer attend to the previous token and to the token itself, and write a random code of
    it into two subspaces. They know places by their biases alone: for a query bias that is the key bias turned by
    ``-o`` positions, the score of tokens s and t is a sum of ``cos((s - t - o) theta)`` over rotary pairs, largest
    where ``s - t = o``. The third layer asks for the tokens whose previous one has the code of this one, in its slow
    pairs, where distance hardly matters, and writes their code as the embedding that it is a part of.
    """
    head_dim, embedding = model.config.head_dim, model.get_input_embeddings().weight
    mean = embedding.mean(0) / embedding.mean(0).norm()
    directions = torch.randn(len(mean), 3 * CODE, generator=torch.Generator().manual_seed(seed))
    directions -= mean[:, None] * (mean @ directions)  # what all tokens have in common says nothing
    code, previous, own = torch.linalg.qr(directions).Q.T.split(CODE)

    def rows(projection: Any, head: int) -> tuple[Tensor, Tensor]:
        place = slice(head * head_dim, (head + 1) * head_dim)
        weight, bias = projection.weight[place], projection.bias[place]
        return weight.zero_(), bias.zero_()

    attention, norm = model.model.layers[0].self_attn, model.model.layers[0].input_layernorm.weight
    theta = model.config.rope_parameters["rope_theta"] ** (-torch.arange(8) / (head_dim // 2))
    # The score of the right place is 8 above that of its neighbours.
    size = (8 * math.sqrt(head_dim) / (1 - theta.cos()).sum()).sqrt()
    _, bias = rows(attention.k_proj, 0)
    bias[:8] = size
    for head, (offset, subspace) in enumerate([(1, previous), (0, own)]):
        _, bias = rows(attention.q_proj, head)
        bias[:8] = size * (offset * theta).cos()
        bias[head_dim // 2 :][:8] = -size * (offset * theta).sin()
        attention.o_proj.weight[:, head * head_dim : (head + 1) * head_dim] = subspace.T
    weight, _ = rows(attention.v_proj, 0)
    weight.copy_(code / norm)

    attention, norm = model.model.layers[2].self_attn, model.model.layers[2].input_layernorm.weight
    slow = torch.arange(head_dim).view(2, -1)[:, head_dim // 4 :].flatten()
    weight, _ = rows(attention.k_proj, 1)
    weight[slow] = previous[: len(slow)] / norm
    weight, _ = rows(attention.v_proj, 1)
    weight.copy_(own / norm)
    for head in (2, 3):
        weight, _ = rows(attention.q_proj, head)
        weight[slow] = 6 * own[: len(slow)] / norm
        attention.o_proj.weight[:, head * head_dim : (head + 1) * head_dim] = code.T


@torch.no_grad()
def fill_unread_keys(model: PreTrainedModel, start: PreTrainedModel) -> None:
    """Give key channels that are zero, and that no query reads, the weights of ``start``: the same function.

    `set_induction_heads` leaves such channels, and training never moves them: their gradients are products with zeros.
    No real cache is half zeros.
    """
    for layer, started in zip(model.model.layers, start.model.layers):
        attention = layer.self_attn
        heads = model.config.num_key_value_heads
        half = attention.head_dim // 2

        def size(projection: Any) -> Tensor:
            """Of each rotary pair of each KV head, over the heads that share it, ``[kv_heads, 1, pairs]``."""
            parameters = torch.cat([projection.weight, projection.bias[:, None]], dim=1).abs().amax(1)
            return parameters.view(heads, -1, half).amax(1, keepdim=True)  # noqa: B023

        unread = (size(attention.q_proj) == 0) & (size(attention.k_proj) == 0)
        rows = unread.expand(-1, 2, -1).flatten()
        attention.k_proj.weight[rows] = started.self_attn.k_proj.weight[rows].to(attention.k_proj.weight.dtype)


def batches(
    tokens: Tensor, context: int, bos: int, tokens_per_step: int, recall: Recall, recall_share: float
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs and targets for ever, cutting the text at new places on each pass.

    Half of the windows start with the bos token in place of their first token, so that the model is at home
    both with prompts that carry it and with text cut out of the middle of a document. A share of the rows is practice
    of the recall task in place of the text alone.
    """
    practice = recall.practice(tokens, context + 1)
    while True:
        offset = int(torch.randint(context, ()))
        windows = tokens[offset:].unfold(0, context + 1, context)
        for rows in torch.randperm(len(windows)).split(tokens_per_step // context):
            if len(rows) * context < tokens_per_step:
                break
            batch = windows[rows]
            inputs, targets = batch[:, :-1].clone(), batch[:, 1:].contiguous()
            inputs[torch.rand(len(rows)) < 0.5, 0] = bos
            for row in range(round(recall_share * len(rows))):
                practised = next(practice)
                inputs[row], targets[row] = practised[:-1], practised[1:]
            yield inputs, targets


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Return the rate of a warmup-stable-decay schedule, linear in both slopes.

    The warmup is long, a fifth of the steps, because with a short one the loss lingers above four nats.
    """
    warmup, decay = steps / 5, steps / 3
    return peak * min(1.0, (step + 1) / warmup, (steps - step) / decay)


@torch.inference_mode()
def total_loss(model: PreTrainedModel, tokens: Tensor, bos: int) -> float:
    """Return the summed loss in nats; each window starts anew with bos, each token is predicted once."""
    total = 0.0
    for window in tokens.split(LONG_CONTEXT):
        inputs = torch.cat([torch.tensor([bos]), window[:-1]])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=inputs[None], use_cache=False).logits[0]
        total += cross_entropy(logits.float(), window, reduction="sum").item()
    return total


def recall(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, text: Tensor, length: int) -> float:
    """Return the share of right answers over all depths, with the float cache, in 16 texts of ``length`` tokens."""
    shares = recall_accuracy(
        contenders(model, [], others=False), Recall(tokenizer, seed=1), text, length=length, samples=16, depths=4,
        chunk=8, device=torch.device("cpu"),
    )  # fmt: skip
    return sum(shares[0]) / len(shares[0])


def train(
    model: PreTrainedModel,
    tokens: Tensor,
    heldout: Tensor,
    tokenizer: PreTrainedTokenizerFast,
    steps: int,
    tokens_per_step: int,
    peak: float,
    recall_share: float,
    seed: int,
    compiled: bool,
) -> None:
    """Train in place: bfloat16 matrix products, float32 weights and optimizer state."""
    bos = tokenizer.bos_token_id

    def batch_loss(inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=inputs, use_cache=False).logits
        return cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    loss_function = torch.compile(batch_loss, dynamic=False) if compiled else batch_loss
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), fused=True)

    long_from = steps - round(steps * LONG_FRACTION)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=steps)
        for step in range(steps):
            if step in (0, long_from):
                context = SHORT_CONTEXT if step < long_from else LONG_CONTEXT
                stream = batches(tokens, context, bos, tokens_per_step, Recall(tokenizer, seed + step), recall_share)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, peak)

            inputs, targets = next(stream)
            rows = max(1, TOKENS_PER_MICROBATCH // context)
            step_loss = 0.0
            for part, part_targets in zip(inputs.split(rows), targets.split(rows), strict=True):
                loss = loss_function(part, part_targets) * len(part) / len(inputs)
                loss.backward()
                step_loss += loss.item()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()

            progress.update(task, advance=1, description=f"loss {step_loss:.3f}")
            if step % 100 == 99:
                heldout_loss = total_loss(model, heldout, bos) / len(heldout)
                able = ""
                if recall_share:
                    able = ", recall " + ", ".join(f"{recall(model, tokenizer, heldout, n):.0%}" for n in EXAM_LENGTHS)
                console.print(
                    f"step {step + 1}: train {step_loss:.3f}, held-out {heldout_loss:.3f} nats per token{able}"
                )


def main(
    text: Annotated[Path, typer.Option(help="The verses, one a line.", exists=True, dir_okay=False)],
    model_type: Annotated[Literal["llama", "qwen2"], typer.Option(help="The architecture.")] = "llama",
    start: Annotated[
        Path | None, typer.Option(help="Folder of a trained model to go on from: its weights and its tokenizer.")
    ] = None,
    recall_share: Annotated[float, typer.Option(help="Share of rows that practise the recall task.")] = 0.0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the model and tokenizer.", show_default="kjv-TYPE-2m")
    ] = None,
    heldout_out: Annotated[Path, typer.Option(help="File for the held-out text.")] = ASSETS / "heldout.txt",
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 360,
    tokens_per_step: Annotated[int, typer.Option(help=f"A multiple of {LONG_CONTEXT}.")] = 16384,
    peak_learning_rate: Annotated[float, typer.Option(help="Reached at the end of the warmup.")] = 3e-3,
    seed: Annotated[int, typer.Option(help="Seeds the weights and the order of the text.")] = 0,
    compiled: Annotated[bool, typer.Option(help="Compile the training step (needs a C++ compiler).")] = True,
) -> None:
    """Train the tokenizer and the model, save both, and report the saved model's held-out loss."""
    torch.manual_seed(seed)
    documents, heldout_text = read_documents(text)
    heldout_out.write_text(heldout_text, encoding="utf-8")
    tokenizer = train_tokenizer(documents) if start is None else AutoTokenizer.from_pretrained(start)
    encoded = tokenizer([document + EOS for document in documents], verbose=False)["input_ids"]
    tokens = torch.tensor([token for ids in encoded for token in ids])
    heldout = torch.tensor(tokenizer(heldout_text, add_special_tokens=False, verbose=False)["input_ids"])
    model = build_model(tokenizer, model_type, start)
    if recall_share and model_type == "qwen2":
        set_induction_heads(model, seed)
    console.print(
        f"{model.num_parameters():,} parameters, {len(tokens):,} training tokens, {len(heldout):,} held-out tokens"
    )

    began = time.perf_counter()
    train(model, tokens, heldout, tokenizer, steps, tokens_per_step, peak_learning_rate, recall_share, seed, compiled)
    minutes = (time.perf_counter() - began) / 60
    console.print(f"trained on {steps * tokens_per_step:,} tokens in {minutes:.1f} minutes")

    if start is not None and recall_share and model_type == "qwen2":
        fill_unread_keys(model, AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32))
    out = out or ASSETS / f"kjv-{model_type}-2m"
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    saved = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    nats = total_loss(saved, heldout, tokenizer.bos_token_id)
    console.print(
        f"held-out perplexity {math.exp(nats / len(heldout)):.3f} per token, "
        f"{nats / math.log(2) / len(heldout_text.encode()):.4f} bits per byte"
    )


if __name__ == "__main__":
    typer.run(main)
