"""Models that are hard for a quantized cache, made exactly from ones that are not.

A case scales what a cache stores and undoes it where the cache is read. Every factor is a power of two, so that the
float model computes the same bits in any dtype: what the table then shows is the doing of the cache alone.

``keys-low-30x``, ``keys-mid-30x``, ``keys-low-100x``, ``keys-mid-100x``
    Outlier key channels. ``k_proj`` rows of two rotary pairs ``(i, i + head_dim / 2)`` go up by a factor, and those
    rows of ``q_proj`` go down by it in every query head that reads the KV head. Rotation mixes the two channels of a
    pair and no others, so the factor passes through it and cancels in the product of query and key. ``mid`` takes
    the pairs in the middle, which turn once in some hundreds of tokens at the usual base of 10,000 (no mean over the
    tokens is left of them), ``low`` the slowest.
``keys-bias-30x``, ``keys-bias-100x``
    The offset in a few key channels that the bias of Qwen2.5's ``k_proj`` gives. An offset ``b`` adds
    ``(R_s q) . (R_t b)`` to the score of tokens s and t, which depends on both: nothing in the model can take it back,
    unless the query is zero in that pair. So the origin of this case is the model with the queries of two slow pairs
    set to zero (`Hardened.origin` has that function), and the hard model equals it exactly. The offset alone sets no
    row's scale far above another's, and costs int8 little at 30x; so what the input makes of these channels goes up to
    the ratio as well, and a row's largest key lies where the two add up. A model that has key biases loses them in
    these pairs; ``keys-low`` and ``keys-mid`` scale its own along, with no change of function.
``values-30x``, ``values-100x``
    Outlier value channels: rows of ``v_proj`` up, the columns of ``o_proj`` that read them down.
``sink``
    The first token's key dwarfs all others. No linear map of the hidden state can single a token out and leave the
    scores of the others alone, except where the query is zero: so, as above, the queries of two slow pairs are set to
    zero, and ``k_proj`` there reads the direction ``C^-1 x``, in which the first token's input ``x`` stands out most
    from the others' (C is their second moment, from a text). The others' keys stay at the median there. A cache with
    a scale per token is not harmed by it, whatever the norm: the sink has a scale of its own. It is hard for a scale
    per tensor.

The ratio is that of a pair's amplitude to the head's median channel (of those that are not zero), the amplitude being
what a ``k_proj`` or ``v_proj`` row makes of an input of unit mean square: the norm of the row times the input norm's
weight, and its bias.
Rounding the factor up to a power of two makes it at least the ratio that the name gives, and less than twice that
(where the query is zero, nothing needs rounding: the offset and the rest of such a channel have the ratio each).
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

__all__ = ["CASES", "Hardened", "equivalence", "harden"]

#: Every case that `harden` makes.
CASES = (
    *(f"{what}-{ratio}x" for what in ("keys-low", "keys-mid", "keys-bias", "values") for ratio in (30, 100)),
    "sink",
)
PAIRS = 2  # of each KV head become outliers; twice as many channels


@dataclass
class Hardened:
    """A hard model and the model whose function it has; see the module for where that is not the one given."""

    model: PreTrainedModel
    origin: PreTrainedModel


@torch.no_grad()
def harden(model: PreTrainedModel, case: str, ids: Tensor) -> Hardened:
    """Make the hard ``case`` of ``model``, which is left as it is.

    Args:
        model: a Llama- or Qwen2-like model: ``q_proj``, ``k_proj``, ``v_proj``, ``o_proj`` and rotary position on whole
            heads, nothing between the projections and the rotation.
        case: one of `CASES`.
        ids: tokens that stand for its input, int64 ``[batch, tokens]``, whose first one is the sink.

    Raises:
        ValueError: an unknown case, or a model of another kind.
    """
    if case not in CASES:
        raise ValueError(f"Unknown hard case {case!r}. The cases are: {', '.join(CASES)}.")
    kind, _, ratio = case.rpartition("-") if case != "sink" else (case, "", "0")
    times = float(ratio.removesuffix("x"))
    hard = copy.deepcopy(model)
    layers = list(_attentions(hard))
    pruned = kind in ("keys-bias", "sink")
    if pruned:
        for attention, _ in layers:
            _multiply(attention.q_proj, _pairs("low", attention.head_dim), attention.head_dim, 0.0)
    origin = copy.deepcopy(hard) if pruned else model
    inputs = _inputs(hard, ids) if kind == "sink" else [None] * len(layers)
    for (attention, norm), seen in zip(layers, inputs):
        if kind == "sink":
            assert seen is not None
            _sink(attention, norm, seen)
        elif kind == "keys-bias":
            _offset(attention, norm, times)
        elif kind == "values":
            _scale_values(attention, norm, times)
        else:
            _scale_keys(attention, norm, times, kind.removeprefix("keys-"))
    return Hardened(hard, origin)


def _attentions(model: PreTrainedModel) -> Iterator[tuple[Any, Tensor]]:
    """Each attention with the weight of the norm before it."""
    found = False
    for layer in getattr(model.base_model, "layers", ()):
        attention, norm = getattr(layer, "self_attn", None), getattr(layer, "input_layernorm", None)
        projections = [getattr(attention, f"{name}_proj", None) for name in "qkvo"]
        between = [name for name in ("q_norm", "k_norm") if hasattr(attention, name)]
        parameters = getattr(model.config, "rope_parameters", None) or {}
        if not all(isinstance(p, nn.Linear) for p in projections) or norm is None or between:
            break
        if parameters.get("partial_rotary_factor", 1.0) != 1.0:
            break
        found = True
        yield attention, norm.weight
    else:
        if found:
            return
    raise ValueError(
        f"No hard case can be made of a {model.config.model_type} model: it takes layers with q_proj, k_proj, v_proj "
        "and o_proj, and rotary position on whole heads right behind them, as Llama and Qwen2 have."
    )


def _pairs(where: str, head_dim: int) -> Tensor:
    """The channels of `PAIRS` rotary pairs of a head, int64 ``[2 * PAIRS]``: the slowest, or those in the middle."""
    first = head_dim // 2 - PAIRS if where == "low" else head_dim // 4
    channels = torch.arange(first, first + PAIRS)
    return torch.cat([channels, channels + head_dim // 2])


def _multiply(projection: Any, channels: Tensor, head_dim: int, factor: float | Tensor) -> None:
    """Multiply these channels of every head that a projection writes by ``factor``, ``[heads, 1]`` if a tensor."""
    for parameter in (projection.weight, projection.bias):
        if parameter is not None:
            heads = parameter.data.view(-1, head_dim, *parameter.shape[1:])
            by = factor.view(-1, *[1] * (heads.dim() - 1)) if isinstance(factor, Tensor) else factor
            heads[:, channels] *= by


def _amplitudes(projection: Any, norm: Tensor, head_dim: int) -> Tensor:
    """The amplitude of each channel for an input of unit mean square, float32 ``[heads, head_dim]``."""
    squares = (projection.weight.float() * norm.float()).square().sum(-1)
    if projection.bias is not None:
        squares = squares + projection.bias.float().square()
    return squares.sqrt().view(-1, head_dim)


def _power_of_two(factor: Tensor) -> Tensor:
    return torch.exp2(torch.ceil(torch.log2(factor)))


def _factor(projection: Any, norm: Tensor, head_dim: int, channels: Tensor, ratio: float) -> Tensor:
    """What lifts the channels to ``ratio`` times the median of their head, float32 ``[heads]``; 1 if they are zero."""
    amplitudes = _amplitudes(projection, norm, head_dim)
    own = amplitudes[:, channels].square().mean(-1).sqrt()
    return torch.where(own > 0, _power_of_two(ratio * _median(amplitudes) / own.clamp(min=1e-12)), 1.0)


def _median(amplitudes: Tensor) -> Tensor:
    """The median of each head's channels that are not zero, float32 ``[heads]``."""
    return amplitudes.masked_fill(amplitudes == 0, math.nan).nanmedian(-1).values.nan_to_num(0.0)


