"""What ships with the package: a small trained model, its tokenizer, and text that it has not seen."""

from pathlib import Path

__all__ = ["HELDOUT_TEXT", "MODEL"]

#: A byte-level BPE Llama of 2.4 million parameters; its README.md says where it comes from, ``train.py`` made it.
MODEL = Path(__file__).parent / "kjv-llama-2m"
#: A part of the same text that neither the model nor the tokenizer has seen.
HELDOUT_TEXT = Path(__file__).parent / "heldout.txt"
