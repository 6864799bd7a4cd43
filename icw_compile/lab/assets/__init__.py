"""What ships with the package: small trained models, their tokenizers, and text that it has not seen."""

from pathlib import Path

__all__ = ["HELDOUT_TEXT", "MODEL", "MODELS", "QWEN2_MODEL"]

#: A byte-level BPE Llama of 2.4 million parameters; its README.md says where it comes from, ``train.py`` made it.
MODEL = Path(__file__).parent / "kjv-llama-2m"
#: The same with the biases of Qwen2, those of the keys large; trained from ``MODEL`` on.
QWEN2_MODEL = Path(__file__).parent / "kjv-qwen2-2m"
#: By the names that ``icw-compile eval --model`` takes.
MODELS = {path.name: path for path in (MODEL, QWEN2_MODEL)}
#: A part of the same text that neither the models nor the tokenizer have seen.
HELDOUT_TEXT = Path(__file__).parent / "heldout.txt"
