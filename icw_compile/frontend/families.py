"""The model families that are known to work: data that the tests run through and that the report compares with."""

from dataclasses import dataclass

__all__ = ["FAMILIES", "Family", "family_of"]


@dataclass(frozen=True)
class Family:
    """One architecture of transformers.

    Attributes:
        model_type: transformers' name for it, the ``model_type`` of its configuration.
        package: the package under ``transformers.models`` that holds its code.
        cache_layers: the kinds of attention that its layers may have.
        attentions: the ``attn_implementation`` values that transformers offers for it, among those supported here.
        sites_per_layer: the storages that a layer writes and reads: keys and values.
    """

    model_type: str
    package: str
    cache_layers: tuple[str, ...]
    attentions: tuple[str, ...] = ("sdpa", "eager")
    sites_per_layer: int = 2


_FULL = ("full_attention",)
_BOTH = ("sliding_attention", "full_attention")

#: model type -> its family.
FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", "llama", _FULL),
        Family("mistral", "mistral", _BOTH),
        Family("gemma", "gemma", _FULL),
        # Its softcap has no counterpart in torch's fused attention.
        Family("gemma2", "gemma2", _BOTH, attentions=("eager",)),
        Family("gemma3_text", "gemma3", _BOTH),
        Family("gemma4_text", "gemma4", _BOTH),
        Family("phi3", "phi3", _BOTH),
        Family("qwen2", "qwen2", _BOTH),
        Family("qwen3", "qwen3", _BOTH),
        Family("olmo2", "olmo2", _FULL),
        Family("mixtral", "mixtral", _BOTH),
        Family("cohere2", "cohere2", _BOTH),
        # Its sinks have no counterpart in torch's fused attention either.
        Family("gpt_oss", "gpt_oss", _BOTH, attentions=("eager",)),
        # ALiBi, spelled out in the model itself.
        Family("bloom", "bloom", _FULL, attentions=("eager",)),
    )
}


def family_of(class_path: str) -> Family | None:
    """The family that holds the class ``transformers.models.<package>.<module>.<name>``."""
    parts = class_path.split(".")
    return next((f for f in FAMILIES.values() if parts[:3] == ["transformers", "models", f.package]), None)
