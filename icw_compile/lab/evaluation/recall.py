r"""Key-value recall: facts strewn in text, and asked for at its end.

A fact is a line ``# key value``, two ordinary words that say nothing about one another; to ask for it is to write
``# key`` once more. The task is plain text, so that it works with any tokenizer and any model that can look back
(associative recall as in Arora et al., "Zoology", 2023, in a haystack of text).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Exam", "Recall"]

_KEYS = (
    "altar angel ark beast blood book bread brother cattle child city cloud corn covenant daughter desert door earth "
    "eye father field fire fish flesh flock fruit gate gold grass ground hand harvest heart hill horse host house "
    "king lamb land law light lion man master moon mother mountain"
)
_VALUES = (
    "mouth name night nation oil people place power priest prince prophet river rock sacrifice sea seed servant sheep "
    "shield ship silver sister son song soul spirit star stone strength sun sword tabernacle temple tent throne tower "
    "tree tribe valley vine voice wall war water wilderness wind wine woman"
)


@dataclass
class Exam:
    """One sequence and the questions after it.

    Attributes:
        sequence: int64 ``[length]``, text and facts.
        questions: int64 ``[asked]``, each with its answer.
        spans: where in ``questions`` each answer lies, from and up to.
        depths: the depth of the fact that each question asks for, 0 the first in the sequence.
    """

    sequence: Tensor
    questions: Tensor
    spans: list[tuple[int, int]]
    depths: list[int]


class Recall:
    """The recall task in the tokens of one tokenizer; every random choice follows from ``seed``."""

    def __init__(self, tokenizer: Any, seed: int = 0) -> None:
        def encode(text: str) -> list[int]:
            return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

        self.keys = [encode(f" {word}") for word in _KEYS.split()]
        self.values = [encode(f" {word}") for word in _VALUES.split()]
        self.mark, self.end = encode("\n#"), encode("\n")
        self.first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.generator = torch.Generator().manual_seed(seed)

    def _fact(self, key: int, value: int) -> list[int]:
        return [*self.mark, *self.keys[key], *self.values[value], *self.end]

    def exam(self, text: Tensor, length: int, depths: int) -> Exam:
        """Make an exam: ``length`` tokens with ``depths`` facts, evenly spaced in ``text``, int64 ``[tokens]``.

        Raises:
            ValueError: the facts do not fit, or there are too few tokens of text.
        """
        keys = torch.randperm(len(self.keys), generator=self.generator)[:depths].tolist()
        values = torch.randperm(len(self.values), generator=self.generator)[:depths].tolist()
        facts = [self._fact(key, value) for key, value in zip(keys, values, strict=True)]
        room = length - sum(map(len, facts)) - len(self.first)
        if not 0 <= room < len(text):
            raise ValueError(
                f"{depths} facts in {length} tokens need a longer sequence, or more text than {len(text)}."
            )
        start = int(torch.randint(len(text) - room, (), generator=self.generator))
        filler = text[start : start + room]
        cuts = [round(i * room / depths) for i in range(depths + 1)]
        sequence = list(self.first)
        for i, fact in enumerate(facts):
            sequence += fact + filler[cuts[i] : cuts[i + 1]].tolist()
        questions: list[int] = []
        spans = []
        order = torch.randperm(depths, generator=self.generator).tolist()
        for i in order:
            questions += [*self.mark, *self.keys[keys[i]]]
            spans.append((len(questions), len(questions) + len(self.values[values[i]])))
            questions += [*self.values[values[i]], *self.end]
        return Exam(torch.tensor(sequence), torch.tensor(questions), spans, order)

    def practice(self, text: Tensor, length: int) -> Iterator[Tensor]:
        """Yield rows to learn the task from, int64 ``[length]``, for ever: facts in ``text``, asked for repeatedly.

        A question with its answer reads as the fact does, so the loss on the next token is the loss on the answer. Each
        row has its own number of facts, of lines and of gaps in which text lies: some are all questions, others hold a
        few far from their facts.

        Raises:
            ValueError: a row is too short for two facts, or the text for a row.
        """
        longest = max(len(fact) for i in range(len(self.keys)) for fact in (self._fact(i, 0), self._fact(0, i)))
        if length < 4 * longest or len(text) <= length:
            raise ValueError(f"No practice in rows of {length} tokens with {len(text)} tokens of text.")

        def below(end: int) -> int:
            return int(torch.randint(end, (), generator=self.generator))

        while True:
            lines = 4 + below(length // 5 - 3)
            count = 2 + below(min(lines // 2, len(self.keys)) - 1)
            keys = torch.randperm(len(self.keys), generator=self.generator)[:count].tolist()
            values = torch.randperm(len(self.values), generator=self.generator)[:count].tolist()
            facts = [self._fact(key, value) for key, value in zip(keys, values, strict=True)]
            order = [*range(count), *(below(count) for _ in range(lines - count))]
            room = max(0, length - len(self.first) - sum(len(facts[i]) for i in order))
            # Text lies behind the facts alone, before a run of questions, or between some of the questions as well.
            gaps = count + below(lines - count + 1)
            cuts = torch.randint(room + 1, (gaps - 1,), generator=self.generator).sort().values.tolist()
            start = below(len(text) - room)
            filler = text[start : start + room].tolist()
            row = list(self.first)
            for i, (begin, end) in zip(order, zip([0, *cuts, *[room] * lines], [*cuts, *[room] * lines])):
                row += facts[i] + filler[begin:end]
            yield torch.tensor(row[:length])
