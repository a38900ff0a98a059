"""Bandits with a known gold reward: a reference, pairs drawn from it, Bradley-Terry labels that may be flipped."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from alignax.diagnostics import toy


class World(NamedTuple):
    """log_ref, reward: float32 [P, A]; the reward has mean 0 and deviation 1 over the responses of a prompt."""

    log_ref: jax.Array
    reward: jax.Array


def world(key: jax.Array, prompts: int, responses: int, *, spread: float = 1.0, agreement: float = 0.0) -> World:
    """A random world: logits of the reference normal with deviation `spread`, correlated with the reward."""
    first, second = jax.random.split(key)
    logits = jax.random.normal(first, (prompts, responses))
    reward = agreement * logits + (1 - agreement ** 2) ** 0.5 * jax.random.normal(second, (prompts, responses))
    reward = reward - reward.mean(1, keepdims=True)
    return World(jax.nn.log_softmax(spread * logits), reward / reward.std(1, keepdims=True))


def anchored(log_ref: jax.Array) -> toy.Policy:
    """The free table that starts at the reference: params [P, A] are added to its log-probs."""
    return lambda params: log_ref + params


def zeros(world: World) -> jax.Array:
    """Parameters at which an anchored table is the reference."""
    return jnp.zeros_like(world.log_ref)


def label(key: jax.Array, reward: jax.Array, prompt: Any, first: Any, second: Any, *, scale: Any = 1.0,
          flip: Any = 0.0) -> toy.Pairs:
    """Pairs from two responses to each prompt: the first is better with probability sigmoid(scale (r1 - r2)).

    flip: the rate at which a finished label is turned round. scale may be infinite: the better one always wins.
    """
    one, two = reward[prompt, first], reward[prompt, second]
    noise, turn = (jax.random.uniform(k, jnp.shape(prompt)) for k in jax.random.split(key))
    gap = one - two
    wins = jnp.where(jnp.isinf(scale), gap > 0, noise < jax.nn.sigmoid(jnp.where(jnp.isinf(scale), 1, scale) * gap))
    wins = wins ^ (turn < flip)
    scores = jnp.stack([jnp.where(wins, one, two), jnp.where(wins, two, one)], -1)
    return toy.Pairs(prompt, jnp.where(wins, first, second), jnp.where(wins, second, first), scores)


def draw(key: jax.Array, world: World, count: int, *, log_pi: Any = None, scale: Any = 1.0, flip: Any = 0.0,
         ) -> toy.Pairs:
    """`count` labelled pairs of two different responses, drawn from `log_pi` (the reference by default)."""
    log_pi = world.log_ref if log_pi is None else log_pi
    keys = jax.random.split(key, 4)
    prompt = jax.random.randint(keys[0], (count,), 0, log_pi.shape[0])
    first = jax.random.categorical(keys[1], log_pi[prompt])
    others = jnp.where(jax.nn.one_hot(first, log_pi.shape[1], dtype=bool), -jnp.inf, log_pi[prompt])
    second = jax.random.categorical(keys[2], others)
    return label(keys[3], world.reward, prompt, first, second, scale=scale, flip=flip)


def all_pairs(world: World, scale: float) -> tuple[toy.Pairs, jax.Array]:
    """(every ordered pair of every prompt, its probability of being the label), for exact expectations."""
    prompts, responses = world.reward.shape
    prompt, first, second = (x.reshape(-1) for x in jnp.meshgrid(jnp.arange(prompts), jnp.arange(responses),
                                                                 jnp.arange(responses), indexing="ij"))
    scores = jnp.stack([world.reward[prompt, first], world.reward[prompt, second]], -1)
    weight = jax.nn.sigmoid(scale * (scores[:, 0] - scores[:, 1])) * (first != second)
    return toy.Pairs(prompt, first, second, scores), weight


def ranking_accuracy(log_pi: jax.Array, world: World) -> jax.Array:
    """Share of pairs of responses that the log-ratio to the reference orders as the gold reward does; [..., P, A]."""
    ratio = log_pi - world.log_ref
    ours = ratio[..., :, None] - ratio[..., None, :]
    gold = world.reward[..., :, None] - world.reward[..., None, :]
    return (ours * gold > 0).mean((-3, -2, -1)) * world.reward.shape[-1] / (world.reward.shape[-1] - 1)


def tilted(log_ref: jax.Array, reward: jax.Array, strength: Any) -> jax.Array:
    """log of pi proportional to pi_ref e^(strength reward): the most reward at its KL; [..., P, A]."""
    return jax.nn.log_softmax(log_ref + strength * reward, axis=-1)
