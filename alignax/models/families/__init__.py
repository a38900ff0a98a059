"""Model families: what a Hugging Face config.json and its tensors mean for the one decoder.

A family is a pair of pure functions between config.json and DecoderConfig, and a table from file tensors to places in
the parameters. `FAMILIES` is keyed by model_type; DecoderConfig.family says which one a model is saved as.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from alignax.models.config import DecoderConfig
from alignax.models.families import baichuan, gemma, gpt2, llama, mistral, neox, qwen
from alignax.models.families.slots import Place, Slot, Slots
from alignax.types import ConfigError

__all__ = ["FAMILIES", "Family", "Place", "Slot", "Slots", "read_config", "tensors", "write_config"]


class Family(NamedTuple):
    """One model_type.

    architectures: the class names of config.json that are this model; the first is the one written.
    read_config(raw, place): the DecoderConfig of a config.json; ConfigError names `place` and the setting.
    write_config(config): the keys of config.json, in the spelling of transformers 5 and the older one, without
    architectures, model_type, ids and dtype.
    slots(config, shapes): file tensor -> Slot, for the abstract parameters `shapes`.
    derived: a regular expression of names that a file may hold and that carry no information.
    tied: (head, embedding), the tensors that are one where tie_embeddings; a file may then hold either alone or both.
    prefix: what a file saved from the model without its head leaves out in front of every name ("": nothing).
    """

    architectures: tuple[str, ...]
    read_config: Callable[[dict[str, Any], Any], DecoderConfig]
    write_config: Callable[[DecoderConfig], dict[str, Any]]
    slots: Callable[[DecoderConfig, Any], Slots]
    derived: str = r"(?!)"
    tied: tuple[str, str] = ("lm_head.weight", "model.embed_tokens.weight")
    prefix: str = ""

    def tensors(self, config: DecoderConfig) -> Slots:
        """File tensor -> Slot: exactly the tensors that a file of this model holds."""
        from alignax.models.decoder import abstract_params  # the decoder imports nothing from here
        return self.slots(config, abstract_params(config))


FAMILIES: dict[str, Family] = {
    "llama": Family(("LlamaForCausalLM",), llama.read_config, llama.write_config, llama.tensors, llama.DERIVED),
    "mistral": Family(("MistralForCausalLM",), mistral.read_config, mistral.write_config, llama.tensors, llama.DERIVED),
    "qwen2": Family(("Qwen2ForCausalLM",), qwen.read_qwen2, qwen.write_qwen2, llama.tensors, llama.DERIVED),
    "qwen3": Family(("Qwen3ForCausalLM",), qwen.read_qwen3, qwen.write_qwen3, llama.tensors, llama.DERIVED),
    "gemma2": Family(("Gemma2ForCausalLM",), gemma.read_gemma2, gemma.write_gemma2, gemma.tensors, llama.DERIVED),
    "gemma3_text": Family(("Gemma3ForCausalLM",), gemma.read_gemma3, gemma.write_gemma3, gemma.tensors, llama.DERIVED),
    "gpt2": Family(("GPT2LMHeadModel",), gpt2.read_config, gpt2.write_config, gpt2.tensors, gpt2.DERIVED,
                   ("lm_head.weight", "transformer.wte.weight"), "transformer."),
    "gpt_neox": Family(("GPTNeoXForCausalLM",), neox.read_config, neox.write_config, neox.tensors, neox.DERIVED,
                       ("embed_out.weight", "gpt_neox.embed_in.weight")),
    "baichuan": Family(("BaichuanForCausalLM", "BaiChuanForCausalLM"), baichuan.read_config, baichuan.write_config,
                       baichuan.tensors, llama.DERIVED),
}


def _family(name: str, place: Any) -> Family:
    if name not in FAMILIES:
        raise ConfigError(f"{place}: model_type: found {name!r}, allowed: {', '.join(map(repr, FAMILIES))}")
    return FAMILIES[name]


def read_config(raw: dict[str, Any], place: Any) -> DecoderConfig:
    """The DecoderConfig of a config.json (a dict); ConfigError names `place` and each setting that is not computed."""
    family = _family(raw.get("model_type"), place)
    names = raw.get("architectures")
    if names is not None and (not isinstance(names, list) or len(names) != 1 or names[0] not in family.architectures):
        raise ConfigError(f"{place}: architectures: found {names!r}, allowed: "
                          f"{' or '.join(repr([name]) for name in family.architectures)}")
    return family.read_config(raw, place)


def write_config(config: DecoderConfig) -> dict[str, Any]:
    """The keys of config.json for config.family, without ids and dtype.

    Raises ConfigError, naming the fields, where that family's config.json cannot say what `config` says.
    """
    family = _family(config.family, "DecoderConfig.family")
    raw = {"architectures": [family.architectures[0]], "model_type": config.family, **family.write_config(config)}
    back = read_config(raw, "config.json to be written")
    lost = [field.name for field in dataclasses.fields(config)
            if getattr(config, field.name) != getattr(back, field.name)]
    if lost:
        raise ConfigError("; ".join(f"DecoderConfig.{name}: found {getattr(config, name)!r}, allowed: "
                                    f"{getattr(back, name)!r} with family {config.family!r}" for name in lost))
    return raw


def tensors(config: DecoderConfig) -> Slots:
    """File tensor -> Slot of config.family."""
    return _family(config.family, "DecoderConfig.family").tensors(config)
