"""Reading config.json key by key, so that what nobody asked for can be refused."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

from alignax.types import ConfigError

# Keys that do not change what the model computes: bookkeeping, initialisation, generation defaults that transformers 4
# kept in config.json, token ids, and GPT-2's dropout rates (0.1 in the released files; not applied).
HARMLESS = frozenset("""
    architectures _attn_implementation attn_implementation _attn_implementation_autoset attn_pdrop auto_map
    bad_words_ids begin_suppress_tokens bos_token_id cache_implementation chunk_size_feed_forward classifier_dropout
    _commit_hash cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    embd_pdrop encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id _from_model_config gradient_checkpointing id2label initializer_range
    is_decoder is_llama_config label2id length_penalty max_length max_sequence_length min_length model_max_length
    model_type n_ctx _name_or_path no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    output_attentions output_hidden_states output_scores pad_token_id prefix pretraining_tp problem_type
    remove_invalid_values repetition_penalty resid_pdrop return_dict return_dict_in_generate sep_token_id
    summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype
    torchscript transformers.js_config transformers_version typical_p unk_token_id unsloth_fixed unsloth_version
    use_bfloat16 use_cache z_loss_weight
    """.split())

# Not computed, whatever the family.
_MUST_BE_OFF = ("add_cross_attention", "is_encoder_decoder", "quantization_config", "pruned_heads", "num_experts",
                "num_local_experts", "attention_dropout", "hidden_dropout")


class Settings:
    """config.json as a dict, with the place for messages and a record of the keys that were read."""

    def __init__(self, raw: dict[str, Any], place: Any):
        self.raw, self.place = raw, place
        self.read = set(_MUST_BE_OFF)
        for key in _MUST_BE_OFF:
            if raw.get(key):
                self.refuse(key, raw[key], "absent, null or off (not computed)")

    def refuse(self, key: str, found: Any, allowed: Any) -> NoReturn:
        """Raises ConfigError naming file, key, the value found and the values allowed."""
        raise ConfigError(f"{self.place}: {key}: found {found!r}, allowed: {allowed}")

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `key`, or default where it is absent or null."""
        self.read.add(key)
        value = self.raw.get(key)
        return default if value is None else value

    def need(self, key: str) -> Any:
        """The value of `key`; refused where it is absent or null."""
        value = self.get(key)
        if value is None:
            self.refuse(key, value, "a value (the key is required)")
        return value

    def only(self, key: str, allowed: Any) -> None:
        """Refuses a value of `key` other than `allowed` (which is also what an absent key means)."""
        found = self.get(key, allowed)
        if found != allowed:
            self.refuse(key, found, repr(allowed))

    def choice(self, key: str, table: dict[str, str], default: str) -> str:
        """The value that `table` gives for the value of `key`."""
        found = self.get(key, default)
        if found not in table:
            self.refuse(key, found, " or ".join(map(repr, table)))
        return table[found]

    def number(self, key: str, default: float | None = None) -> float | None:
        """A number as a float, or default; a text or a list is refused."""
        value = self.get(key, default)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            self.refuse(key, value, "a number")
        return None if value is None else float(value)

    def ignore(self, *keys: str) -> None:
        """Marks keys as known to change nothing in this family."""
        self.read.update(keys)

    def finish(self, known: Iterable[str] = ()) -> None:
        """Refuses, by name, a key with a value that no one has read: it might change what the model computes."""
        spare = sorted(key for key, value in self.raw.items()
                       if key not in self.read and key not in HARMLESS and key not in known and value is not None)
        if spare:
            self.refuse(spare[0], self.raw[spare[0]],
                        "absent or null (this setting is not known, so it might change what the model computes)")


SILU = {"silu": "silu", "swish": "silu"}
GELU = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