def _scale_keys(attention: Any, norm: Tensor, ratio: float, where: str) -> None:
    head_dim = attention.head_dim
    channels = _pairs(where, head_dim)
    factor = _factor(attention.k_proj, norm, head_dim, channels, ratio)
    _multiply(attention.k_proj, channels, head_dim, factor)
    _multiply(attention.q_proj, channels, head_dim, 1 / factor.repeat_interleave(attention.num_key_value_groups))


def _scale_values(attention: Any, norm: Tensor, ratio: float) -> None:
    head_dim = attention.head_dim
    channels = torch.arange(2 * PAIRS)
    factor = _factor(attention.v_proj, norm, head_dim, channels, ratio)
    _multiply(attention.v_proj, channels, head_dim, factor)
    reads = attention.o_proj.weight.data.view(attention.o_proj.out_features, -1, head_dim)
    reads[:, :, channels] /= factor.repeat_interleave(attention.num_key_value_groups)[:, None]


def _offset(attention: Any, norm: Tensor, ratio: float) -> None:
    head_dim, projection = attention.head_dim, attention.k_proj
    channels = _pairs("low", head_dim)
    offset = ratio * _median(_amplitudes(projection, norm, head_dim))
    if projection.bias is None:
        projection.bias = nn.Parameter(torch.zeros_like(projection.weight[:, 0]), requires_grad=False)
    heads = projection.bias.data.view(-1, head_dim)
    heads[:, channels] = 0.0
    varying = _amplitudes(projection, norm, head_dim)[:, channels].square().mean(-1).sqrt()
    _multiply(projection, channels, head_dim, (offset / varying.clamp(min=1e-12)).to(heads.dtype))
    heads[:, channels] = offset[:, None].to(heads.dtype)


