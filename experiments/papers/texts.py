"""Short made-up reviews and a decoder of the library small enough to train in seconds, for findings about sequences.

A review opens with START, has a mood, and draws each word at random: half of the words are neutral, the others praise
or blame, four times out of five as the mood has it. END, where asked for, follows a word at a fixed rate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from alignax.losses.loss import Loss
from alignax.models.config import DecoderConfig
from alignax.models.decoder import forward, init_params, logits
from alignax.ops.reductions import as_terms, masked_mean, reduce_terms
from alignax.types import ConfigError

END, START, WORDS, FIRST = 0, 1, 8, 2
PRAISE, BLAME, NEUTRAL = (FIRST + WORDS * kind for kind in range(3))
EXTRA = FIRST + 3 * WORDS
"""The first token of each group of WORDS words, and the first that a study may use for its own."""


class Pairs(NamedTuple):
    """tokens int32 [N, 2, T], chosen first, prompt included; mask bool [N, 2, T]: tokens of the completion."""

    tokens: jax.Array
    mask: jax.Array


def decoder(vocab: int, *, width: int = 32, layers: int = 2) -> DecoderConfig:
    """A Llama of that width and depth with an output matrix of its own."""
    return DecoderConfig(vocab_size=vocab, hidden_size=width, intermediate_size=2 * width, num_layers=layers,
                         num_heads=2, num_kv_heads=2, head_dim=width // 2, tie_embeddings=False, max_positions=64)


def words(key: jax.Array, mood: jax.Array, length: int, *, agree: Any = 0.8, low: int = 0, high: int = WORDS,
          ) -> jax.Array:
    """Words int32 [N, length] for moods [N] of 1 (praise) or 0; polar words have numbers from `low` to `high` - 1."""
    keys = jax.random.split(key, 4)
    shape = (mood.shape[0], length)
    polar = jax.random.bernoulli(keys[0], 0.5, shape)
    praise = jax.random.bernoulli(keys[1], agree, shape) == (mood[:, None] > 0.5)
    number = jax.random.randint(keys[2], shape, low, high)
    return jnp.where(polar, jnp.where(praise, PRAISE, BLAME) + number,
                     NEUTRAL + jax.random.randint(keys[3], shape, 0, WORDS))


def polarity(tokens: jax.Array) -> jax.Array:
    """1 for a word of praise, -1 for one of blame, 0 for any other token; float32 of the same shape."""
    inside = lambda first: (tokens >= first) & (tokens < first + WORDS)
    return inside(PRAISE).astype(jnp.float32) - inside(BLAME)


def states(config: DecoderConfig, params: Any, tokens: jax.Array) -> jax.Array:
    """[N, T, D]: the state at position t has read tokens 0 to t, and predicts token t + 1."""
    ones = jnp.ones_like(tokens)
    position = jnp.broadcast_to(jnp.arange(tokens.shape[-1], dtype=jnp.int32), tokens.shape)
    return forward(config, params, tokens, ones, 0 * ones, position, unroll=config.num_layers)


def log_policy(config: DecoderConfig, params: Any, tokens: jax.Array) -> jax.Array:
    """log pi [..., T - 1, V] of what follows each of the first T - 1 tokens [..., T]."""
    flat = tokens.reshape(-1, tokens.shape[-1])
    found = jax.nn.log_softmax(logits(config, params, states(config, params, flat)[:, :-1]))
    return found.reshape(*tokens.shape[:-1], *found.shape[1:])


def taken(log_pi: jax.Array, tokens: jax.Array) -> jax.Array:
    """log pi [..., T - 1] of the tokens [..., T] that stand there."""
    return jnp.take_along_axis(log_pi, tokens[..., 1:, None], -1)[..., 0]


def sums(config: DecoderConfig, params: Any, pairs: Pairs) -> jax.Array:
    """[..., 2]: log pi of each completion."""
    return jnp.where(pairs.mask[..., 1:], taken(log_policy(config, params, pairs.tokens), pairs.tokens), 0).sum(-1)


def fit(config: DecoderConfig, key: jax.Array, data: jax.Array, mask: jax.Array, *, steps: int, batch: int = 64,
        lr: Any = 3e-3, params: Any = None) -> Any:
    """Parameters after Adam (falling linearly to 0) on the mean log-loss of the tokens [N, T] where `mask`."""
    adam = optax.adam(optax.linear_schedule(lr, 0.0, steps))
    params = init_params(config, jax.random.fold_in(key, 0)) if params is None else params

    def loss(params, rows):
        found = taken(log_policy(config, params, data[rows]), data[rows])
        return -masked_mean(found, mask[rows, 1:])

    def step(carry, number):
        params, memory = carry
        rows = jax.random.randint(jax.random.fold_in(key, 1 + number), (batch,), 0, data.shape[0])
        updates, memory = adam.update(jax.grad(loss)(params, rows), memory)
        return (optax.apply_updates(params, updates), memory), None

    return jax.lax.scan(step, (params, adam.init(params)), jnp.arange(steps))[0][0]


def sample(config: DecoderConfig, params: Any, key: jax.Array, prompts: jax.Array, length: int,
           ) -> tuple[jax.Array, jax.Array]:
    """(tokens [N, P + length], mask): draws from the policy after prompts [N, P]; END closes a completion (it is part
    of it), and END fills the rest, outside the mask."""
    count, start = prompts.shape
    tokens = jnp.concatenate([prompts, jnp.zeros((count, length), jnp.int32)], 1)

    def step(carry, place):
        tokens, open_ = carry
        rows = logits(config, params, states(config, params, tokens)[:, place - 1])
        drawn = jnp.where(open_, jax.random.categorical(jax.random.fold_in(key, place), rows), END)
        return (tokens.at[:, place].set(drawn), open_ & (drawn != END)), open_

    (tokens, _), seen = jax.lax.scan(step, (tokens, jnp.ones(count, bool)), start + jnp.arange(length))
    return tokens, jnp.concatenate([jnp.zeros((count, start), bool), seen.T], 1)


def supply(requests: Sequence[str], log_pi: jax.Array, ref_log: jax.Array, pairs: Pairs) -> dict[str, jax.Array]:
    """What a loss requests, from log pi and log pi_ref [N, 2, T - 1, V] of the pairs.

    KTO's mismatched completions are those of the next pair. Raises ConfigError for what cannot be answered.
    """
    mask = pairs.mask[..., 1:]
    token, ref = (jnp.where(mask, taken(x, pairs.tokens), 0) for x in (log_pi, ref_log))
    made = {
        "logps": lambda: token.sum(-1), "ref_logps": lambda: ref.sum(-1), "token_logps": lambda: token,
        "ref_token_logps": lambda: ref, "mask": lambda: mask, "lengths": lambda: mask.sum(-1),
        "ref_policy_kl": lambda: (jnp.exp(ref_log) * (ref_log - log_pi)).sum(-1),
        "labels": lambda: jnp.broadcast_to(jnp.array([1.0, 0.0]), token.shape[:2]),
        "valid": lambda: jnp.ones(token.shape[:2], bool),
        "kl_logps": lambda: jax.lax.stop_gradient(jnp.roll(token.sum(-1), 1, 0)),
        "kl_ref_logps": lambda: jnp.roll(ref.sum(-1), 1, 0),
    }
    if lacking := [name for name in requests if name not in made]:
        raise ConfigError(f"texts: cannot supply {', '.join(lacking)}; it has {', '.join(made)}")
    return {name: made[name]() for name in requests}


def value(loss: Loss, log_pi: jax.Array, ref_log: jax.Array, pairs: Pairs, hyper: Mapping[str, Any] | None = None,
          weights: Any = None) -> jax.Array:
    """The scalar that training lowers; weights: [N] of the pairs, all equal by default."""
    terms = as_terms(loss(supply(loss.requests, log_pi, ref_log, pairs), **(hyper or {})))
    if weights is not None:
        terms = {name: term._replace(weight=term.weight * weights.reshape(-1, *[1] * (jnp.ndim(term.values) - 1)))
                 for name, term in terms.items()}
    return reduce_terms(terms)[0]


def train(loss: Loss | Sequence[Loss], config: DecoderConfig, params: Any, pairs: Pairs, *,
          look: Callable[[Any], Any], steps: int, every: int, lr: Any, hyper: Mapping[str, Any] | None = None,
          batch: int | None = None, key: jax.Array | None = None, optimiser: Callable[[Any], Any] = optax.adam,
          weights: Any = None, which: Any = 0) -> tuple[Any, Any]:
    """(parameters, look(parameters) before the first update and after every `every` ones, stacked on a first axis).

    The reference is the start. batch: pairs drawn with replacement for every update, all of them by default; weights
    [N]: the pairs' weights in the loss, or in the draw where there is a batch. Of several losses the number `which`,
    which may be traced, is trained on: one program for all of them, as compiling takes longer than training.
    Raises ConfigError where `every` does not divide `steps`.
    """
    losses = list(loss) if isinstance(loss, Sequence) else [loss]
    if steps % every:
        raise ConfigError(f"texts.train: every = {every} must divide steps = {steps}")
    key = jax.random.key(0) if key is None else key
    rule, count = optimiser(lr), pairs.tokens.shape[0]
    ref_log = log_policy(config, params, pairs.tokens)
    chance = None if weights is None else jnp.log(weights)

    def update(carry, number):
        params, memory = carry
        data, ref, own = pairs, ref_log, weights
        if batch is not None:
            here = jax.random.fold_in(key, number)
            rows = (jax.random.randint(here, (batch,), 0, count) if chance is None
                    else jax.random.categorical(here, chance, shape=(batch,)))
            data, ref, own = Pairs(*(x[rows] for x in pairs)), ref_log[rows], None

        def scalar(p):
            log_pi = log_policy(config, p, data.tokens)
            return jax.lax.switch(which, [lambda x, one=one: value(one, x, ref, data, hyper, own) for one in losses],
                                  log_pi)

        slope = jax.grad(scalar)(params)
        updates, memory = rule.update(slope, memory, params)
        return (optax.apply_updates(params, updates), memory), None

    def stretch(carry, first):
        return jax.lax.scan(update, carry, first + jnp.arange(every))[0], carry[0]

    (last, _), path = jax.lax.scan(stretch, (params, rule.init(params)), jnp.arange(0, steps, every))
    path = jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), path, last)
    return last, jax.lax.map(look, path)  # the parameters are few: kept, so that `look` is compiled once
