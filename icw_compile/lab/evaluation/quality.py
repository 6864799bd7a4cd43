"""How far the answers through one cache are from those through another, token by token.

A window of text is prefilled up to its scored part, which is then decoded teacher-forced, so that every score reads
keys and values as the cache keeps them. To score 16,384 tokens in minutes, many windows are decoded as one batch, and a
step takes several tokens of each (`Windows.chunk`; at most 16 keep to the decode kernels). Neither changes what is
measured: rows of a batch are independent, and a step writes its tokens to the cache before its queries read it, so each
query reads exactly the stored keys and values that it would read one token at a time (``tests/test_evaluation.py``
compares the two). Two of the others are not independent of it: transformers' `QuantizedCache` reads its last 128 tokens
and the whole chunk in float, and a scale per tensor is one scale for all windows of a batch.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from icw_compile.cache.static import cache_bytes
from icw_compile.lab.evaluation.contenders import Contender
from icw_compile.lab.evaluation.recall import Recall
from icw_compile.lab.terminal import Say

__all__ = ["Bucket", "Quality", "Windows", "measure", "recall_accuracy"]

BUCKETS = 4


@dataclass
class Windows:
    """The text to score, cut into overlapping windows: each token is scored once.

    Attributes:
        ids: int64 ``[windows, context + 1]``; the last token is only a target.
        stride: how many tokens of each window are scored, its last ones.
        batch: windows decoded together.
        chunk: tokens of each that a decode step takes.
        first: tokens that the first call takes of the part that is not scored; ``None`` for all of it.
        prompt_chunk: tokens that each of the other calls takes of it; ``None`` for all that is left.
    """

    ids: Tensor
    stride: int
    batch: int
    chunk: int
    first: int | None = None
    prompt_chunk: int | None = None

    @property
    def prompts(self) -> list[slice]:
        """The calls that the part in front of the scored one takes."""
        end = self.context - self.stride
        first = min(self.first or end, end)
        starts = range(first, end, self.prompt_chunk or end)
        return [slice(0, first), *(slice(start, min(start + starts.step, end)) for start in starts)]

    @classmethod
    def cut(
        cls, text: Tensor, bos: int | None, *, tokens: int, context: int, stride: int, batch: int, chunk: int
    ) -> "Windows":
        """Cut as many windows as score at least ``tokens`` tokens; each begins with ``bos``, if there is one.

        Args:
            text: int64 ``[tokens]``, without special tokens.

        Raises:
            ValueError: the lengths do not fit one another, or the text is too short.
        """
        if not 0 < stride < context or stride % chunk:
            raise ValueError(
                f"A stride of {stride} tokens must be shorter than the context of {context}, and a multiple of the "
                f"chunk of {chunk}."
            )
        taken = context + 1 - (bos is not None)
        count = math.ceil(tokens / stride)
        if (needed := (count - 1) * stride + taken) > len(text):
            raise ValueError(
                f"To score {tokens} tokens takes a text of {needed}; this one has {len(text)}. Give a longer --text, "
                "or fewer --tokens."
            )
        ids = text[:needed].unfold(0, taken, stride)
        if bos is not None:
            ids = torch.cat([torch.full((count, 1), bos), ids], dim=1)
        return cls(ids, stride, batch, chunk)

    @property
    def context(self) -> int:
        return self.ids.shape[1] - 1

    @property
    def steps(self) -> int:
        """Decode steps for all windows."""
        return math.ceil(len(self.ids) / self.batch) * (self.stride // self.chunk)


@dataclass
class Bucket:
    """Means over the scored tokens at some positions, of one contender against the float cache.

    Attributes:
        start, end: positions in the window, from and up to.
        tokens: how many were scored.
        perplexity, reference_perplexity, perplexity_ratio: its own, that of the float cache, and one by the other.
        kl_mean, kl_p99: Kullback-Leibler divergence KL(float || contender) of the next-token distributions, in nats.
        top1_agreement: how often both find the same token the likeliest, from 0 to 1.
        logit_distance: largest difference of a logit.
    """

    start: int
    end: int
    tokens: int
    perplexity: float
    reference_perplexity: float
    perplexity_ratio: float
    kl_mean: float
    kl_p99: float
    top1_agreement: float
    logit_distance: float


@dataclass
class Quality:
    """One contender: over all scored tokens, and by position; bytes of its cache for one batch, where one exists."""

    total: Bucket
    buckets: list[Bucket]
    cache_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _Scores:
    """What is kept of each scored token, float32 ``[windows, tokens]`` in pieces along both."""

    loss: list[Tensor] = field(default_factory=list)
    divergence: list[Tensor] = field(default_factory=list)
    agrees: list[Tensor] = field(default_factory=list)
    distance: list[Tensor] = field(default_factory=list)

    def add(self, logits: Tensor, reference: Tensor, targets: Tensor) -> None:
        ours, theirs = log_softmax(logits, -1), log_softmax(reference, -1)
        self.loss.append(cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets))
        self.divergence.append((theirs.exp() * (theirs - ours)).sum(-1))
        self.agrees.append((logits.argmax(-1) == reference.argmax(-1)).float())
        self.distance.append((logits - reference).abs().amax(-1))


def measure(rows: Sequence[Contender], windows: Windows, device: torch.device, say: Say) -> list[Quality]:
    """Score each of ``rows`` against the first; all decode in step, so that no logits are kept.

    Args:
        say: told 1 after each decode step of all rows, and before it what is run, and compiled, at first.
    """
    prompt = windows.context - windows.stride
    scores = [_Scores() for _ in rows]
    sizes: list[int | None] = []
    for ids in windows.ids.to(device).split(windows.batch):
        caches = [row.make_cache(windows.context) for row in rows]
        for row, cache in zip(rows, caches):
            say(f"prompt, {row.name}")
            for piece in windows.prompts:
                _call(row, cache, ids[:, piece], logits_to_keep=1)
        for start in range(prompt, windows.context, windows.chunk):
            step = slice(start, start + windows.chunk)
            targets = ids[:, start + 1 : start + windows.chunk + 1]
            reference: Tensor | None = None
            for row, cache, kept in zip(rows, caches, scores):
                if start == prompt:
                    say(f"first step, {row.name}")
                logits = _call(row, cache, ids[:, step]).float()
                reference = logits if reference is None else reference
                kept.add(logits, reference, targets)
            say(1)
            say("decoding")
        # An emulated cache, or one that keeps its own tensors, has no bytes to speak of.
        sizes = sizes or [
            cache_bytes(cache) if i == 0 or row.options is not None else None
            for i, (row, cache) in enumerate(zip(rows, caches))
        ]
    pieces = windows.stride // windows.chunk
    return [_quality(kept, scores[0], prompt, pieces, size) for kept, size in zip(scores, sizes)]


@torch.no_grad()
def _call(row: Contender, cache: Any, ids: Tensor, **kwargs: Any) -> Tensor:
    return row.call(ids, past_key_values=cache, use_cache=True, **kwargs).logits


def _quality(kept: _Scores, reference: _Scores, prompt: int, pieces: int, size: int | None) -> Quality:
    def joined(values: list[Tensor]) -> Tensor:
        """``[windows, stride]``"""
        return torch.cat([torch.cat(values[i : i + pieces], 1) for i in range(0, len(values), pieces)]).double()

    columns = [joined(v) for v in (kept.loss, reference.loss, kept.divergence, kept.agrees, kept.distance)]
    stride = columns[0].shape[1]
    edges = [round(i * stride / BUCKETS) for i in range(BUCKETS + 1)]
    buckets = [_bucket(columns, prompt, *edge) for edge in pairwise(edges) if edge[0] < edge[1]]
    return Quality(_bucket(columns, prompt, 0, stride), buckets, size)


def _bucket(columns: Sequence[Tensor], prompt: int, start: int, end: int) -> Bucket:
    loss, reference, divergence, agrees, distance = (column[:, start:end].flatten() for column in columns)
    ratio = (loss.mean() - reference.mean()).exp()
    perplexities = loss.mean().exp().item(), reference.mean().exp().item(), ratio.item()
    return Bucket(
        prompt + start,
        prompt + end,
        loss.numel(),
        *perplexities,
        divergence.mean().item(),
        # numpy's definition; `quantile` takes no more than 16 million values.
        divergence.sort().values[math.ceil(0.99 * divergence.numel()) - 1].item(),
        agrees.mean().item(),
        distance.max().item(),
    )


def recall_accuracy(
    rows: Sequence[Contender],
    recall: Recall,
    text: Tensor,
    *,
    length: int,
    samples: int,
    depths: int,
    chunk: int,
    device: torch.device,
) -> list[list[float]]:
    """How often each contender finds a value that a text of ``length`` tokens gave, by depth: ``[rows][depths]``.

    An answer counts if each of its tokens is the likeliest after the right ones before it.

    Raises:
        ValueError: the facts do not fit into ``length`` tokens, or the text is too short.
    """
    exams = [recall.exam(text, length, depths) for _ in range(samples)]
    asked = math.ceil(max(len(exam.questions) for exam in exams) / chunk) * chunk
    padded = [torch.cat([exam.questions, exam.questions[-1:].expand(asked - len(exam.questions))]) for exam in exams]
    questions = torch.stack(padded).to(device)
    sequences = torch.stack([exam.sequence for exam in exams]).to(device)
    result = []
    for row in rows:
        cache = row.make_cache(length + asked)
        _call(row, cache, sequences, logits_to_keep=1)
        found = torch.cat([_call(row, cache, piece).argmax(-1) for piece in questions.split(chunk, dim=1)], dim=1)
        right = torch.zeros(depths)
        for exam, answers, truth in zip(exams, found, questions):
            for depth, (start, end) in zip(exam.depths, exam.spans):
                right[depth] += torch.equal(answers[start - 1 : end - 1], truth[start:end])
        result.append((right / samples).tolist())
    return result