def _inputs(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """What the projections of each layer read, float32 ``[batch, tokens, hidden]``."""
    seen: list[Tensor] = []
    hooks = [
        attention.k_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].float()))
        for attention, _ in _attentions(model)
    ]
    model(ids.to(model.device), use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    return seen


def _sink(attention: Any, norm: Tensor, seen: Tensor) -> None:
    head_dim, projection = attention.head_dim, attention.k_proj
    median = _median(_amplitudes(projection, norm, head_dim))
    first, others = seen[0, 0], seen[:, 1:].flatten(0, 1)
    second_moment = others.T @ others / len(others)
    ridge = 1e-3 * second_moment.diagonal().mean() * torch.eye(len(first), device=first.device)
    direction = torch.linalg.solve(second_moment + ridge, first)
    direction = direction / (others @ direction).square().mean().sqrt()
    channels = _pairs("low", head_dim)
    heads = projection.weight.data.view(-1, head_dim, len(first))
    heads[:, channels] = (median[:, None, None] * direction).to(heads.dtype)
    if projection.bias is not None:
        projection.bias.data.view(-1, head_dim)[:, channels] = 0.0


@torch.no_grad()
def equivalence(hardened: Hardened, ids: Tensor) -> float:
    """Relative distance of the hard model's logits from its origin's, both in float32, for int64 ``[batch, tokens]``.

    Raises:
        RuntimeError: it is more than 1e-5.
    """
    ids = ids.to(hardened.model.device)
    hard, origin = (
        copy.deepcopy(m).float()(ids, use_cache=False).logits.double() for m in (hardened.model, hardened.origin)
    )
    distance = ((hard - origin).norm() / origin.norm()).item()
    if not distance <= 1e-5:
        raise RuntimeError(f"The hard model is not the same function: relative logit distance {distance:.1e}.")
    return distance
