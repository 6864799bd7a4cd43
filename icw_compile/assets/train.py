"""Train `kjv-llama-2m`, the small causal language model behind the demo and the quality tests.

Text
    The King James Version of the Bible, as packaged by Debian in `bible-kjv-text` (version 4.38). The
    package's copyright file states that "the copyright for the King James Version text of the Bible is
    expired"; the text is in the public domain (in the United Kingdom, printing it is still governed by
    letters patent of the Crown). The `bible` program that prints it is GPL-2+; nothing of the program is
    used here. Get the text, one verse a line ("Ge1:1 In the beginning ..."), with

        apt-get install bible-kjv
        bible -f gen1:1-rev22:21 > kjv.txt

Training
    The shipped weights come from this command and the default options:

        python train.py --text kjv.txt

    It writes the model and tokenizer to `kjv-llama-2m/`, and the held-out text, which neither of them has
    seen, to `heldout.txt`, both beside this file. It took 9 minutes on two cores, shared with other work, of
    an x86-64 server CPU with AMX bfloat16 (PyTorch 2.13, transformers 5.23), with
    OMP_WAIT_POLICY=passive in the environment, which more than halves the time when cores are shared.

    360 steps are five passes over the text. In a run of 1300 steps, the held-out loss rose from the fifth
    pass on. So the held-out text had a say in this number and in the warmup, but none in the weights.
"""

import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ASSETS = Path(__file__).parent
BOS, EOS = "<|bos|>", "<|eos|>"
VOCAB_SIZE = 1536

# The first 24 chapters of 1 Samuel are prose with next to no verses that reappear elsewhere (0.2 % of their
# ten-word sequences do), unlike Kings and Chronicles or the Gospels, which repeat one another.
HELDOUT_BOOK, HELDOUT_CHAPTERS = "1Sm", 24

TOKENS_PER_STEP = 16384
TOKENS_PER_MICROBATCH = 4096  # small enough for activations to stay in cache; gradients are accumulated
SHORT_CONTEXT, LONG_CONTEXT = 512, 2048
LONG_FRACTION = 0.15  # the last steps use the long context, so that every position up to it is trained

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


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return a fresh model; its weights take 4.7 MB in bfloat16."""
    config = LlamaConfig(
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
    return LlamaForCausalLM(config)


def batches(tokens: Tensor, context: int, bos: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs and targets for ever, cutting the text at new places on each pass.

    Half of the windows start with the bos token in place of their first token, so that the model is at home
    both with prompts that carry it and with text cut out of the middle of a document.
    """
    while True:
        offset = int(torch.randint(context, ()))
        windows = tokens[offset:].unfold(0, context + 1, context)
        for rows in torch.randperm(len(windows)).split(TOKENS_PER_STEP // context):
            if len(rows) * context < TOKENS_PER_STEP:
                break
            batch = windows[rows]
            inputs, targets = batch[:, :-1].clone(), batch[:, 1:].contiguous()
            inputs[torch.rand(len(rows)) < 0.5, 0] = bos
            yield inputs, targets


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Return the rate of a warmup-stable-decay schedule, linear in both slopes.

    The warmup is long, a fifth of the steps, because with a short one the loss lingers above four nats.
    """
    warmup, decay = steps / 5, steps / 3
    return peak * min(1.0, (step + 1) / warmup, (steps - step) / decay)


@torch.inference_mode()
def total_loss(model: LlamaForCausalLM, tokens: Tensor, bos: int) -> float:
    """Return the summed loss in nats; each window starts anew with bos, each token is predicted once."""
    total = 0.0
    for window in tokens.split(LONG_CONTEXT):
        inputs = torch.cat([torch.tensor([bos]), window[:-1]])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=inputs[None], use_cache=False).logits[0]
        total += cross_entropy(logits.float(), window, reduction="sum").item()
    return total


def train(
    model: LlamaForCausalLM,
    tokens: Tensor,
    heldout: Tensor,
    bos: int,
    steps: int,
    peak: float,
    compiled: bool,
) -> None:
    """Train in place: bfloat16 matrix products, float32 weights and optimizer state."""

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
                stream = batches(tokens, context, bos)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, peak)

            inputs, targets = next(stream)
            rows = TOKENS_PER_MICROBATCH // context
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
                console.print(f"step {step + 1}: train {step_loss:.3f}, held-out {heldout_loss:.3f} nats per token")


def main(
    text: Annotated[Path, typer.Option(help="The verses, one a line.", exists=True, dir_okay=False)],
    out: Annotated[Path, typer.Option(help="Folder for the model and tokenizer.")] = ASSETS / "kjv-llama-2m",
    heldout_out: Annotated[Path, typer.Option(help="File for the held-out text.")] = ASSETS / "heldout.txt",
    steps: Annotated[int, typer.Option(help=f"Optimizer steps of {TOKENS_PER_STEP} tokens.")] = 360,
    peak_learning_rate: Annotated[float, typer.Option(help="Reached at the end of the warmup.")] = 3e-3,
    seed: Annotated[int, typer.Option(help="Seeds the weights and the order of the text.")] = 0,
    compiled: Annotated[bool, typer.Option(help="Compile the training step (needs a C++ compiler).")] = True,
) -> None:
    """Train the tokenizer and the model, save both, and report the saved model's held-out loss."""
    torch.manual_seed(seed)
    documents, heldout_text = read_documents(text)
    heldout_out.write_text(heldout_text, encoding="utf-8")
    tokenizer = train_tokenizer(documents)
    bos = tokenizer.bos_token_id
    encoded = tokenizer([document + EOS for document in documents], verbose=False)["input_ids"]
    tokens = torch.tensor([token for ids in encoded for token in ids])
    heldout = torch.tensor(tokenizer(heldout_text, add_special_tokens=False, verbose=False)["input_ids"])
    model = build_model(tokenizer)
    console.print(
        f"{model.num_parameters():,} parameters, {len(tokens):,} training tokens, {len(heldout):,} held-out tokens"
    )

    start = time.perf_counter()
    train(model, tokens, heldout, bos, steps, peak_learning_rate, compiled)
    minutes = (time.perf_counter() - start) / 60
    console.print(f"trained on {steps * TOKENS_PER_STEP:,} tokens in {minutes:.1f} minutes")

    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    saved = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    nats = total_loss(saved, heldout, bos)
    console.print(
        f"held-out perplexity {math.exp(nats / len(heldout)):.3f} per token, "
        f"{nats / math.log(2) / len(heldout_text.encode()):.4f} bits per byte"
    )


if __name__ == "__main__":
    typer.run(main)
