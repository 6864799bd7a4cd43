"""Why outlier channels are scaled, and not rotated or centred, before keys become int8: a numerical study.

Random keys, some channels of which stand out, go through rotary position embedding (RoPE), are quantized with one scale
for each row after each of several transforms, and read by attention. The error is that of the attention's output,
``|output - exact| / |exact|``. Plain torch, nothing of the package: this is the ground that its choice stands on.
``pytest -s`` prints the table.

The outliers are an offset before RoPE, as Qwen2's key bias gives (``bias``), or a larger spread (``scale``), in two
rotary pairs that turn slowly (``low``) or once in some tens of tokens (``mid``). Queries are smaller there by the same
ratio, so that the scores stay those of ordinary attention.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

HEADS, TOKENS, QUERIES, HEAD_DIM = 2, 4096, 64, 128
PAIRS = {"low": (62, 63), "mid": (32, 33)}


class Case(NamedTuple):
    """Keys and values float32 ``[heads, tokens, head_dim]``, queries of the last tokens, and the keys' rotated bias."""

    query: Tensor
    key: Tensor
    value: Tensor
    rotated_bias: Tensor


def rotate(x: Tensor) -> Tensor:
    """RoPE on ``[..., tokens, head_dim]``, base 10,000, in the halves that transformers pairs."""
    frequencies = 10000 ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = torch.outer(torch.arange(x.shape[-2]).float(), frequencies).repeat(1, 2)
    first, second = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()


