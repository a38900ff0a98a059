"""The decoding rules on a command line, and the settings of rollout.generate that they mean."""

from __future__ import annotations

from typing import Any


def add_arguments(parser, *, max_new_tokens: int, temperature: float = 1.0) -> None:
    """Declares the decoding options, in the order in which the rules are applied."""
    group = parser.add_argument_group("decoding", "Rules apply in this order; the values in brackets switch one off.")
    group.add_argument("--max-new-tokens", type=int, default=max_new_tokens, help=f"default {max_new_tokens}")
    group.add_argument("--stop", action="append", default=[], metavar="TEXT",
                       help="end at the token that completes this text, or at this special token; may be repeated")
    group.add_argument("--bias", action="append", default=[], metavar="ID=NUMBER",
                       help="add a number to the logit of a token id; -inf bans it; may be repeated")
    group.add_argument("--repetition-penalty", type=float, default=1.0, help="of tokens seen so far (1)")
    group.add_argument("--presence-penalty", type=float, default=0.0, help="of tokens sampled so far (0)")
    group.add_argument("--frequency-penalty", type=float, default=0.0, help="for each time a token was sampled (0)")
    group.add_argument("--min-new-tokens", type=int, default=0, help="no end token before so many tokens (0)")
    group.add_argument("--temperature", type=float, default=temperature, help=f"default {temperature}; 0 is greedy")
    group.add_argument("--top-k", type=int, default=0, help="keep the k most probable tokens (0)")
    group.add_argument("--top-p", type=float, default=1.0, help="keep the most probable tokens up to this mass (1)")
    group.add_argument("--min-p", type=float, default=0.0, help="keep tokens of this share of the best one's (0)")
    group.add_argument("--typical-p", type=float, default=1.0, help="keep the typical set of this mass (1)")
    group.add_argument("--epsilon", type=float, default=0.0, help="keep tokens of at least this probability (0)")
    group.add_argument("--seed", type=int, default=0, help="default 0")


def settings(arguments, policy) -> dict[str, Any]:
    """Keyword arguments of rollout.generate. Raises ConfigError for a --bias that is no id and number, and an empty
    --stop; the numbers are checked where they are used."""
    import math

    from alignax import rollout
    from alignax.types import ConfigError

    vocab = policy.spec.config.vocab_size
    if arguments.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens={arguments.max_new_tokens}; allowed: 1 or more")
    values, banned = {}, []
    for entry in arguments.bias:
        number, _, value = entry.partition("=")
        try:
            number, value = int(number), float(value)
        except ValueError as error:
            raise ConfigError(f"--bias={entry}; allowed: ID=NUMBER, such as 17=-2.5 or 17=-inf") from error
        if value == -math.inf:
            banned.append(number)
        else:
            values[number] = value
    bias = rollout.token_bias(vocab, values, banned=banned) if arguments.bias else None
    if not all(arguments.stop):
        raise ConfigError("--stop=: found an empty text, allowed: one character or more")
    # A special token has no text in the answer: it stops as an end token does.
    ends = [policy.tokenizer.token_id(text) for text in arguments.stop if text in policy.tokenizer.special_tokens]
    texts = [text for text in arguments.stop if text not in policy.tokenizer.special_tokens]
    stops = None
    if texts:
        stops = rollout.stop_table(texts, rollout.token_pieces(policy.tokenizer.core), vocab)
    return dict(
        max_new_tokens=arguments.max_new_tokens, temperature=arguments.temperature, top_k=arguments.top_k,
        top_p=arguments.top_p, min_p=arguments.min_p, typical_p=arguments.typical_p, epsilon=arguments.epsilon,
        repetition_penalty=arguments.repetition_penalty, presence_penalty=arguments.presence_penalty,
        frequency_penalty=arguments.frequency_penalty, min_new_tokens=arguments.min_new_tokens, bias=bias, stops=stops,
        eos_ids=sorted({*policy.text.eos_ids, *ends}), pad_id=policy.text.pad_id)