def make(kind: str, where: str, ratio: float, seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(HEADS, TOKENS, HEAD_DIM, generator=generator) for _ in range(3))
    bias = torch.zeros(HEAD_DIM)
    if kind != "none":
        channels = torch.tensor([*PAIRS[where], *(pair + HEAD_DIM // 2 for pair in PAIRS[where])])
        query[..., channels] /= ratio
        if kind == "bias":
            bias[channels] = ratio
        else:
            key[..., channels] *= ratio
    return Case(rotate(query)[:, -QUERIES:], rotate(key + bias), value, rotate(bias.expand(HEADS, TOKENS, HEAD_DIM)))


def quantize(x: Tensor, levels: int = 127) -> Tensor:
    """``x`` as read back, with one bfloat16 scale for each row of the last dimension."""
    scale = (x.abs().amax(-1, keepdim=True) / levels).bfloat16().float().clamp(min=1e-30)
    return (x / scale).round().clamp(-levels, levels) * scale


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.softmax(query @ key.mT / HEAD_DIM**0.5, -1) @ value


def error(case: Case, key: Tensor, value: Tensor | None = None) -> float:
    exact = attend(case.query, case.key, case.value)
    return ((attend(case.query, key, case.value if value is None else value) - exact).norm() / exact.norm()).item()


def amplitude_factor(key: Tensor) -> Tensor:
    """Each channel's amplitude over that of the median channel."""
    amplitude = key.abs().amax(-2, keepdim=True)
    return amplitude / amplitude.median(-1, keepdim=True).values


def power_of_two_factor(key: Tensor, outlier: float = 3.0) -> Tensor:
    """Each channel's root mean square over the median channel's, rounded down to a power of two, where it stands out.

    It is taken of rows of amplitude 1, which count alike however large they are, so that a token that dwarfs the rest
    does not decide for all.
    """
    square = (key / key.abs().amax(-1, keepdim=True).clamp(min=1e-30)).square().mean(-2, keepdim=True)
    ratio = (square / square.median(-1, keepdim=True).values).sqrt()
    return torch.where(ratio >= outlier, torch.exp2(ratio.log2().floor()), 1.0)


def scaled(x: Tensor, factor: Tensor, levels: int = 127) -> Tensor:
    return quantize(x / factor, levels) * factor


def hadamard() -> Tensor:
    matrix = torch.ones(1, 1)
    while len(matrix) < HEAD_DIM:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / HEAD_DIM**0.5


def mean_removed(case: Case) -> Tensor:
    mean = case.key.mean(-2, keepdim=True)
    return quantize(case.key - mean) + mean


TRANSFORMS: dict[str, Callable[[Case], Tensor]] = {
    "plain": lambda case: quantize(case.key),
    "equalized": lambda case: scaled(case.key, amplitude_factor(case.key)),
    "powers of two": lambda case: scaled(case.key, power_of_two_factor(case.key)),
    "Hadamard": lambda case: quantize(case.key @ hadamard()) @ hadamard().T,
    "mean removed": mean_removed,
    "bias removed": lambda case: quantize(case.key - case.rotated_bias) + case.rotated_bias,
}
OUTLIERS = [(kind, where, ratio) for kind in ("bias", "scale") for where in ("low", "mid") for ratio in (30.0, 100.0)]


@pytest.mark.parametrize(("kind", "where", "ratio"), [("none", "", 1.0), *OUTLIERS])
def test_transforms(kind: str, where: str, ratio: float) -> None:
    case = make(kind, where, ratio)
    errors = {name: error(case, transform(case)) for name, transform in TRANSFORMS.items()}
    print(f"\n{kind:5} {where:3} {ratio:3.0f}x", *(f"{name} {e:.4f}" for name, e in errors.items()), sep="  ")
    assert max(errors["equalized"], errors["powers of two"]) < 0.009
    if kind == "none":
        assert errors["powers of two"] == errors["plain"], "no channel stands out: nothing is changed"
        return
    assert errors["plain"] > 6 * errors["powers of two"]
    assert errors["Hadamard"] > 2 * errors["powers of two"]
    assert errors["bias removed"] > 0.9 * errors["powers of two"], "removing a known bias gains nothing more"
    if kind == "scale":
        assert errors["bias removed"] > 6 * errors["powers of two"], "there is no bias to remove"
    if (kind, where) != ("bias", "low"):
        assert errors["mean removed"] > 6 * errors["powers of two"], "no mean is left of it"


@pytest.mark.parametrize("tokens", [4, 16, 64])
@pytest.mark.parametrize(("kind", "where", "ratio"), [("none", "", 1.0), *OUTLIERS])
def test_factors_from_a_short_first_write(kind: str, where: str, ratio: float, tokens: int) -> None:
    """Powers of two of what stands out are nearly as good from a few tokens as from all."""
    case = make(kind, where, ratio)
    few = error(case, scaled(case.key, power_of_two_factor(case.key[:, :tokens])))
    print(f"\n{kind:5} {where:3} {ratio:3.0f}x  from {tokens} tokens {few:.4f}")
    assert few < 0.01


def test_one_token_says_nothing() -> None:
    """The channels of one token differ by chance: factors of their amplitudes are far worse than none."""
    case = make("none", "", 1.0)
    assert error(case, scaled(case.key, amplitude_factor(case.key[:, :1]))) > 0.3


def test_a_sink_does_not_decide() -> None:
    """One token with channels 100x larger spoils amplitudes, and not powers of two of rows that count alike."""
    case = make("none", "", 1.0)
    first = case.key[:, :64].clone()
    first[:, 0, [5, 40, 90]] *= 100
    assert error(case, scaled(case.key, amplitude_factor(first))) > 0.02
    assert error(case, scaled(case.key, power_of_two_factor(first))) < 0.008


@pytest.mark.parametrize("ratio", [30.0, 100.0])
def test_values(ratio: float) -> None:
    """Value channels that stand out, and count less in what reads them: the same factors help as much."""
    case = make("none", "", 1.0)
    weight = torch.ones(HEAD_DIM)
    weight[:4] = ratio
    value = case.value * weight
    exact = attend(case.query, case.key, case.value)
    plain, powers = (
        ((attend(case.query, case.key, stored) / weight - exact).norm() / exact.norm()).item()
        for stored in (quantize(value), scaled(value, power_of_two_factor(value[:, :64])))
    )
    assert plain > 10 * powers and powers < 0.009
